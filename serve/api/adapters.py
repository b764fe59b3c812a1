"""`/v1/adapters`: what documents have become."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from serve.api.auth import TenantDep
from serve.api.documents import find_document
from serve.api.errors import ApiError, error_docs
from serve.api.schemas import AdapterList, AdapterObject, adapter_object
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.get("", responses=error_docs(400, 401, 403, 404))
async def list_adapters(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: str | None = None,
    document_id: Annotated[str | None, Query(description="A document's ID or external ID.")] = None,
) -> AdapterList:
    """The tenant's adapters, newest first, those of older document versions too."""
    if document_id is not None:
        document_id = (await find_document(services, tenant.id, document_id)).id
    page = await services.call(
        services.registry.list_adapters, tenant.id, limit=limit, cursor=cursor, document_id=document_id
    )
    return AdapterList(
        data=[adapter_object(adapter) for adapter in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@router.get("/{adapter_id}", responses=error_docs(401, 403, 404))
async def get_adapter(
    services: ServicesDep, tenant: TenantDep, adapter_id: Annotated[str, Path(max_length=200)]
) -> AdapterObject:
    """One adapter with its manifest."""
    adapter = await services.call(services.registry.get_adapter, tenant.id, adapter_id)
    if adapter is None:
        raise ApiError(404, f"There is no adapter '{adapter_id}'.", param="adapter_id", code="adapter_not_found")
    return adapter_object(adapter)
