"""Publication: the one step that makes an adapter visible."""

from __future__ import annotations

import numpy as np
import sqlalchemy as sa

from serve.ids import id_kind
from serve.registry import changes, jobs
from serve.registry.adapters import VECTOR_TYPE
from serve.registry.checks import check_metadata
from serve.registry.documents import lock_document
from serve.registry.errors import InvalidInput, LeaseLost
from serve.registry.records import ChangeEvent, NewAdapter, NewCentroids
from serve.registry.tables import adapters, centroids, documents
from serve.registry.tables import jobs as jobs_table


def publish(
    connection: sa.Connection,
    now: float,
    job_id: str,
    worker: str,
    adapter: NewAdapter,
    new_centroids: NewCentroids,
) -> ChangeEvent:
    """See `Registry.publish`."""
    matrix = _checked_matrix(new_centroids)
    if id_kind(adapter.id) != "adp" or adapter.state not in ("ready", "degraded"):
        raise InvalidInput("An adapter needs an ID made by new_id('adp') and the state ready or degraded.")
    job = connection.execute(sa.select(jobs_table).where(jobs_table.c.id == job_id)).one_or_none()
    # The document is locked before the job, in the same order as deletion does.
    document = None if job is None else lock_document(connection, job.tenant_id, job.document_id)
    if job is None or document is None:
        raise LeaseLost(f"There is no job {job_id}.")
    jobs.update_held(
        connection,
        job_id,
        worker,
        state="succeeded",
        stage="ready",
        fraction=1.0,
        error=None,
        worker=None,
        lease_expires_at=None,
        adapter_id=adapter.id,
        updated_at=now,
        finished_at=now,
    )
    current = job.version == document.latest_version
    connection.execute(
        adapters.insert().values(
            id=adapter.id,
            tenant_id=job.tenant_id,
            document_id=job.document_id,
            version=job.version,
            job_id=job_id,
            kind=adapter.kind,
            state=adapter.state,
            rank=adapter.rank,
            alpha=adapter.alpha,
            target_modules=list(adapter.target_modules),
            blob_path=adapter.blob_path,
            checksum=adapter.checksum,
            size_bytes=adapter.size_bytes,
            base_fingerprint=adapter.base_fingerprint,
            generator_fingerprint=adapter.generator_fingerprint,
            manifest=check_metadata(adapter.manifest),
            created_at=now,
            retired_at=None if current else now,
        )
    )
    connection.execute(
        centroids.insert().values(
            adapter_id=adapter.id,
            encoder=new_centroids.encoder,
            encoder_version=new_centroids.version,
            tenant_id=job.tenant_id,
            count=matrix.shape[0],
            dimension=matrix.shape[1],
            vectors=matrix.tobytes(),
        )
    )
    if not current:
        return changes.append(connection, now, job.tenant_id, "adapter_superseded", adapter.id, job.document_id)
    retired = [] if document.current_adapter_id is None else [document.current_adapter_id]
    connection.execute(adapters.update().where(adapters.c.id.in_(retired)).values(retired_at=now))
    connection.execute(
        documents.update()
        .where(documents.c.id == document.id)
        .values(current_version=job.version, current_adapter_id=adapter.id, updated_at=now)
    )
    return changes.append(connection, now, job.tenant_id, "adapter_published", adapter.id, job.document_id, retired)


def _checked_matrix(new_centroids: NewCentroids) -> np.ndarray:
    matrix = np.ascontiguousarray(new_centroids.matrix, dtype=VECTOR_TYPE)
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
        raise InvalidInput(f"Centroids must be finite and of shape [n, d], these have {matrix.shape}.")
    return matrix
