"""Response objects of Imprint's own endpoints, and how they are made from the registry's records."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from serve.registry.records import Adapter, AdapterState, ApiKey, Document, DocumentState, Job, JobState


class JobObject(BaseModel):
    """One run of a generator for one document version. `fraction` is its progress in 0..1."""

    id: str
    object: Literal["job"] = "job"
    document_id: str
    version: int
    status: JobState
    stage: str
    fraction: float
    attempts: int
    error: str | None
    adapter_id: str | None
    created_at: float
    updated_at: float
    finished_at: float | None


class DocumentObject(BaseModel):
    """A document as it stands now. `version` is the newest one posted, `current_version` the one being served."""

    id: str
    object: Literal["document"] = "document"
    external_id: str | None
    collection: str | None
    collection_id: str | None
    title: str
    metadata: dict[str, Any]
    content_hash: str
    status: DocumentState
    version: int
    current_version: int | None
    adapter_id: str | None
    job_id: str
    created_at: float
    updated_at: float


class DocumentDetail(DocumentObject):
    """A document with its newest version's text and job."""

    text: str
    job: JobObject | None


class PostedDocument(DocumentObject):
    """The answer to POST and PUT. `created` is false when this content was there already."""

    created: bool
    job: JobObject


class DeletedDocument(BaseModel):
    """The answer to DELETE, in OpenAI's form."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: bool = True


class AdapterObject(BaseModel):
    """A published adapter. `manifest` says how it was made and what it covers."""

    id: str
    object: Literal["adapter"] = "adapter"
    document_id: str
    version: int
    job_id: str
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
    kind: Literal["router", "base", "document", "adapter", "collection", "alias"]
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
        document_id=job.document_id,
        version=job.version,
        status=job.state,
        stage=job.stage,
        fraction=job.fraction,
        attempts=job.attempts,
        error=job.error,
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
        "metadata": dict(document.metadata),
        "content_hash": document.content_hash,
        "status": document.state,
        "version": document.latest_version,
        "current_version": document.current_version,
        "adapter_id": document.adapter_id,
        "job_id": document.job_id,
        "created_at": document.created_at,
        "updated_at": document.updated_at,
    }


def adapter_object(adapter: Adapter) -> AdapterObject:
    """An adapter as clients see it: without its place in the blob store."""
    return AdapterObject(
        id=adapter.id,
        document_id=adapter.document_id,
        version=adapter.version,
        job_id=adapter.job_id,
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
