"""What happens to adapters when the base model or the generator is another one."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from serve.ids import new_id
from serve.registry import changes, jobs
from serve.registry.adapters import CURRENT
from serve.registry.documents import lock_document
from serve.registry.tables import adapters, documents
from serve.registry.tables import jobs as jobs_table

_CURRENT = sa.and_(adapters.c.document_id == documents.c.id, *CURRENT)


def tenants_to_mark(connection: sa.Connection, base_fingerprint: str, generator_fingerprint: str) -> list[str]:
    """Tenants with adapters in use that were made for another base or generator."""
    query = sa.select(adapters.c.tenant_id).where(_foreign(base_fingerprint, generator_fingerprint)).distinct()
    return list(connection.execute(query.order_by(adapters.c.tenant_id)).scalars())


def mark_stale(
    connection: sa.Connection, now: float, tenant_id: str, base_fingerprint: str, generator_fingerprint: str
) -> int:
    """Mark one tenant's adapters, all parts, and queue those documents again that have no job under way.

    Returns how many documents were queued.
    """
    foreign = sa.and_(adapters.c.tenant_id == tenant_id, _foreign(base_fingerprint, generator_fingerprint))
    # Documents before adapters and in order of ID, as all writers lock them: no deadlock on PostgreSQL. Those that
    # serve other adapters by now as well: a rollback may be about to serve these again.
    touched = sa.select(adapters.c.document_id).where(foreign).distinct()
    queued = 0
    for document_id in connection.execute(touched.order_by(adapters.c.document_id)).scalars().all():
        document = lock_document(connection, tenant_id, document_id)
        if document is None or document.deleted_at is not None:
            continue
        serving = sa.select(adapters.c.id).where(foreign, adapters.c.document_id == document.id, *CURRENT)
        if connection.execute(serving.limit(1)).first() is None:
            continue
        jobs.end_refinements(connection, now, document.id, "The base model or the generator is another one.")
        queued += queue_again(connection, now, document)
    went: dict[str, list[str]] = {}
    query = sa.select(adapters.c.document_id, adapters.c.id).where(foreign)
    for row in connection.execute(query.order_by(adapters.c.document_id, adapters.c.id)):
        went.setdefault(row.document_id, []).append(row.id)
    for ids in went.values():
        # `foreign` again, for an adapter may have been deleted before its document was locked.
        connection.execute(adapters.update().where(adapters.c.id.in_(ids), foreign).values(state="stale"))
    for document_id, ids in went.items():
        changes.append(connection, now, tenant_id, "adapters_stale", document_id, retired=ids)
    return queued


def queue_again(connection: sa.Connection, now: float, document: sa.Row[Any]) -> bool:
    """Queue a generate job for the version that is to be served; False where one waits or runs already.

    The document's row must be locked.
    """
    job = jobs.existing_job(connection, document.latest_job_id)
    if job.state in ("queued", "running"):
        return False
    job_id = new_id("job")
    jobs.insert_job(connection, now, job_id, document.tenant_id, document.id, job.version)
    connection.execute(
        documents.update().where(documents.c.id == document.id).values(latest_job_id=job_id, updated_at=now)
    )
    return True


def count_pending(connection: sa.Connection) -> int:
    """Documents that wait for a new adapter in place of a stale one: the progress of a change of base."""
    query = (
        sa.select(sa.func.count(documents.c.id.distinct()))
        .select_from(documents)
        .join(adapters, _CURRENT)
        .join(jobs_table, jobs_table.c.id == documents.c.latest_job_id)
        .where(adapters.c.state == "stale", jobs_table.c.state.in_(("queued", "running")))
    )
    return int(connection.execute(query).scalar_one())


def _foreign(base_fingerprint: str, generator_fingerprint: str) -> sa.ColumnElement[bool]:
    return sa.and_(
        adapters.c.state.in_(("ready", "degraded")),
        sa.or_(
            adapters.c.base_fingerprint != base_fingerprint,
            adapters.c.generator_fingerprint != generator_fingerprint,
        ),
    )
