"""Alembic's entry: migrate on the connection that `serve.registry.migrate` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from serve.registry.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can roll back schema changes; Alembic does not assume so. A failed migration must leave nothing behind.
    transactional_ddl=True,
    # SQLite has few ALTER forms; batch mode copies the table instead.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
