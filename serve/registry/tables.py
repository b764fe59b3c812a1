"""The tables, as the newest migration leaves them. Change a table only together with a migration.

Times are seconds since the epoch. Pointers from `documents` to its newest job and current adapter carry no foreign
key, for the rows refer to each other. The version of the job `documents.latest_job_id` is the one that is to be
served: `latest_version`, the highest number, until the document is rolled back. A document's current adapters are those
that are neither retired nor deleted; `documents.current_adapter_id` is the first of them.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _tenant(primary_key: bool = False) -> sa.Column[str]:
    return sa.Column("tenant_id", sa.String(40), sa.ForeignKey("tenants.id"), nullable=False, primary_key=primary_key)


def _document() -> sa.Column[str]:
    return sa.Column("document_id", sa.String(40), sa.ForeignKey("documents.id"), nullable=False)


def _time(name: str, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=nullable)


tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    _time("created_at"),
)

# The change log's counter: the row is locked by every transaction that writes an event, so numbers follow commit order.
tenant_heads = sa.Table(
    "tenant_heads",
    metadata,
    _tenant(primary_key=True),
    sa.Column("seq", sa.BigInteger(), nullable=False),
)

# When each tenant last had a job leased, as a running number: who waited longest goes first.
tenant_turns = sa.Table(
    "tenant_turns",
    metadata,
    _tenant(primary_key=True),
    sa.Column("turn", sa.BigInteger(), nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("scope", sa.String(16), nullable=False),
    sa.Column("label", sa.String(200), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    _time("created_at"),
    _time("revoked_at", nullable=True),
)

key_tenants = sa.Table(
    "key_tenants",
    metadata,
    sa.Column("key_id", sa.String(40), sa.ForeignKey("api_keys.id"), primary_key=True),
    _tenant(primary_key=True),
)

collections = sa.Table(
    "collections",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(),
    sa.Column("name", sa.String(200), nullable=False),
    _time("created_at"),
    sa.UniqueConstraint("tenant_id", "name"),
)

documents = sa.Table(
    "documents",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(),
    sa.Column("external_id", sa.String(255)),
    sa.Column("collection_id", sa.String(40), sa.ForeignKey("collections.id")),
    sa.Column("title", sa.Text(), nullable=False),
    sa.Column("metadata", sa.JSON(), nullable=False),
    sa.Column("content_hash", sa.String(64), nullable=False),
    sa.Column("latest_version", sa.Integer(), nullable=False),
    sa.Column("latest_job_id", sa.String(40), nullable=False),
    sa.Column("current_version", sa.Integer()),
    sa.Column("current_adapter_id", sa.String(40)),
    _time("created_at"),
    _time("updated_at"),
    _time("deleted_at", nullable=True),
    sa.UniqueConstraint("tenant_id", "external_id"),
    sa.Index(None, "tenant_id", "id"),
    sa.Index(None, "tenant_id", "content_hash"),
    sa.Index(None, "tenant_id", "collection_id"),
)

document_versions = sa.Table(
    "document_versions",
    metadata,
    sa.Column("document_id", sa.String(40), sa.ForeignKey("documents.id"), primary_key=True),
    sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
    _tenant(),
    sa.Column("title", sa.Text(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("content_hash", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.Integer(), nullable=False),
    _time("created_at"),
    sa.Column("mode", sa.String(16), nullable=False, server_default="document"),
    sa.Column("probes", sa.JSON(), nullable=False, server_default="[]"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(),
    _document(),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("stage", sa.String(64), nullable=False),
    sa.Column("fraction", sa.Double(), nullable=False),
    sa.Column("attempts", sa.Integer(), nullable=False),
    sa.Column("error", sa.Text()),
    sa.Column("worker", sa.String(200)),
    _time("available_at"),
    _time("lease_expires_at", nullable=True),
    sa.Column("adapter_id", sa.String(40)),
    _time("created_at"),
    _time("updated_at"),
    _time("finished_at", nullable=True),
    sa.Column("kind", sa.String(16), nullable=False, server_default="generate"),
    sa.Column("note", sa.Text()),
    sa.Index(None, "state", "tenant_id", "created_at"),
    sa.Index(None, "document_id"),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    _tenant(),
    _document(),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("rank", sa.Integer(), nullable=False),
    sa.Column("alpha", sa.Double(), nullable=False),
    sa.Column("target_modules", sa.JSON(), nullable=False),
    sa.Column("blob_path", sa.Text(), nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    sa.Column("base_fingerprint", sa.String(128), nullable=False),
    sa.Column("generator_fingerprint", sa.String(128), nullable=False),
    sa.Column("manifest", sa.JSON(), nullable=False),
    _time("created_at"),
    _time("retired_at", nullable=True),
    _time("deleted_at", nullable=True),
    _time("purged_at", nullable=True),
    sa.Column("part", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("parts", sa.Integer(), nullable=False, server_default="1"),
    sa.UniqueConstraint("job_id", "part"),
    sa.Index(None, "tenant_id", "id"),
    sa.Index(None, "tenant_id", "retired_at"),
    sa.Index(None, "document_id"),
    sa.Index(None, "state", "deleted_at"),
)

# All of one adapter's vectors for one encoder: `vectors` is little-endian float32 [count, dimension], row by row.
centroids = sa.Table(
    "centroids",
    metadata,
    sa.Column("adapter_id", sa.String(40), sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("encoder", sa.String(128), primary_key=True),
    sa.Column("encoder_version", sa.String(128), primary_key=True),
    _tenant(),
    sa.Column("count", sa.Integer(), nullable=False),
    sa.Column("dimension", sa.Integer(), nullable=False),
    sa.Column("vectors", sa.LargeBinary(), nullable=False),
)

change_events = sa.Table(
    "change_events",
    metadata,
    _tenant(primary_key=True),
    sa.Column("seq", sa.BigInteger(), primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("adapter_id", sa.String(40)),
    sa.Column("document_id", sa.String(40)),
    sa.Column("retired_adapter_ids", sa.JSON(), nullable=False),
    _time("created_at"),
)

aliases = sa.Table(
    "aliases",
    metadata,
    _tenant(primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("target", sa.String(40), nullable=False),
    _time("created_at"),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    _tenant(primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("request_hash", sa.String(64), nullable=False),
    _document(),
    sa.Column("version", sa.Integer(), nullable=False),
    sa.Column("job_id", sa.String(40), nullable=False),
    sa.Column("created", sa.Boolean(), nullable=False),
    _time("created_at"),
)

# Every version of a tenant's routing policy; the highest number is in force.
policies = sa.Table(
    "policies",
    metadata,
    _tenant(primary_key=True),
    sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("created_by", sa.String(40), nullable=False),
    sa.Column("restored_from", sa.Integer()),
    _time("created_at"),
)

# A tenant's calibrations of its router, by a running number: at most one is "live" and one "shadow". `seq` is the
# change, and `feedback_until` the time of the feedback, up to which each has seen what the tenant has.
calibrations = sa.Table(
    "calibrations",
    metadata,
    _tenant(primary_key=True),
    sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("encoder", sa.String(128), nullable=False),
    sa.Column("encoder_version", sa.String(128), nullable=False),
    sa.Column("generator_fingerprint", sa.String(128), nullable=False),
    sa.Column("seq", sa.BigInteger(), nullable=False),
    _time("feedback_until"),
    sa.Column("body", sa.JSON(), nullable=False),
    _time("created_at"),
)

# The newest routing decisions of each tenant. `candidates` are without titles, which go with their documents.
decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("response_id", sa.String(64), primary_key=True),
    _tenant(),
    sa.Column("model", sa.Text(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("headers", sa.JSON(), nullable=False),
    sa.Column("candidates", sa.JSON(), nullable=False),
    sa.Column("adapter_id", sa.String(40)),
    sa.Column("document_id", sa.String(40)),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("confidence", sa.Double()),
    _time("created_at"),
    sa.Index(None, "tenant_id", "created_at"),
)

# What clients say about answers, with what was decided: it outlives the decision's own row.
feedback = sa.Table(
    "feedback",
    metadata,
    _tenant(primary_key=True),
    sa.Column("response_id", sa.String(64), primary_key=True),
    sa.Column("rating", sa.String(8)),
    sa.Column("right_document_id", sa.String(40)),
    sa.Column("no_document", sa.Boolean(), nullable=False),
    sa.Column("answer", sa.Text()),
    sa.Column("candidates", sa.JSON(), nullable=False),
    sa.Column("adapter_id", sa.String(40)),
    sa.Column("document_id", sa.String(40)),
    _time("created_at"),
    sa.Index(None, "tenant_id", "created_at"),
)
