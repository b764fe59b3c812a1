"""Response objects of Imprint's own endpoints, and how they are made from the registry's records."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from serve.registry.records import (
    Adapter,
    AdapterState,
    ApiKey,
    Document,
    DocumentMode,
    DocumentState,
    Job,
    JobKind,
    JobState,
    VersionState,
    VersionSummary,
)


class JobObject(BaseModel):
    """One run for one document version. `fraction` is its progress in 0..1.

    A `generate` job makes the version's adapters, a `refine` job improves them in the background. `note` says why a
    job ended without new adapters although nothing failed.
    """

    id: str
    object: Literal["job"] = "job"
    kind: JobKind
    document_id: str
    version: int
    status: JobState
    stage: str
    fraction: float
    attempts: int
    error: str | None
    note: str | None
    adapter_id: str | None
    created_at: float
    updated_at: float
    finished_at: float | None


class DocumentObject(BaseModel):
    """A document as it stands now. `version` is the one that is to be served: the newest, or the one that the document
    was rolled back to; title, mode, content hash, job and status are its own. `current_version` is the one being
    served, another one while the adapters of `version` are being made. `latest_version` is the newest one posted.

    `adapter_ids` are the adapters of its parts, in order; `adapter_id` is the first. `degraded_parts` are the numbers,
    from 0, of the parts that did not pass the quality gate: `manifest.gate` of the adapter says why. A document is
    `degraded` when none passed.
    """

    id: str
    object: Literal["document"] = "document"
    external_id: str | None
    collection: str | None
    collection_id: str | None
    title: str
    mode: DocumentMode
    metadata: dict[str, Any]
    content_hash: str
    status: DocumentState
    version: int
    latest_version: int
    current_version: int | None
    adapter_id: str | None
    adapter_ids: list[str]
    degraded_parts: list[int]
    job_id: str
    created_at: float
    updated_at: float


class ProbeObject(BaseModel):
    """A question that the quality gate asks of the adapter; without an answer, what the base model says about the
    text is the reference."""

    question: str
    answer: str | None


class DocumentDetail(DocumentObject):
    """A document with the text, probes (the client's own) and job of `version`."""

    text: str
    probes: list[ProbeObject]
    job: JobObject | None


class PostedDocument(DocumentObject):
    """The answer to POST and PUT. `created` is false when this content was there already."""

    created: bool
    job: JobObject


class RolledBackDocument(DocumentObject):
    """The answer to a rollback. `job` has made the version's adapters, or is making them anew."""

    job: JobObject


class VersionObject(BaseModel):
    """One version of a document. `adapter_ids` are the adapters that it had last, `current` says that they are served.

    `ready` and `degraded` versions can be served at once by a rollback; `stale` ones, made for another base model or
    hypernetwork, and `failed` ones are generated again first.
    """

    object: Literal["document.version"] = "document.version"
    document_id: str
    version: int
    title: str
    mode: DocumentMode
    content_hash: str
    size_bytes: int
    status: VersionState
    current: bool
    adapter_ids: list[str]
    job_id: str | None
    created_at: float


class DeletedDocument(BaseModel):
    """The answer to DELETE, in OpenAI's form."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: bool = True


class AdapterObject(BaseModel):
    """A published adapter: `part` of `parts` of its document, counted from 0.

    `manifest` says how it was made, what it covers and, as `gate`, how it did in the quality gate.
    """

    id: str
    object: Literal["adapter"] = "adapter"
    document_id: str
    version: int
    job_id: str
    part: int
    parts: int
    kind: str
    status: AdapterState
    current: bool
    rank: int
    alpha: float
    target_modules: list[str]
    checksum: str
    size_bytes: int
    base_fingerprint: str
    generator_fingerprint: str
    manifest: dict[str, Any]
    created_at: float


class DocumentList(BaseModel):
    """One page, newest first; pass `next_cursor` as `cursor` for the next page."""

    object: Literal["list"] = "list"
    data: list[DocumentObject]
    has_more: bool
    next_cursor: str | None


class VersionList(BaseModel):
    """One page, newest first; pass `next_cursor` as `cursor` for the next page."""

    object: Literal["list"] = "list"
    data: list[VersionObject]
    has_more: bool
    next_cursor: str | None


class AdapterList(BaseModel):
    """One page, newest first; pass `next_cursor` as `cursor` for the next page."""

    object: Literal["list"] = "list"
    data: list[AdapterObject]
    has_more: bool
    next_cursor: str | None


class ModelObject(BaseModel):
    """Something that may stand in `model`: `imprint`, `base`, or a tenant's document, adapter, collection or alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["router", "base", "embedding", "document", "adapter", "collection", "alias"]
    title: str | None = None


class ModelList(BaseModel):
    """All models of one tenant."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class KeyObject(BaseModel):
    """A key without its secret."""

    id: str
    object: Literal["key"] = "key"
    scope: Literal["tenant", "service", "admin"]
    label: str
    tenant_ids: list[str]
    created_at: float
    revoked_at: float | None


class CreatedKey(KeyObject):
    """A new key; `secret` is shown this once."""

    secret: str


class KeyList(BaseModel):
    """All keys, newest first."""

    object: Literal["list"] = "list"
    data: list[KeyObject]


def job_object(job: Job) -> JobObject:
    """A job as clients see it: without worker and lease."""
    return JobObject(
        id=job.id,
        kind=job.kind,
        document_id=job.document_id,
        version=job.version,
        status=job.state,
        stage=job.stage,
        fraction=job.fraction,
        attempts=job.attempts,
        error=job.error,
        note=job.note,
        adapter_id=job.adapter_id,
        created_at=job.created_at,
        updated_at=job.updated_at,
        finished_at=job.finished_at,
    )


def document_fields(document: Document) -> dict[str, Any]:
    """The fields that all document objects share."""
    return {
        "id": document.id,
        "external_id": document.external_id,
        "collection": document.collection,
        "collection_id": document.collection_id,
        "title": document.title,
        "mode": document.mode,
        "metadata": dict(document.metadata),
        "content_hash": document.content_hash,
        "status": document.state,
        "version": document.version,
        "latest_version": document.latest_version,
        "current_version": document.current_version,
        "adapter_id": document.adapter_id,
        "adapter_ids": list(document.adapter_ids),
        "degraded_parts": list(document.degraded_parts),
        "job_id": document.job_id,
        "created_at": document.created_at,
        "updated_at": document.updated_at,
    }


def version_object(version: VersionSummary) -> VersionObject:
    """A version as clients see it."""
    return VersionObject(
        document_id=version.document_id,
        version=version.number,
        title=version.title,
        mode=version.mode,
        content_hash=version.content_hash,
        size_bytes=version.size_bytes,
        status=version.state,
        current=version.current,
        adapter_ids=list(version.adapter_ids),
        job_id=version.job_id,
        created_at=version.created_at,
    )


def adapter_object(adapter: Adapter) -> AdapterObject:
    """An adapter as clients see it: without its place in the blob store."""
    return AdapterObject(
        id=adapter.id,
        document_id=adapter.document_id,
        version=adapter.version,
        job_id=adapter.job_id,
        part=adapter.part,
        parts=adapter.parts,
        kind=adapter.kind,
        status=adapter.state,
        current=adapter.retired_at is None and adapter.state != "deleted",
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=list(adapter.target_modules),
        checksum=adapter.checksum,
        size_bytes=adapter.size_bytes,
        base_fingerprint=adapter.base_fingerprint,
        generator_fingerprint=adapter.generator_fingerprint,
        manifest=dict(adapter.manifest),
        created_at=adapter.created_at,
    )


def key_fields(key: ApiKey) -> dict[str, Any]:
    """The fields of a key object."""
    return {
        "id": key.id,
        "scope": key.scope,
        "label": key.label,
        "tenant_ids": list(key.tenant_ids),
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }
