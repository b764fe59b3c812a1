"""Jobs and their leases.

A lease is a row that names its worker and the time until which others leave it alone. Every step of a worker is a
compare-and-set on that name, so of two workers that believe to hold a job only one can finish it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.registry.documents import any_document, any_version
from serve.registry.errors import LeaseLost
from serve.registry.records import Job, JobKind, LeasedJob
from serve.registry.tables import jobs, tenant_turns

MAX_ATTEMPTS = 5
MAX_RETRY_PAUSE_S = 60.0


def insert_job(
    connection: sa.Connection,
    now: float,
    job_id: str,
    tenant_id: str,
    document_id: str,
    version: int,
    kind: JobKind = "generate",
    after_s: float = 0.0,
) -> None:
    """Queue a run for a document version, free after `after_s` seconds."""
    connection.execute(
        jobs.insert().values(
            id=job_id,
            tenant_id=tenant_id,
            document_id=document_id,
            version=version,
            kind=kind,
            state="queued",
            stage="queued",
            fraction=0.0,
            attempts=0,
            available_at=now + after_s,
            created_at=now,
            updated_at=now,
        )
    )


def existing_job(connection: sa.Connection, job_id: str) -> Job:
    """A job that must exist, of whatever tenant."""
    return to_job(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())


def get_job(connection: sa.Connection, tenant_id: str, job_id: str) -> Job | None:
    """A tenant's job."""
    if "\x00" in job_id:
        return None
    row = connection.execute(sa.select(jobs).where(jobs.c.tenant_id == tenant_id, jobs.c.id == job_id)).one_or_none()
    return None if row is None else to_job(row)


def count_jobs(connection: sa.Connection, kind: JobKind | None = None) -> dict[str, int]:
    """Jobs in each state; all four states are there."""
    counts = dict.fromkeys(("queued", "running", "succeeded", "failed"), 0)
    query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
    for state, count in connection.execute(query if kind is None else query.where(jobs.c.kind == kind)):
        counts[state] = count
    return counts


def work_waits(connection: sa.Connection, now: float, kind: JobKind | None = None) -> bool:
    """Whether `lease_jobs` would find anything to do, of one kind or any."""
    query = sa.select(jobs.c.id).where(_free(now)).limit(1)
    return connection.execute(query if kind is None else query.where(jobs.c.kind == kind)).first() is not None


def lease_jobs(connection: sa.Connection, now: float, worker: str, limit: int, lease_s: float) -> list[LeasedJob]:
    """See `Registry.lease_jobs`."""
    _give_up(connection, now)
    taken: list[str] = []
    # A refinement is never urgent, and a worker that holds one should be free again soon.
    candidates = _candidates(connection, now, "generate", limit) or _candidates(connection, now, "refine", 1)
    for candidate in candidates:
        # On PostgreSQL another worker may have been faster: then attempts differs and no row matches.
        claim = jobs.update().where(
            jobs.c.id == candidate.id, jobs.c.state == candidate.state, jobs.c.attempts == candidate.attempts
        )
        result = connection.execute(
            claim.values(
                state="running",
                stage="leased",
                fraction=0.0,
                attempts=candidate.attempts + 1,
                worker=worker,
                lease_expires_at=now + lease_s,
                updated_at=now,
            )
        )
        if result.rowcount == 1:
            taken.append(candidate.id)
            turn = sa.select(sa.func.max(tenant_turns.c.turn) + 1).scalar_subquery()
            connection.execute(
                tenant_turns.update().where(tenant_turns.c.tenant_id == candidate.tenant_id).values(turn=turn)
            )
    return [_leased(connection, existing_job(connection, job_id)) for job_id in taken]


def renew_lease(connection: sa.Connection, now: float, job_id: str, worker: str, lease_s: float) -> None:
    """Push the lease's end out. Raises LeaseLost."""
    update_held(connection, job_id, worker, lease_expires_at=now + lease_s)


def set_progress(connection: sa.Connection, now: float, job_id: str, worker: str, stage: str, fraction: float) -> None:
    """Raises LeaseLost."""
    update_held(connection, job_id, worker, stage=stage[:64], fraction=min(1.0, max(0.0, fraction)), updated_at=now)


def release_leases(connection: sa.Connection, now: float, worker: str) -> int:
    """Queue a worker's jobs again."""
    held = jobs.update().where(jobs.c.state == "running", jobs.c.worker == worker)
    return connection.execute(
        held.values(
            state="queued",
            stage="queued",
            fraction=0.0,
            attempts=jobs.c.attempts - 1,
            worker=None,
            lease_expires_at=None,
            available_at=now,
            updated_at=now,
        )
    ).rowcount


def fail_job(connection: sa.Connection, now: float, job_id: str, worker: str, error: str, retry: bool) -> Job:
    """End a job or queue it again. Raises LeaseLost."""
    update_held(
        connection,
        job_id,
        worker,
        state="failed",
        error=_storable(error),
        worker=None,
        lease_expires_at=None,
        updated_at=now,
        finished_at=now,
    )
    job = existing_job(connection, job_id)
    if retry and job.attempts < MAX_ATTEMPTS:
        pause = min(MAX_RETRY_PAUSE_S, 2.0 ** (job.attempts - 1))
        connection.execute(
            jobs.update()
            .where(jobs.c.id == job_id)
            .values(state="queued", stage="queued", fraction=0.0, available_at=now + pause, finished_at=None)
        )
        job = existing_job(connection, job_id)
    return job


def finish_job(
    connection: sa.Connection, now: float, job_id: str, worker: str, note: str, stage: str = "kept"
) -> Job:
    """End a job as succeeded without an adapter of its own. Raises LeaseLost."""
    update_held(connection, job_id, worker, **_ended(now, stage, note))
    return existing_job(connection, job_id)


def end_refinements(connection: sa.Connection, now: float, document_id: str, note: str) -> None:
    """End a document's refine jobs, for what they would improve is no longer to be served.

    A worker that holds one finds its lease lost. The document must be locked.
    """
    connection.execute(
        jobs.update()
        .where(jobs.c.document_id == document_id, jobs.c.kind == "refine", jobs.c.state.in_(("queued", "running")))
        .values(**_ended(now, "outdated", note))
    )


def cancel_queued(connection: sa.Connection, now: float, document_id: str, after_version: int, error: str) -> None:
    """Fail a document's generate jobs for versions above `after_version` that no worker has begun.

    One that runs is left alone; what it makes is kept as retired. The document must be locked.
    """
    connection.execute(
        jobs.update()
        .where(
            jobs.c.document_id == document_id,
            jobs.c.kind == "generate",
            jobs.c.state == "queued",
            jobs.c.version > after_version,
        )
        .values(state="failed", error=error, updated_at=now, finished_at=now)
    )


def update_held(connection: sa.Connection, job_id: str, holder: str, /, **values: Any) -> None:
    """Change a job if this worker holds it, else raise LeaseLost."""
    held = jobs.update().where(jobs.c.id == job_id, jobs.c.state == "running", jobs.c.worker == holder)
    if connection.execute(held.values(**values)).rowcount != 1:
        raise LeaseLost(f"Job {job_id} is no longer held by {holder}.")


def to_job(row: sa.Row[Any]) -> Job:
    """A table row as a record."""
    return Job(
        id=row.id,
        tenant_id=row.tenant_id,
        document_id=row.document_id,
        version=row.version,
        kind=row.kind,
        state=row.state,
        stage=row.stage,
        fraction=row.fraction,
        attempts=row.attempts,
        error=row.error,
        note=row.note,
        worker=row.worker,
        lease_expires_at=row.lease_expires_at,
        adapter_id=row.adapter_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
        finished_at=row.finished_at,
    )


def _ended(now: float, stage: str, note: str) -> dict[str, Any]:
    """The values of a job that ends well but has made nothing."""
    return {
        "state": "succeeded",
        "stage": stage,
        "fraction": 1.0,
        "error": None,
        "note": _storable(note),
        "worker": None,
        "lease_expires_at": None,
        "updated_at": now,
        "finished_at": now,
    }


def _storable(message: str) -> str:
    """A message of a worker without what a database cannot hold."""
    return message.replace("\x00", "").encode(errors="replace").decode()


def _free(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(
        sa.and_(jobs.c.state == "queued", jobs.c.available_at <= now),
        sa.and_(jobs.c.state == "running", jobs.c.lease_expires_at <= now),
    )


def _give_up(connection: sa.Connection, now: float) -> None:
    """Fail jobs whose last allowed worker vanished: something in them may be what ends workers."""
    connection.execute(
        jobs.update()
        .where(jobs.c.state == "running", jobs.c.lease_expires_at <= now, jobs.c.attempts >= MAX_ATTEMPTS)
        .values(
            state="failed",
            error=f"Gave up: {MAX_ATTEMPTS} workers took this job and none finished it.",
            worker=None,
            lease_expires_at=None,
            updated_at=now,
            finished_at=now,
        )
    )


def _candidates(connection: sa.Connection, now: float, kind: JobKind, limit: int) -> Sequence[sa.Row[Any]]:
    """Free jobs of a kind in fair order.

    First by how many of the kind its tenant would have running with it, then by whose turn it is.
    """
    running = (
        sa.select(jobs.c.tenant_id, sa.func.count().label("count"))
        .where(jobs.c.kind == kind, jobs.c.state == "running", jobs.c.lease_expires_at > now)
        .group_by(jobs.c.tenant_id)
        .subquery()
    )
    place = sa.func.row_number().over(partition_by=jobs.c.tenant_id, order_by=(jobs.c.created_at, jobs.c.id))
    free = (
        sa.select(jobs.c.id, jobs.c.tenant_id, jobs.c.state, jobs.c.attempts, place.label("place"))
        .where(jobs.c.kind == kind, _free(now))
        .subquery()
    )
    query = (
        sa.select(free)
        .join(tenant_turns, tenant_turns.c.tenant_id == free.c.tenant_id)
        .outerjoin(running, running.c.tenant_id == free.c.tenant_id)
        .order_by(sa.func.coalesce(running.c.count, 0) + free.c.place, tenant_turns.c.turn, free.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def _leased(connection: sa.Connection, job: Job) -> LeasedJob:
    document = any_document(connection, job.tenant_id, job.document_id)
    version = any_version(connection, job.tenant_id, job.document_id, job.version)
    return LeasedJob(job, document, version)
