"""Adapters' vectors, by encoder: storing them, and finding who lacks those of an encoder.

An adapter has a set of vectors for each encoder that its text was embedded with. Sets of encoders that are no longer
used stay until the document is deleted: a way back to such an encoder then needs no work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from serve.registry import changes
from serve.registry.adapters import CURRENT, VECTOR_TYPE, spans_of
from serve.registry.checks import check_limit
from serve.registry.documents import lock_document
from serve.registry.errors import InvalidInput
from serve.registry.records import ChangeEvent, NewCentroids, UnembeddedAdapter
from serve.registry.tables import adapters, centroids, documents


def check_matrix(new: NewCentroids) -> np.ndarray:
    """The vectors as they are stored, little-endian float32 [n, d]. Raises InvalidInput."""
    matrix = np.ascontiguousarray(new.matrix, dtype=VECTOR_TYPE)
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
        raise InvalidInput(f"Centroids must be finite and of shape [n, d], these have {matrix.shape}.")
    return matrix


def insert_centroids(
    connection: sa.Connection, tenant_id: str, adapter_id: str, new: NewCentroids, matrix: np.ndarray
) -> None:
    """Store an adapter's first vectors of an encoder; `matrix` as `check_matrix` gives it."""
    connection.execute(
        centroids.insert().values(
            adapter_id=adapter_id,
            encoder=new.encoder,
            encoder_version=new.version,
            tenant_id=tenant_id,
            count=matrix.shape[0],
            dimension=matrix.shape[1],
            vectors=matrix.tobytes(),
        )
    )


def count_lacking(connection: sa.Connection, encoder: str, version: str, tenant_id: str | None) -> int:
    """Current adapters, of one tenant or all, without vectors of this encoder."""
    query = sa.select(sa.func.count()).select_from(adapters.join(documents)).where(*_lacking(encoder, version))
    if tenant_id is not None:
        query = query.where(adapters.c.tenant_id == tenant_id)
    return int(connection.execute(query).scalar_one())


def lacks_any(connection: sa.Connection, encoder: str, version: str, tenant_id: str | None) -> bool:
    """Whether `count_lacking` is more than 0, found sooner."""
    query = sa.select(adapters.c.id).select_from(adapters.join(documents)).where(*_lacking(encoder, version))
    if tenant_id is not None:
        query = query.where(adapters.c.tenant_id == tenant_id)
    return connection.execute(query.limit(1)).first() is not None


def documents_lacking(
    connection: sa.Connection, encoder: str, version: str, after: str, limit: int
) -> list[tuple[str, str]]:
    """(tenant, document) IDs, by document, after the document `after`."""
    query = (
        sa.select(adapters.c.tenant_id, adapters.c.document_id)
        .select_from(adapters.join(documents))
        .where(*_lacking(encoder, version), adapters.c.document_id > after)
        .distinct()
        .order_by(adapters.c.document_id)
        .limit(check_limit(limit))
    )
    return [(row.tenant_id, row.document_id) for row in connection.execute(query)]


def adapters_lacking(
    connection: sa.Connection, tenant_id: str, document_id: str, encoder: str, version: str
) -> list[UnembeddedAdapter]:
    """A document's, in order of part."""
    columns = [adapters.c[name] for name in ("id", "version", "part", "parts")]
    query = (
        sa.select(*columns, adapters.c.manifest["chunks"].label("chunks"))
        .select_from(adapters.join(documents))
        # By the document's tenant, or SQLite takes the index of all of the tenant's adapters.
        .where(*_lacking(encoder, version), documents.c.tenant_id == tenant_id, adapters.c.document_id == document_id)
        .order_by(adapters.c.part)
    )
    return [
        UnembeddedAdapter(row.id, tenant_id, document_id, row.version, row.part, row.parts, spans_of(row.chunks))
        for row in connection.execute(query)
    ]


def add_centroids(
    connection: sa.Connection, now: float, tenant_id: str, document_id: str, new: Sequence[tuple[str, NewCentroids]]
) -> ChangeEvent | None:
    """See `Registry.add_centroids`."""
    matrices = [check_matrix(one) for _, one in new]
    document = lock_document(connection, tenant_id, document_id)
    if document is None or document.deleted_at is not None:
        return None
    added = []
    for (adapter_id, one), matrix in zip(new, matrices, strict=True):
        lacks = (*_lacking(one.encoder, one.version), adapters.c.id == adapter_id)
        query = sa.select(adapters.c.id).select_from(adapters.join(documents)).where(*lacks)
        if connection.execute(query.where(adapters.c.document_id == document.id)).first() is not None:
            insert_centroids(connection, tenant_id, adapter_id, one, matrix)
            added.append(adapter_id)
    if not added:
        return None
    return changes.append(connection, now, tenant_id, "centroids_added", document.id, added[0])


def _lacking(encoder: str, version: str) -> tuple[sa.ColumnElement[bool], ...]:
    """For a query over adapters and their documents."""
    held: Any = sa.select(centroids.c.adapter_id).where(
        centroids.c.adapter_id == adapters.c.id,
        centroids.c.encoder == encoder,
        centroids.c.encoder_version == version,
    )
    return (documents.c.deleted_at.is_(None), *CURRENT, ~held.exists())
