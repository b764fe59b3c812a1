"""`GET /v1/jobs/{id}`: how far the making of an adapter is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from serve.api.auth import TenantDep
from serve.api.errors import ApiError, error_docs
from serve.api.schemas import JobObject, job_object
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1/jobs", tags=["documents"])


@router.get("/{job_id}", responses=error_docs(401, 403, 404))
async def get_job(
    services: ServicesDep, tenant: TenantDep, job_id: Annotated[str, Path(max_length=200)]
) -> JobObject:
    """One job."""
    job = await services.call(services.registry.get_job, tenant.id, job_id)
    if job is None:
        raise ApiError(404, f"There is no job '{job_id}'.", param="job_id", code="job_not_found")
    return job_object(job)
