"""The rule that says for which tenant a request acts."""

from __future__ import annotations

from serve.registry.records import Principal, Tenant

TENANT_HEADER = "X-Tenant-ID"


class TenantRefused(Exception):
    """The request may not act for the tenant that it names, or names none. `status` is the HTTP status, `code` a
    short word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def select_tenant(principal: Principal, header: str | None) -> Tenant:
    """The tenant that a data-plane request acts for.

    `header` is the value of `X-Tenant-ID` (a tenant's ID or name) or None. Raises TenantRefused: 403 for another
    tenant than the key's and for admin keys, 400 for a service key without the header.
    """
    if principal.scope == "admin":
        raise TenantRefused(403, "admin_key_has_no_data", "An admin key cannot read or write a tenant's data.")
    if header is None or header == "":
        if principal.scope == "service":
            raise TenantRefused(400, "tenant_required", f"A service key must name a tenant in {TENANT_HEADER}.")
        return principal.tenants[0]
    for tenant in principal.tenants:
        if header in (tenant.id, tenant.name):
            return tenant
    raise TenantRefused(403, "tenant_forbidden", f"This key does not act for the tenant named in {TENANT_HEADER}.")
