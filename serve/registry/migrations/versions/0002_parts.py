"""Documents with several adapters, refine jobs, task descriptions, and the client's own probes.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns; every adapter of before is part 0 of 1, every job of kind "generate"."""
    op.add_column("document_versions", sa.Column("mode", sa.String(16), nullable=False, server_default="document"))
    op.add_column("document_versions", sa.Column("probes", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("jobs", sa.Column("kind", sa.String(16), nullable=False, server_default="generate"))
    op.add_column("jobs", sa.Column("note", sa.Text(), nullable=True))
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("part", sa.Integer(), nullable=False, server_default="0"))
        adapters.add_column(sa.Column("parts", sa.Integer(), nullable=False, server_default="1"))
        adapters.drop_constraint(op.f("uq_adapters_job_id"), type_="unique")
        adapters.create_unique_constraint(op.f("uq_adapters_job_id_part"), ["job_id", "part"])
        adapters.create_index(op.f("ix_adapters_tenant_id_retired_at"), ["tenant_id", "retired_at"])
    # Events name their document from now on. Older ones of several documents name none; nobody reads those again,
    # for followers begin at the newest number.
    op.execute("UPDATE change_events SET document_id = '' WHERE document_id IS NULL")
