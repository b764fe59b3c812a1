"""Imprint's Ray Serve application."""
