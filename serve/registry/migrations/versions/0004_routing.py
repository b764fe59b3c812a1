"""Routing: calibrations of tenants, decisions, and clients' feedback on them.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make the tables, empty."""
    op.create_table(
        "calibrations",
        sa.Column("tenant_id", sa.String(length=40), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("encoder", sa.String(length=128), nullable=False),
        sa.Column("encoder_version", sa.String(length=128), nullable=False),
        sa.Column("generator_fingerprint", sa.String(length=128), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("feedback_until", sa.Double(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_calibrations_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "version", name=op.f("pk_calibrations")),
    )
    op.create_table(
        "decisions",
        sa.Column("response_id", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("headers", sa.JSON(), nullable=False),
        sa.Column("candidates", sa.JSON(), nullable=False),
        sa.Column("adapter_id", sa.String(length=40), nullable=True),
        sa.Column("document_id", sa.String(length=40), nullable=True),
        sa.Column("reason", sa.String(length=32), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_decisions_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("response_id", name=op.f("pk_decisions")),
    )
    op.create_index(op.f("ix_decisions_tenant_id_created_at"), "decisions", ["tenant_id", "created_at"])
    op.create_table(
        "feedback",
        sa.Column("tenant_id", sa.String(length=40), nullable=False),
        sa.Column("response_id", sa.String(length=64), nullable=False),
        sa.Column("rating", sa.String(length=8), nullable=True),
        sa.Column("right_document_id", sa.String(length=40), nullable=True),
        sa.Column("no_document", sa.Boolean(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("candidates", sa.JSON(), nullable=False),
        sa.Column("adapter_id", sa.String(length=40), nullable=True),
        sa.Column("document_id", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_feedback_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "response_id", name=op.f("pk_feedback")),
    )
    op.create_index(op.f("ix_feedback_tenant_id_created_at"), "feedback", ["tenant_id", "created_at"])
