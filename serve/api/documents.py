"""`/v1/documents`: post, replace, read, list and delete documents. Their history is in `serve.api.versions`.

POST and PUT answer 202 once the version and its job are stored; from then on no crash loses them. With `?wait=SECONDS`
the answer is held until the job has ended (200) or the time is up (202).
"""

from __future__ import annotations

import time
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Path, Query, Request, Response

from serve.api.auth import TenantDep
from serve.api.errors import ApiError, error_docs
from serve.api.posts import MULTIPART_SCHEMA, DocumentPost, read_post
from serve.api.requests import documented_body
from serve.api.schemas import (
    DeletedDocument,
    DocumentDetail,
    DocumentList,
    DocumentObject,
    PostedDocument,
    ProbeObject,
    document_fields,
    job_object,
)
from serve.api.services import Services, ServicesDep
from serve.registry.records import Document, PostResult

router = APIRouter(prefix="/v1/documents", tags=["documents"])

_POLL_S = (0.02, 0.25)  # first and longest pause between looks at a job
# External IDs may hold slashes ("handbook/returns.md"), plain or escaped; servers see no difference between the two.
ONE = "/{document_id:path}"
_BODY = documented_body(DocumentPost, multipart=MULTIPART_SCHEMA)

DocumentId = Annotated[str, Path(description="A document ID, or the client's own external ID.", max_length=512)]
Wait = Annotated[float, Query(ge=0, description="Hold the answer for up to this many seconds until the job has ended.")]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", max_length=255, description="Repeating a POST with the same key changes nothing."),
]


@router.post("", status_code=202, openapi_extra=_BODY, responses={
    200: {"model": PostedDocument, "description": "The job has ended, or this content was there already"},
    **error_docs(400, 401, 403, 409, 413, 415),
})
async def post_document(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: TenantDep,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> PostedDocument:
    """Store a document and queue the making of its adapter. A known `external_id` adds a version to its document."""
    check_wait(services, wait)
    post = await _read(request, services)
    result = await services.call(
        services.registry.post_document,
        tenant.id,
        post.title,
        post.text,
        external_id=post.external_id,
        collection=post.collection,
        metadata=post.metadata,
        mode=post.mode,
        probes=[probe.model_dump() for probe in post.probes or ()],
        idempotency_key=idempotency_key,
    )
    return await _posted(services, response, result, wait)


@router.put(ONE, status_code=202, openapi_extra=_BODY, responses={
    200: {"model": PostedDocument, "description": "The job has ended, or this content was there already"},
    **error_docs(400, 401, 403, 404, 409, 413, 415),
})
async def put_document(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: TenantDep,
    document_id: DocumentId,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> PostedDocument:
    """Store a new version of a document; the version before it is served until the new one is ready."""
    check_wait(services, wait)
    found = await find_document(services, tenant.id, document_id)
    post = await _read(request, services)
    if post.external_id not in (None, found.external_id):
        raise ApiError(400, "A document's 'external_id' cannot be changed.", param="external_id", code="invalid_value")
    result = await services.call(
        services.registry.post_document,
        tenant.id,
        post.title,
        post.text,
        collection=post.collection,
        metadata=post.metadata,
        mode=post.mode,
        probes=[probe.model_dump() for probe in post.probes or ()],
        document_id=found.id,
        idempotency_key=idempotency_key,
    )
    return await _posted(services, response, result, wait)


@router.get("", responses=error_docs(400, 401, 403, 404))
async def list_documents(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: str | None = None,
    collection: Annotated[str | None, Query(description="Name or ID of a collection.")] = None,
) -> DocumentList:
    """The tenant's documents, newest first."""
    collection_id = None if collection is None else await find_collection(services, tenant.id, collection)
    page = await services.call(
        services.registry.list_documents, tenant.id, limit=limit, cursor=cursor, collection_id=collection_id
    )
    return DocumentList(
        data=[DocumentObject(**document_fields(document)) for document in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@router.get(ONE, responses=error_docs(400, 401, 403, 404))
async def get_document(
    services: ServicesDep, tenant: TenantDep, document_id: DocumentId, wait: Wait = 0
) -> DocumentDetail:
    """A document with its text, probes and job: of the newest version, or the one that it was rolled back to."""
    check_wait(services, wait)
    document = await find_document(services, tenant.id, document_id)
    if wait and document.state == "processing":
        document = await wait_for_document(services, document, wait)
    version = await services.call(services.registry.get_version, tenant.id, document.id, document.version)
    job = await services.call(services.registry.get_job, tenant.id, document.job_id)
    if version is None:
        raise _not_found(document_id)
    return DocumentDetail(
        **document_fields(document),
        text=version.text,
        probes=[ProbeObject(question=probe["question"] or "", answer=probe["answer"]) for probe in version.probes],
        job=None if job is None else job_object(job),
    )


@router.delete(ONE, responses=error_docs(401, 403, 404))
async def delete_document(services: ServicesDep, tenant: TenantDep, document_id: DocumentId) -> DeletedDocument:
    """Remove a document, all its versions and adapters. Requests that come after the answer do not find them."""
    document = await find_document(services, tenant.id, document_id)
    event = await services.call(services.registry.delete_document, tenant.id, document.id)
    if event is None:
        raise _not_found(document_id)
    return DeletedDocument(id=document.id)


async def find_document(services: Services, tenant_id: str, document_id: str) -> Document:
    """A live document of this tenant. Raises ApiError 404."""
    document = await services.call(services.registry.get_document, tenant_id, document_id)
    if document is None:
        raise _not_found(document_id)
    return document


async def find_collection(services: Services, tenant_id: str, name_or_id: str) -> str:
    """The ID of a collection of this tenant. Raises ApiError 404."""
    for collection in await services.call(services.registry.list_collections, tenant_id):
        if name_or_id in (collection.id, collection.name):
            return collection.id
    raise ApiError(404, f"There is no collection '{name_or_id}'.", param="collection", code="collection_not_found")


def check_wait(services: Services, wait: float) -> None:
    """Raise ApiError 400 for a wait that is longer than this server allows, or that is no number."""
    longest = services.config.limits.max_wait_s
    if not wait <= longest:
        raise ApiError(400, f"'wait' may be at most {longest:g} seconds.", param="wait", code="invalid_value")


async def _read(request: Request, services: Services) -> DocumentPost:
    """The request's document. Raises ApiError, also for a mode that this server is not configured for."""
    post = await read_post(request, services.config.limits)
    if post.mode == "task" and not services.config.generator.task.checkpoint:
        message = ("'mode' is 'task', but this server has no Text-to-LoRA checkpoint (generator.task.checkpoint); "
                   "'document' is allowed.")
        raise ApiError(400, message, param="mode", code="invalid_value")
    return post


async def _posted(services: Services, response: Response, result: PostResult, wait: float) -> PostedDocument:
    services.metrics.documents.labels("created" if result.created else "existing").inc()
    document, job = result.document, result.job
    if wait and job.state in ("queued", "running"):
        document = await wait_for_document(services, document, wait)
        found = await services.call(services.registry.get_job, document.tenant_id, job.id)
        job = found or job
    response.status_code = 202 if job.state in ("queued", "running") else 200
    return PostedDocument(**document_fields(document), created=result.created, job=job_object(job))


async def wait_for_document(services: Services, document: Document, seconds: float) -> Document:
    """The document as it is when its newest job has ended or the time is up. Raises ApiError 404 if it is deleted."""
    deadline = time.monotonic() + seconds
    pause, longest = _POLL_S
    while document.state == "processing" and (left := deadline - time.monotonic()) > 0:
        await anyio.sleep(min(pause, left))
        pause = min(pause * 1.5, longest)
        document = await find_document(services, document.tenant_id, document.id)
    return document


def _not_found(document_id: str) -> ApiError:
    return ApiError(404, f"There is no document '{document_id}'.", param="document_id", code="document_not_found")
