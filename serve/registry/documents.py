"""Documents, their versions and collections: reading and deleting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.ids import id_kind
from serve.registry import changes, decisions, feedback
from serve.registry.adapters import current_ids
from serve.registry.checks import check_cursor, check_limit
from serve.registry.records import (
    AdapterState,
    ChangeEvent,
    Collection,
    Document,
    DocumentState,
    DocumentVersion,
    Page,
)
from serve.registry.tables import adapters, aliases, centroids, collections, document_versions, documents, jobs

_QUERY = (
    sa.select(
        documents,
        collections.c.name.label("collection"),
        document_versions.c.mode,
        jobs.c.version,
        jobs.c.state.label("job_state"),
    )
    .join(jobs, jobs.c.id == documents.c.latest_job_id)
    .outerjoin(
        document_versions,
        sa.and_(document_versions.c.document_id == documents.c.id, document_versions.c.number == jobs.c.version),
    )
    .outerjoin(collections, collections.c.id == documents.c.collection_id)
)


def get_document(connection: sa.Connection, tenant_id: str, id_or_external_id: str) -> Document | None:
    """A live document by either name; an external ID cannot look like an ID of ours."""
    if "\x00" in id_or_external_id:
        return None
    column = documents.c.id if id_kind(id_or_external_id) == "doc" else documents.c.external_id
    row = connection.execute(
        _QUERY.where(documents.c.tenant_id == tenant_id, column == id_or_external_id, documents.c.deleted_at.is_(None))
    ).one_or_none()
    return None if row is None else _documents(connection, [row])[0]


def any_document(connection: sa.Connection, tenant_id: str, document_id: str) -> Document:
    """A document by ID, deleted or not; it must exist."""
    query = _QUERY.where(documents.c.tenant_id == tenant_id, documents.c.id == document_id)
    return _documents(connection, [connection.execute(query).one()])[0]


def any_version(connection: sa.Connection, tenant_id: str, document_id: str, number: int) -> DocumentVersion:
    """A version by number, its document deleted or not; it must exist."""
    query = sa.select(document_versions).where(
        document_versions.c.tenant_id == tenant_id,
        document_versions.c.document_id == document_id,
        document_versions.c.number == number,
    )
    return _version(connection.execute(query).one())


def get_version(
    connection: sa.Connection, tenant_id: str, document_id: str, number: int | None
) -> DocumentVersion | None:
    """A version of a live document; without a number the one that is to be served."""
    query = (
        sa.select(document_versions)
        .join(documents, documents.c.id == document_versions.c.document_id)
        .join(jobs, jobs.c.id == documents.c.latest_job_id)
        .where(
            documents.c.tenant_id == tenant_id,
            documents.c.id == document_id,
            documents.c.deleted_at.is_(None),
            document_versions.c.number == (jobs.c.version if number is None else number),
        )
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else _version(row)


def list_documents(
    connection: sa.Connection, tenant_id: str, limit: int, cursor: str | None, collection_id: str | None
) -> Page[Document]:
    """Live documents, newest first."""
    limit = check_limit(limit)
    query = _QUERY.where(documents.c.tenant_id == tenant_id, documents.c.deleted_at.is_(None))
    if collection_id is not None:
        query = query.where(documents.c.collection_id == collection_id)
    if check_cursor(cursor, "doc") is not None:
        query = query.where(documents.c.id < cursor)
    rows = connection.execute(query.order_by(documents.c.id.desc()).limit(limit + 1)).all()
    return Page(_documents(connection, rows[:limit]), rows[limit - 1].id if len(rows) > limit else None)


def list_collections(connection: sa.Connection, tenant_id: str) -> list[Collection]:
    """By name."""
    query = sa.select(collections).where(collections.c.tenant_id == tenant_id).order_by(collections.c.name)
    return [Collection(row.id, row.tenant_id, row.name, row.created_at) for row in connection.execute(query)]


def lock_document(connection: sa.Connection, tenant_id: str, document_id: str) -> sa.Row[Any] | None:
    """The bare row, locked against other writers (PostgreSQL; SQLite has one writer), deleted or not."""
    query = sa.select(documents).where(documents.c.tenant_id == tenant_id, documents.c.id == document_id)
    return connection.execute(query.with_for_update(key_share=True)).one_or_none()


def delete_document(
    connection: sa.Connection, now: float, tenant_id: str, id_or_external_id: str
) -> ChangeEvent | None:
    """Keep IDs and times, remove all that was the tenant's text, and tell the change log."""
    found = get_document(connection, tenant_id, id_or_external_id)
    row = None if found is None else lock_document(connection, tenant_id, found.id)
    if row is None or row.deleted_at is not None:
        return None
    connection.execute(
        documents.update()
        .where(documents.c.id == row.id)
        .values(
            deleted_at=now,
            updated_at=now,
            external_id=None,
            title="",
            metadata={},
            content_hash="",
            current_version=None,
            current_adapter_id=None,
        )
    )
    connection.execute(
        document_versions.update()
        .where(document_versions.c.document_id == row.id)
        .values(title="", text="", content_hash="", size_bytes=0, probes=[])
    )
    # A worker that holds one of these jobs finds its lease lost when it publishes.
    connection.execute(
        jobs.update()
        .where(jobs.c.document_id == row.id, jobs.c.state.in_(("queued", "running")))
        .values(
            state="failed",
            error="The document was deleted.",
            worker=None,
            lease_expires_at=None,
            updated_at=now,
            finished_at=now,
        )
    )
    mine = adapters.c.document_id == row.id
    ids = list(connection.execute(sa.select(adapters.c.id).where(mine).order_by(adapters.c.id)).scalars())
    connection.execute(centroids.delete().where(centroids.c.adapter_id.in_(ids)))
    connection.execute(adapters.update().where(mine).values(state="deleted", deleted_at=now, manifest={}))
    connection.execute(aliases.delete().where(aliases.c.tenant_id == tenant_id, aliases.c.target.in_([row.id, *ids])))
    decisions.forget_document(connection, tenant_id, row.id)
    feedback.forget_document(connection, tenant_id, row.id)
    return changes.append(connection, now, tenant_id, "document_deleted", row.id, retired=ids)


def _documents(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Document]:
    current = current_ids(connection, [row.id for row in rows])
    return [_document(row, current.get(row.id, [])) for row in rows]


def _state(row: sa.Row[Any], current: Sequence[tuple[str, AdapterState]]) -> DocumentState:
    if row.deleted_at is not None:
        return "deleted"
    if row.job_state in ("queued", "running"):
        return "processing"
    states = {state for _, state in current}
    if row.job_state == "succeeded" and states and states <= {"ready", "degraded"}:
        return "ready" if "ready" in states else "degraded"
    return "failed"


def _document(row: sa.Row[Any], current: Sequence[tuple[str, AdapterState]]) -> Document:
    return Document(
        id=row.id,
        tenant_id=row.tenant_id,
        external_id=row.external_id,
        collection_id=row.collection_id,
        collection=row.collection,
        title=row.title,
        mode=row.mode,
        metadata=row.metadata,
        content_hash=row.content_hash,
        version=row.version,
        latest_version=row.latest_version,
        current_version=row.current_version,
        adapter_id=row.current_adapter_id,
        adapter_ids=tuple(adapter_id for adapter_id, _ in current),
        degraded_parts=tuple(part for part, (_, state) in enumerate(current) if state == "degraded"),
        job_id=row.latest_job_id,
        state=_state(row, current),
        created_at=row.created_at,
        updated_at=row.updated_at,
        deleted_at=row.deleted_at,
    )


def _version(row: sa.Row[Any]) -> DocumentVersion:
    return DocumentVersion(
        document_id=row.document_id,
        tenant_id=row.tenant_id,
        number=row.number,
        title=row.title,
        text=row.text,
        content_hash=row.content_hash,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        mode=row.mode,
        probes=tuple(row.probes),
    )
