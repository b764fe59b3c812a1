"""`/v1/keys`: make, list and revoke keys, with an admin key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from serve.api.auth import AdminDep
from serve.api.bodies import read_model
from serve.api.errors import ApiError, error_docs
from serve.api.requests import KeyPost, documented_body
from serve.api.schemas import CreatedKey, KeyList, KeyObject, key_fields
from serve.api.services import ServicesDep
from serve.registry import Registry
from serve.registry.records import ApiKey

router = APIRouter(prefix="/v1/keys", tags=["operation"])


@router.post(
    "", status_code=201, openapi_extra=documented_body(KeyPost), responses=error_docs(400, 401, 403, 404, 413, 415)
)
async def create_key(request: Request, services: ServicesDep, _: AdminDep) -> CreatedKey:
    """Make a key. Its secret is in this answer and nowhere else."""
    post = await read_model(request, services.config.limits.max_request_bytes, KeyPost)
    if (post.scope == "tenant") != (post.tenant is not None):
        raise ApiError(400, "A tenant key, and no other, names its tenant in 'tenant'.", param="tenant")
    if (post.scope == "service") != bool(post.tenants):
        raise ApiError(400, "A service key, and no other, names its tenants in 'tenants'.", param="tenants")
    key, secret = await services.call(_create, services.registry, post)
    return CreatedKey(**key_fields(key), secret=secret)


@router.get("", responses=error_docs(401, 403))
async def list_keys(services: ServicesDep, _: AdminDep) -> KeyList:
    """All keys, revoked ones too, without secrets."""
    keys = await services.call(services.registry.list_keys)
    return KeyList(data=[KeyObject(**key_fields(key)) for key in keys])


@router.delete("/{key_id}", responses=error_docs(401, 403, 404))
async def revoke_key(
    services: ServicesDep, _: AdminDep, key_id: Annotated[str, Path(max_length=200)]
) -> KeyObject:
    """Revoke a key at once and for good."""
    key = await services.call(services.registry.revoke_key, key_id)
    if key is None:
        raise ApiError(404, f"There is no key '{key_id}'.", param="key_id", code="key_not_found")
    return KeyObject(**key_fields(key))


def _create(registry: Registry, post: KeyPost) -> tuple[ApiKey, str]:
    names = [post.tenant] if post.tenant is not None else post.tenants
    tenants = [(registry.get_tenant(name) or registry.create_tenant(name)).id for name in names]
    if post.scope == "tenant":
        return registry.create_key(tenants[0], "tenant", post.label)
    return registry.create_key(None, post.scope, post.label, tenants=tenants)
