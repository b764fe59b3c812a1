"""`GET /v1/models`: what may stand in `model`, for this tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Path

from serve.api.auth import TenantDep
from serve.api.embeddings import EMBEDDING_MODEL
from serve.api.errors import ApiError, error_docs
from serve.api.schemas import ModelList, ModelObject
from serve.api.selection import BASE, ROUTED
from serve.api.services import ServicesDep
from serve.registry import Registry
from serve.registry.records import Tenant

router = APIRouter(prefix="/v1/models", tags=["models"])

_OWNER = "imprint"
_PAGE = 100
# Not in the list, since clients offer what stands there for chat.
_ENCODER = ModelObject(id=EMBEDDING_MODEL, created=0, owned_by=_OWNER, kind="embedding")


@router.get("", responses=error_docs(400, 401, 403))
async def list_models(services: ServicesDep, tenant: TenantDep) -> ModelList:
    """`imprint`, `base`, and the tenant's collections, aliases, and documents with their current adapters."""
    return ModelList(data=await services.call(lambda: [*_built_in(), *_owned(services.registry, tenant)]))


@router.get("/{model}", responses=error_docs(400, 401, 403, 404))
async def get_model(
    services: ServicesDep, tenant: TenantDep, model: Annotated[str, Path(max_length=512)]
) -> ModelObject:
    """One model by name."""
    for built_in in (*_built_in(), _ENCODER):
        if built_in.id == model:
            return built_in
    resolution = await services.call(services.registry.resolve_model, tenant.id, model)
    if resolution is None:
        raise ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    return ModelObject(id=model, created=0, owned_by=tenant.name, kind=resolution.kind)


def _built_in() -> list[ModelObject]:
    return [
        ModelObject(id=ROUTED, created=0, owned_by=_OWNER, kind="router"),
        ModelObject(id=BASE, created=0, owned_by=_OWNER, kind="base"),
    ]


def _owned(registry: Registry, tenant: Tenant) -> Iterator[ModelObject]:
    for collection in registry.list_collections(tenant.id):
        yield ModelObject(
            id=collection.id,
            created=int(collection.created_at),
            owned_by=tenant.name,
            kind="collection",
            title=collection.name,
        )
    for alias in registry.list_aliases(tenant.id):
        yield ModelObject(id=alias.name, created=int(alias.created_at), owned_by=tenant.name, kind="alias")
    cursor = None
    while True:
        page = registry.list_documents(tenant.id, limit=_PAGE, cursor=cursor)
        for document in page.items:
            if not document.adapter_ids:
                continue
            fields = {"owned_by": tenant.name, "title": document.title}
            yield ModelObject(id=document.id, created=int(document.created_at), kind="document", **fields)
            for adapter_id in document.adapter_ids:
                yield ModelObject(id=adapter_id, created=int(document.updated_at), kind="adapter", **fields)
        cursor = page.next_cursor
        if cursor is None:
            return
