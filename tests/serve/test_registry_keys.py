"""Tenants, keys, IDs."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.ids import ID_KINDS, id_kind, looks_typed, new_id
from serve.registry import InvalidInput, NotFound, Registry, migrate
from tests.serve.registry_helpers import clock, registry, url  # noqa: F401

# ruff: noqa: F811


def test_ids_are_typed_unique_and_in_order() -> None:
    made = [new_id("doc") for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert all(id_kind(one) == "doc" and len(one) == 30 for one in made)
    assert [one[:14] for one in made] == sorted(one[:14] for one in made)
    assert {id_kind(new_id(kind)) for kind in ID_KINDS} == set(ID_KINDS)  # type: ignore[arg-type]
    assert id_kind("doc_short") is None and looks_typed("doc_short") and not looks_typed("docs-v3")


def test_tenants_are_made_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: registry.create_tenant("acme"), range(16)))
    assert len({tenant.id for tenant in made}) == 1
    assert registry.get_tenant("acme") == registry.get_tenant(made[0].id) == made[0]
    assert registry.get_tenant("nobody") is None and registry.get_tenant("a\x00") is None
    other = registry.create_tenant("Aardvark.co")  # before "acme" in the order of bytes and of English
    assert [tenant.name for tenant in registry.list_tenants()] == sorted(["acme", other.name])


@pytest.mark.parametrize("bad", ["", " ", "a b", "-x", "ten_abc", "imprint", "Base", "x" * 65, "ü", "a/b", "a\n"])
def test_bad_tenant_names(registry: Registry, bad: str) -> None:
    with pytest.raises(InvalidInput):
        registry.create_tenant(bad)


def test_keys_of_each_scope(registry: Registry) -> None:
    acme, beta = registry.create_tenant("acme"), registry.create_tenant("beta")
    key, text = registry.create_key(acme.id, "tenant", "laptop")
    principal = registry.authenticate(text)
    assert principal is not None
    assert (principal.key_id, principal.scope, principal.tenants) == (key.id, "tenant", (acme,))
    service, service_text = registry.create_key(None, "service", "app", tenants=["beta", acme.id, "acme"])
    assert set(service.tenant_ids) == {acme.id, beta.id}
    found = registry.authenticate(service_text)
    assert found is not None and found.tenants == (acme, beta)
    admin, admin_text = registry.create_key(None, "admin", "root")
    found = registry.authenticate(admin_text)
    assert found is not None and found.scope == "admin" and found.tenants == ()
    assert [one.id for one in registry.list_keys()] == [admin.id, service.id, key.id]
    assert [one.id for one in registry.list_keys(beta.id)] == [service.id]


def test_wrong_combinations(registry: Registry) -> None:
    acme = registry.create_tenant("acme")
    registry.create_tenant("beta")
    for arguments in [(None, "tenant"), (None, "service"), (acme.id, "admin"), (acme.id, "root")]:
        with pytest.raises(InvalidInput):
            registry.create_key(*arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        registry.create_key(acme.id, "tenant", tenants=["beta"])
    with pytest.raises(NotFound):
        registry.create_key(None, "service", tenants=["acme", "nobody"])
    assert registry.list_keys() == []


def test_revoked_and_wrong_keys_fail_at_once(registry: Registry) -> None:
    acme = registry.create_tenant("acme")
    key, text = registry.create_key(acme.id, "tenant")
    _, other = registry.create_key(acme.id, "tenant")
    prefix, public, secret = text.split("_")
    swapped = f"{prefix}_{public}_{other.split('_')[2]}"
    last = "A" if text[-1] != "A" else "B"
    wrong = [
        "",
        "imp",
        "imp__",
        "x",
        text[:-1],
        text + "A",
        text[:-1] + last,
        text.upper(),
        f" {text}",
        text + "\n",
        swapped,
        f"imp_{public}_",
        f"imp_{public}_é",
        f"sk_{public}_{secret}",
        "imp_a\x00b_c",
        "imp_\ud800_x",
    ]
    assert [registry.authenticate(one) for one in wrong] == [None] * len(wrong)
    assert registry.authenticate(text) is not None
    revoked = registry.revoke_key(key.id)
    assert revoked is not None and revoked.revoked_at is not None
    assert registry.authenticate(text) is None
    assert registry.revoke_key(key.id) == revoked
    assert registry.revoke_key(new_id("key")) is None
    assert registry.authenticate(other) is not None


def test_key_texts_are_not_stored_and_carry_256_bits(tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path}/r.db")
    registry = Registry.open(f"sqlite:///{tmp_path}/r.db")
    key, text = registry.create_key(None, "admin")
    secret = text.split("_")[2]
    assert len(secret) == 43 and secret.isalnum()
    assert secret not in repr(key) and secret not in repr(registry.authenticate(text))
    registry.close()
    dump = "\n".join(sqlite3.connect(tmp_path / "r.db").iterdump())
    assert key.id in dump and secret not in dump
