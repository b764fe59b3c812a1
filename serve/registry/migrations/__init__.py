"""Alembic's folder; `serve.registry.migrate` runs it. Revisions are never edited once released."""
