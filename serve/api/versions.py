"""`/v1/documents/{id}/versions` and `/rollback`: a document's history, and going back to an earlier version.

A rollback whose adapters are still there is one transaction: the next request is answered by them (200). Otherwise
the version's adapters are made again, while what is served stays (202).
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from serve.api.auth import TenantDep
from serve.api.bodies import media_type, parse_json, read_body, validate
from serve.api.documents import ONE, DocumentId, Wait, check_wait, find_document, wait_for_document
from serve.api.errors import ApiError, error_docs
from serve.api.requests import documented_body
from serve.api.schemas import RolledBackDocument, VersionList, document_fields, job_object, version_object
from serve.api.services import ServicesDep
from serve.registry import Conflict, VersionNotFound

router = APIRouter(prefix="/v1/documents", tags=["documents"])

_BODY_BYTES = 4096


class RollbackPost(BaseModel):
    """Which version to go back to."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt | None = Field(
        None,
        ge=1,
        description="The version to serve; by default the newest one before the document's `version` that can be "
        "served at once. A later version is allowed too.",
    )


_BODY = documented_body(RollbackPost)
_BODY["requestBody"]["required"] = False


@router.get(f"{ONE}/versions", responses=error_docs(400, 401, 403, 404))
async def list_versions(
    services: ServicesDep,
    tenant: TenantDep,
    document_id: DocumentId,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: str | None = None,
) -> VersionList:
    """A document's versions, newest first, and which of them a rollback can serve at once."""
    document = await find_document(services, tenant.id, document_id)
    page = await services.call(services.registry.list_versions, tenant.id, document.id, limit=limit, cursor=cursor)
    return VersionList(
        data=[version_object(version) for version in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@router.post(f"{ONE}/rollback", openapi_extra=_BODY, responses={
    202: {"model": RolledBackDocument, "description": "The version's adapters are being made again"},
    **error_docs(400, 401, 403, 404, 409, 413, 415),
})
async def roll_back(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: TenantDep,
    document_id: DocumentId,
    wait: Wait = 0,
) -> RolledBackDocument:
    """Serve another version of a document again. The next request is answered by the adapters that it had last.

    Where these are gone or stale they are made again (202), while what is served now stays. Generation that waits for
    later versions is cancelled; what is being generated does not become current. A later PUT makes a new version."""
    check_wait(services, wait)
    version = (await _read(request)).version
    document = await find_document(services, tenant.id, document_id)
    try:
        done = await services.call(services.registry.rollback_document, tenant.id, document.id, version)
    except VersionNotFound as error:
        raise ApiError(404, str(error), param="version", code="version_not_found") from error
    except Conflict as error:
        raise ApiError(409, str(error), param="version", code="no_earlier_version") from error
    document, job = done.document, done.job
    if wait and job.state in ("queued", "running"):
        document = await wait_for_document(services, document, wait)
        found = await services.call(services.registry.get_job, tenant.id, job.id)
        job = found or job
    response.status_code = 202 if job.state in ("queued", "running") else 200
    return RolledBackDocument(**document_fields(document), job=job_object(job))


async def _read(request: Request) -> RollbackPost:
    """The request's body, which may be left out. Raises ApiError 400, 413 or 415."""
    raw = await read_body(request, _BODY_BYTES)
    if not raw:
        return RollbackPost()
    content_type = media_type(request)
    if content_type not in ("application/json", ""):
        raise ApiError(415, f"Content-Type must be application/json, not {content_type}.", param="Content-Type")
    return validate(RollbackPost, parse_json(raw))
