"""Who a request comes from and which tenant it acts for, as FastAPI dependencies."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve.api.errors import ApiError
from serve.api.services import ServicesDep
from serve.registry.records import Principal, Tenant
from serve.tenants import TENANT_HEADER, select_tenant

bearer = HTTPBearer(auto_error=False, description="An Imprint key, `imp_…`.", scheme_name="ImprintKey")


async def authenticate(
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> Principal:
    """The key's holder. Raises ApiError 401 for a missing, malformed, unknown or revoked key."""
    if credentials is None:
        raise _unauthenticated("Send a key as 'Authorization: Bearer imp_…'.", "missing_api_key")
    principal = await services.read(services.registry.authenticate, credentials.credentials)
    if principal is None:
        raise _unauthenticated("The key in 'Authorization' is not valid; it may have been revoked.", "invalid_api_key")
    return principal


PrincipalDep = Annotated[Principal, Depends(authenticate)]


async def select(
    principal: PrincipalDep,
    header: Annotated[
        str | None,
        Header(
            alias=TENANT_HEADER,
            description="Tenant name or ID. A service key must send it; a tenant key may name its own tenant only.",
        ),
    ] = None,
) -> Tenant:
    """The tenant of a data-plane request. Raises TenantRefused 400 or 403."""
    return select_tenant(principal, header)


async def require_admin(principal: PrincipalDep) -> Principal:
    """An operator. Raises ApiError 403 for tenants' and services' keys."""
    if principal.scope != "admin":
        raise ApiError(403, "This needs an admin key.", param="Authorization", code="admin_key_required")
    return principal


TenantDep = Annotated[Tenant, Depends(select)]
AdminDep = Annotated[Principal, Depends(require_admin)]


def _unauthenticated(message: str, code: str) -> ApiError:
    return ApiError(401, message, param="Authorization", code=code, headers={"WWW-Authenticate": "Bearer"})
