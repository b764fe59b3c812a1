"""Adapters: reading them, and what a router needs of them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import sqlalchemy as sa

from serve.registry import changes
from serve.registry.checks import check_cursor, check_limit
from serve.registry.records import Adapter, AdapterState, Page, RoutableAdapter, RoutableSnapshot
from serve.registry.tables import adapters, centroids, document_versions, documents

VECTOR_TYPE = np.dtype("<f4")
# What makes an adapter one of its document's current ones.
CURRENT = (adapters.c.retired_at.is_(None), adapters.c.deleted_at.is_(None))
_IDS_AT_ONCE = 500  # databases bound the number of parameters of a query


def get_adapter(connection: sa.Connection, tenant_id: str, adapter_id: str) -> Adapter | None:
    """A tenant's adapter that is not deleted."""
    if "\x00" in adapter_id:
        return None
    row = connection.execute(
        sa.select(adapters).where(
            adapters.c.tenant_id == tenant_id, adapters.c.id == adapter_id, adapters.c.deleted_at.is_(None)
        )
    ).one_or_none()
    return None if row is None else _adapter(row)


def list_adapters(
    connection: sa.Connection, tenant_id: str, limit: int, cursor: str | None, document_id: str | None
) -> Page[Adapter]:
    """Newest first."""
    limit = check_limit(limit)
    query = sa.select(adapters).where(adapters.c.tenant_id == tenant_id, adapters.c.deleted_at.is_(None))
    if document_id is not None:
        query = query.where(adapters.c.document_id == document_id)
    if check_cursor(cursor, "adp") is not None:
        query = query.where(adapters.c.id < cursor)
    rows = connection.execute(query.order_by(adapters.c.id.desc()).limit(limit + 1)).all()
    return Page([_adapter(row) for row in rows[:limit]], rows[limit - 1].id if len(rows) > limit else None)


def current_adapters_of(connection: sa.Connection, tenant_id: str, document_id: str) -> list[Adapter]:
    """In order of part."""
    if "\x00" in document_id:
        return []
    query = sa.select(adapters).where(
        adapters.c.tenant_id == tenant_id, adapters.c.document_id == document_id, *CURRENT
    )
    return [_adapter(row) for row in connection.execute(query.order_by(adapters.c.part))]


def current_ids(connection: sa.Connection, document_ids: Sequence[str]) -> dict[str, list[tuple[str, AdapterState]]]:
    """ID and state of the current adapters of documents, in order of part; a document that has none is left out."""
    found: dict[str, list[tuple[str, AdapterState]]] = {}
    for start in range(0, len(document_ids), _IDS_AT_ONCE):
        query = sa.select(adapters.c.document_id, adapters.c.id, adapters.c.state).where(
            adapters.c.document_id.in_(document_ids[start : start + _IDS_AT_ONCE]), *CURRENT
        )
        for row in connection.execute(query.order_by(adapters.c.document_id, adapters.c.part)):
            found.setdefault(row.document_id, []).append((row.id, row.state))
    return found


def list_purgeable(connection: sa.Connection, deleted_before: float, limit: int) -> list[Adapter]:
    """Oldest deletion first."""
    query = (
        sa.select(adapters)
        .where(adapters.c.state == "deleted", adapters.c.deleted_at < deleted_before, adapters.c.purged_at.is_(None))
        .order_by(adapters.c.deleted_at, adapters.c.id)
        .limit(check_limit(limit))
    )
    return [_adapter(row) for row in connection.execute(query)]


def mark_purged(connection: sa.Connection, now: float, adapter_id: str) -> None:
    """Only a deleted adapter can be purged."""
    connection.execute(
        adapters.update().where(adapters.c.id == adapter_id, adapters.c.state == "deleted").values(purged_at=now)
    )


def known_adapters(connection: sa.Connection, adapter_ids: Set[str]) -> set[str]:
    """Those of these IDs that have a row, of whatever tenant and state."""
    return _among(connection, adapter_ids)


def current_adapters(connection: sa.Connection, adapter_ids: Set[str]) -> set[str]:
    """Those of these IDs that are neither deleted nor retired, of whatever tenant."""
    return _among(connection, adapter_ids, *CURRENT)


def newest_adapters(connection: sa.Connection, limit: int) -> list[Adapter]:
    """Current adapters of all tenants, the last made first."""
    query = sa.select(adapters).where(*CURRENT).order_by(adapters.c.id.desc()).limit(check_limit(limit))
    return [_adapter(row) for row in connection.execute(query)]


def routable(
    connection: sa.Connection,
    tenant_id: str,
    document_ids: Sequence[str] | None = None,
    encoder: tuple[str, str] | None = None,
) -> list[RoutableAdapter]:
    """Current adapters of live documents, by document and part; see `Registry.routable`."""
    if document_ids is not None and len(document_ids) > _IDS_AT_ONCE:
        batches = [document_ids[start : start + _IDS_AT_ONCE] for start in range(0, len(document_ids), _IDS_AT_ONCE)]
        return [one for batch in batches for one in routable(connection, tenant_id, batch, encoder)]
    query = (
        sa.select(
            adapters.c.id,
            adapters.c.document_id,
            adapters.c.version,
            adapters.c.part,
            adapters.c.parts,
            adapters.c.manifest["chunks"].label("chunks"),
            adapters.c.base_fingerprint,
            adapters.c.generator_fingerprint,
            adapters.c.state,
            documents.c.collection_id,
            document_versions.c.title,
            document_versions.c.mode,
            centroids.c.encoder,
            centroids.c.encoder_version,
            centroids.c.count.label("rows"),
            centroids.c.dimension,
            centroids.c.vectors,
        )
        .join(documents, documents.c.id == adapters.c.document_id)
        .join(
            document_versions,
            sa.and_(
                document_versions.c.document_id == adapters.c.document_id,
                document_versions.c.number == adapters.c.version,
            ),
        )
        .join(centroids, centroids.c.adapter_id == adapters.c.id)
        .where(documents.c.tenant_id == tenant_id, documents.c.deleted_at.is_(None), *CURRENT)
        .order_by(adapters.c.document_id, adapters.c.part)
    )
    if document_ids is None:
        query = query.where(adapters.c.tenant_id == tenant_id)
    else:
        # By the document's tenant alone, or SQLite takes the index of all of the tenant's adapters.
        query = query.where(adapters.c.document_id.in_(list(document_ids)))
    if encoder is not None:
        query = query.where(centroids.c.encoder == encoder[0], centroids.c.encoder_version == encoder[1])
    return [
        RoutableAdapter(
            adapter_id=row.id,
            tenant_id=tenant_id,
            document_id=row.document_id,
            document_title=row.title,
            version=row.version,
            mode=row.mode,
            part=row.part,
            parts=row.parts,
            spans=spans_of(row.chunks),
            collection_id=row.collection_id,
            # frombuffer gives a read-only view of the bytes, which suits a frozen record
            centroids=np.frombuffer(row.vectors, dtype=VECTOR_TYPE).reshape(row.rows, row.dimension),
            encoder=row.encoder,
            encoder_version=row.encoder_version,
            base_fingerprint=row.base_fingerprint,
            generator_fingerprint=row.generator_fingerprint,
            state=row.state,
        )
        for row in connection.execute(query)
    ]


def routable_snapshot(
    connection: sa.Connection, tenant_id: str, encoder: tuple[str, str] | None = None
) -> RoutableSnapshot:
    """All of one transaction, and so of one state."""
    seq = changes.head(connection, tenant_id)
    return RoutableSnapshot(seq, routable(connection, tenant_id, encoder=encoder))


def _among(
    connection: sa.Connection, adapter_ids: Set[str], *conditions: sa.ColumnElement[bool]
) -> set[str]:
    ids = list(adapter_ids)
    found: set[str] = set()
    for start in range(0, len(ids), _IDS_AT_ONCE):
        some = adapters.c.id.in_(ids[start : start + _IDS_AT_ONCE])
        found.update(connection.execute(sa.select(adapters.c.id).where(some, *conditions)).scalars())
    return found


def spans_of(chunks: Any) -> tuple[tuple[int, int], ...]:
    """The spans of a manifest's chunks; none, which stands for all of the text, where they do not say."""
    try:
        return tuple((int(chunk["start"]), int(chunk["end"])) for chunk in chunks or ())
    except (KeyError, TypeError, ValueError):
        return ()


def _adapter(row: sa.Row[Any]) -> Adapter:
    return Adapter(
        id=row.id,
        tenant_id=row.tenant_id,
        document_id=row.document_id,
        version=row.version,
        job_id=row.job_id,
        part=row.part,
        parts=row.parts,
        kind=row.kind,
        state=row.state,
        rank=row.rank,
        alpha=row.alpha,
        target_modules=tuple(row.target_modules),
        blob_path=row.blob_path,
        checksum=row.checksum,
        size_bytes=row.size_bytes,
        base_fingerprint=row.base_fingerprint,
        generator_fingerprint=row.generator_fingerprint,
        manifest=row.manifest,
        created_at=row.created_at,
        retired_at=row.retired_at,
        deleted_at=row.deleted_at,
    )
