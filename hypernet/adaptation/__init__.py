"""Trains a hypernetwork for a new base, by distillation from the base that has the document in its prompt."""
