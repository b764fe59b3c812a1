"""Publication: the one step that makes the adapters of a document's parts visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.ids import id_kind, new_id
from serve.registry import changes, jobs
from serve.registry.adapters import current_ids
from serve.registry.centroids import check_matrix, insert_centroids
from serve.registry.checks import check_metadata
from serve.registry.documents import lock_document
from serve.registry.errors import InvalidInput, LeaseLost
from serve.registry.records import ChangeEvent, NewAdapter, NewPart
from serve.registry.tables import adapters, documents
from serve.registry.tables import jobs as jobs_table


def publish(
    connection: sa.Connection,
    now: float,
    job_id: str,
    worker: str,
    parts: Sequence[NewPart],
    *,
    refine_after_s: float | None = None,
    expected_adapter_ids: Sequence[str] | None = None,
) -> ChangeEvent | None:
    """See `Registry.publish`. None: the job has been ended instead, for other adapters are current than expected."""
    _check_parts([adapter for adapter, *_ in parts])
    matrices = [[(one, check_matrix(one)) for one in new_centroids] for _, *new_centroids in parts]
    job = connection.execute(sa.select(jobs_table).where(jobs_table.c.id == job_id)).one_or_none()
    # The document is locked before the job, in the same order as deletion and posting do.
    document = None if job is None else lock_document(connection, job.tenant_id, job.document_id)
    if job is None or document is None:
        raise LeaseLost(f"There is no job {job_id}.")
    if job.kind == "refine" and expected_adapter_ids is None:
        raise InvalidInput("A refine job must say which adapters it started from.")
    current = [adapter_id for adapter_id, _ in current_ids(connection, [document.id]).get(document.id, [])]
    # A document that was rolled back meanwhile stays so: what was made of another version is kept as retired.
    wanted = job.version == jobs.existing_job(connection, document.latest_job_id).version
    if expected_adapter_ids is not None and not (wanted and current == list(expected_adapter_ids)):
        jobs.finish_job(connection, now, job_id, worker, "Other adapters are current by now.", stage="outdated")
        return None
    first = parts[0][0]
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
        adapter_id=first.id,
        updated_at=now,
        finished_at=now,
    )
    if wanted:
        connection.execute(adapters.update().where(adapters.c.id.in_(current)).values(retired_at=now))
    for (adapter, *_), vectors in zip(parts, matrices, strict=True):
        _insert(connection, now, job, adapter, retired_at=None if wanted else now)
        for new_centroids, matrix in vectors:
            insert_centroids(connection, job.tenant_id, adapter.id, new_centroids, matrix)
    if not wanted:
        return changes.append(connection, now, job.tenant_id, "adapter_superseded", document.id, first.id)
    connection.execute(
        documents.update()
        .where(documents.c.id == document.id)
        .values(current_version=job.version, current_adapter_id=first.id, updated_at=now)
    )
    jobs.end_refinements(connection, now, document.id, "Other adapters are current by now.")
    if refine_after_s is not None:
        jobs.insert_job(
            connection, now, new_id("job"), job.tenant_id, document.id, job.version, "refine", refine_after_s
        )
    return changes.append(connection, now, job.tenant_id, "adapter_published", document.id, first.id, current)


def _insert(
    connection: sa.Connection,
    now: float,
    job: sa.Row[Any],
    adapter: NewAdapter,
    retired_at: float | None,
) -> None:
    connection.execute(
        adapters.insert().values(
            id=adapter.id,
            tenant_id=job.tenant_id,
            document_id=job.document_id,
            version=job.version,
            job_id=job.id,
            part=adapter.part,
            parts=adapter.parts,
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
            retired_at=retired_at,
        )
    )


def _check_parts(new: Sequence[NewAdapter]) -> None:
    if not new or [(one.part, one.parts) for one in new] != [(number, len(new)) for number in range(len(new))]:
        found = ", ".join(f"{one.part} of {one.parts}" for one in new) or "none"
        raise InvalidInput(f"A document's parts must be numbered from 0 and all be there, these are: {found}.")
    for one in new:
        if id_kind(one.id) != "adp" or one.state not in ("ready", "degraded"):
            raise InvalidInput("An adapter needs an ID made by new_id('adp') and the state ready or degraded.")
