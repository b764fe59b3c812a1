"""A document's versions: their history, and going back to one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serve.ids import new_id
from serve.registry import changes, jobs
from serve.registry.adapters import CURRENT
from serve.registry.checks import check_limit
from serve.registry.documents import any_document, any_version, get_document, lock_document
from serve.registry.errors import Conflict, InvalidInput, NotFound, VersionNotFound
from serve.registry.records import Job, Page, Rollback, VersionState, VersionSummary
from serve.registry.tables import adapters, document_versions, documents
from serve.registry.tables import jobs as jobs_table

_SERVABLE = frozenset({"ready", "degraded"})


@dataclass(frozen=True, slots=True)
class _Published:
    """What one job has published: adapters of all parts of one version, in order."""

    adapter_ids: tuple[str, ...]
    states: frozenset[str]
    current: bool

    @property
    def servable(self) -> bool:
        return self.states <= _SERVABLE


def list_versions(
    connection: sa.Connection, tenant_id: str, document_id: str, limit: int, cursor: str | None
) -> Page[VersionSummary]:
    """Newest first; the cursor is the last number of the page before. Empty where there is no such live document."""
    limit = check_limit(limit)
    if "\x00" in document_id:
        return Page([], None)
    query = (
        sa.select(document_versions)
        .join(documents, documents.c.id == document_versions.c.document_id)
        .where(
            documents.c.tenant_id == tenant_id, documents.c.id == document_id, documents.c.deleted_at.is_(None)
        )
    )
    if cursor is not None:
        if not (cursor.isdecimal() and cursor.isascii() and len(cursor) < 10):
            raise InvalidInput("The cursor is not one that a list has given.")
        query = query.where(document_versions.c.number < int(cursor))
    rows = connection.execute(query.order_by(document_versions.c.number.desc()).limit(limit + 1)).all()
    numbers = [row.number for row in rows[:limit]]
    published = _published(connection, document_id, adapters.c.version.in_(numbers))
    made = _generate_jobs(connection, document_id, numbers)
    summaries = [_summary(row, _last(published.get(row.number, [])), made.get(row.number)) for row in rows[:limit]]
    return Page(summaries, str(numbers[-1]) if len(rows) > limit else None)


def rollback(
    connection: sa.Connection, now: float, tenant_id: str, id_or_external_id: str, number: int | None
) -> Rollback:
    """See `Registry.rollback_document`."""
    found = get_document(connection, tenant_id, id_or_external_id)
    document = None if found is None else lock_document(connection, tenant_id, found.id)
    if document is None or document.deleted_at is not None:
        raise NotFound("There is no such document.")
    wanted = jobs.existing_job(connection, document.latest_job_id).version
    number = _target(connection, document, wanted, number)
    last = _last(_published(connection, document.id, adapters.c.version == number).get(number, []))
    if last is not None and last.servable:
        # Its newest job may be another one than that of these adapters, and have failed.
        job = _generate_jobs(connection, document.id, [number], "succeeded")[number]
        changed = wanted != number or not last.current
    else:
        newest = _generate_jobs(connection, document.id, [number]).get(number)
        if newest is not None and newest.state in ("queued", "running"):
            job, changed = newest, wanted != number
        else:
            job_id = new_id("job")
            jobs.insert_job(connection, now, job_id, tenant_id, document.id, number)
            job, changed = jobs.existing_job(connection, job_id), True
    if changed:
        _point_at(connection, now, document, number, job)
        if last is not None and last.servable and not last.current:
            _serve(connection, now, document, number, last.adapter_ids)
    return Rollback(any_document(connection, tenant_id, document.id), job)


def _target(connection: sa.Connection, document: sa.Row[Any], wanted: int, number: int | None) -> int:
    """The version to go to. Raises VersionNotFound, Conflict."""
    has = f"it has version{'s 1 to' if document.latest_version > 1 else ''} {document.latest_version}"
    if number is not None:
        if not 1 <= number <= document.latest_version:
            raise VersionNotFound(f"The document has no version {number}; {has}.")
        return number
    published = _published(connection, document.id, adapters.c.version < wanted)
    servable = [number for number, sets in published.items() if (last := _last(sets)) is not None and last.servable]
    if not servable:
        raise Conflict(
            f"No version before {wanted} has adapters that can be served at once; to have one generated again, name "
            f"it as 'version': {has}."
        )
    return max(servable)


def _point_at(connection: sa.Connection, now: float, document: sa.Row[Any], number: int, job: Job) -> None:
    """Make this the version that is to be served, whatever is still made of other ones."""
    note = f"The document was rolled back to version {number}."
    jobs.end_refinements(connection, now, document.id, note)
    jobs.cancel_queued(connection, now, document.id, number, note)
    version = any_version(connection, document.tenant_id, document.id, number)
    connection.execute(
        documents.update()
        .where(documents.c.id == document.id)
        .values(title=version.title, content_hash=version.content_hash, latest_job_id=job.id, updated_at=now)
    )


def _serve(
    connection: sa.Connection, now: float, document: sa.Row[Any], number: int, adapter_ids: tuple[str, ...]
) -> None:
    """Make these adapters current in place of all others, and tell the change log."""
    mine = sa.and_(adapters.c.document_id == document.id, *CURRENT)
    before = list(connection.execute(sa.select(adapters.c.id).where(mine).order_by(adapters.c.part)).scalars())
    connection.execute(adapters.update().where(mine).values(retired_at=now))
    connection.execute(adapters.update().where(adapters.c.id.in_(adapter_ids)).values(retired_at=None))
    connection.execute(
        documents.update()
        .where(documents.c.id == document.id)
        .values(current_version=number, current_adapter_id=adapter_ids[0])
    )
    changes.append(
        connection, now, document.tenant_id, "document_rolled_back", document.id, adapter_ids[0], retired=before
    )


def _published(
    connection: sa.Connection, document_id: str, which: sa.ColumnElement[bool]
) -> dict[int, list[_Published]]:
    """What was published of each of the versions for which `which` holds, oldest first."""
    columns = [adapters.c[name] for name in ("version", "job_id", "id", "part", "state", "retired_at")]
    rows = connection.execute(
        sa.select(*columns)
        .where(adapters.c.document_id == document_id, which, adapters.c.deleted_at.is_(None))
        # All of one job are of one transaction and have one time; later jobs' IDs sort later where times are equal.
        .order_by(adapters.c.version, adapters.c.created_at, adapters.c.job_id, adapters.c.part)
    )
    by_job: dict[tuple[int, str], list[sa.Row[Any]]] = {}
    for row in rows:
        by_job.setdefault((row.version, row.job_id), []).append(row)
    found: dict[int, list[_Published]] = {}
    for (number, _), parts in by_job.items():
        states = frozenset(row.state for row in parts)
        current = all(row.retired_at is None for row in parts)
        found.setdefault(number, []).append(_Published(tuple(row.id for row in parts), states, current))
    return found


def _last(published: list[_Published]) -> _Published | None:
    """The newest that can be served, so a refinement before what it began with; else the newest."""
    return next((one for one in reversed(published) if one.servable), published[-1] if published else None)


def _generate_jobs(
    connection: sa.Connection, document_id: str, numbers: Iterable[int], state: str | None = None
) -> dict[int, Job]:
    """The newest "generate" job of each version, of those in this state or of all."""
    query = sa.select(jobs_table).where(
        jobs_table.c.document_id == document_id,
        jobs_table.c.kind == "generate",
        jobs_table.c.version.in_(list(numbers)),
    )
    if state is not None:
        query = query.where(jobs_table.c.state == state)
    rows = connection.execute(query.order_by(jobs_table.c.created_at, jobs_table.c.id))
    return {row.version: jobs.to_job(row) for row in rows}


def _summary(row: sa.Row[Any], last: _Published | None, job: Job | None) -> VersionSummary:
    state: VersionState
    if last is not None and last.servable:
        state = "ready" if "ready" in last.states else "degraded"
    elif job is not None and job.state in ("queued", "running"):
        state = "processing"
    else:
        state = "failed" if last is None else "stale"
    return VersionSummary(
        document_id=row.document_id,
        tenant_id=row.tenant_id,
        number=row.number,
        title=row.title,
        mode=row.mode,
        content_hash=row.content_hash,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        state=state,
        current=last is not None and last.current,
        adapter_ids=() if last is None else last.adapter_ids,
        job_id=None if job is None else job.id,
    )
