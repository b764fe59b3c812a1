"""Which tenant a request acts for."""

from __future__ import annotations

import pytest

from serve.registry.records import Principal, Tenant
from serve.tenants import TenantRefused, select_tenant

ACME, BETA = Tenant("ten_a", "acme", 0.0), Tenant("ten_b", "beta", 0.0)


def test_a_tenant_key_needs_no_header_and_takes_only_its_own() -> None:
    principal = Principal("key_1", "tenant", (ACME,))
    assert [select_tenant(principal, header) for header in (None, "", "acme", "ten_a")] == [ACME] * 4
    for other in ("beta", "ten_b", "nobody", "ACME"):
        with pytest.raises(TenantRefused) as caught:
            select_tenant(principal, other)
        assert caught.value.status == 403


def test_a_service_key_must_name_one_of_its_tenants() -> None:
    principal = Principal("key_1", "service", (ACME, BETA))
    assert select_tenant(principal, "beta") == select_tenant(principal, "ten_b") == BETA
    for header, status in ((None, 400), ("", 400), ("gamma", 403)):
        with pytest.raises(TenantRefused) as caught:
            select_tenant(principal, header)
        assert caught.value.status == status


def test_a_service_key_of_one_tenant_still_needs_the_header() -> None:
    with pytest.raises(TenantRefused) as caught:
        select_tenant(Principal("key_1", "service", (ACME,)), None)
    assert caught.value.status == 400


def test_an_admin_key_has_no_data_plane() -> None:
    for header in (None, "acme"):
        with pytest.raises(TenantRefused) as caught:
            select_tenant(Principal("key_1", "admin", ()), header)
        assert caught.value.status == 403
