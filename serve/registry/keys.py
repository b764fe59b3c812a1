"""Tenants and API keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import sqlalchemy as sa

from serve.ids import new_id
from serve.registry.checks import check_name, check_text
from serve.registry.errors import InvalidInput, NotFound
from serve.registry.key_text import hash_key, key_id_of, new_key_text, same_hash
from serve.registry.records import ApiKey, Principal, Scope, Tenant
from serve.registry.tables import api_keys, key_tenants, tenant_heads, tenant_turns, tenants


def create_tenant(connection: sa.Connection, now: float, name: str) -> Tenant:
    """Get or make. Raises InvalidInput."""
    check_name("a tenant", name)
    found = connection.execute(sa.select(tenants).where(tenants.c.name == name)).one_or_none()
    if found is not None:
        return _tenant(found)
    tenant = Tenant(new_id("ten"), name, now)
    connection.execute(tenants.insert().values(id=tenant.id, name=name, created_at=now))
    connection.execute(tenant_heads.insert().values(tenant_id=tenant.id, seq=0))
    connection.execute(tenant_turns.insert().values(tenant_id=tenant.id, turn=0))
    return tenant


def get_tenant(connection: sa.Connection, name_or_id: str) -> Tenant | None:
    """By ID or name; the two cannot collide, for names do not look like IDs."""
    if "\x00" in name_or_id:
        return None
    query = sa.select(tenants).where(sa.or_(tenants.c.id == name_or_id, tenants.c.name == name_or_id))
    found = connection.execute(query).one_or_none()
    return None if found is None else _tenant(found)


def list_tenants(connection: sa.Connection) -> list[Tenant]:
    """All, by name."""
    return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.name))]


def lock_tenant(connection: sa.Connection, tenant_id: str) -> None:
    """Let one writer of this tenant's documents in at a time (SQLite has one writer anyhow). Raises NotFound."""
    query = sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update(key_share=True)
    if connection.execute(query).one_or_none() is None:
        raise NotFound("There is no such tenant.")


def create_key(
    connection: sa.Connection,
    now: float,
    tenant_id: str | None,
    scope: Scope,
    label: str,
    tenants_named: Sequence[str],
) -> tuple[ApiKey, str]:
    """Make a key and its text. Raises NotFound, InvalidInput."""
    if scope not in get_args(Scope):
        raise InvalidInput(f"{scope!r} is not a scope; there are {', '.join(get_args(Scope))}.")
    check_text("label", label, 200)
    named = [*([] if tenant_id is None else [tenant_id]), *tenants_named]
    if scope == "admin" and named:
        raise InvalidInput("An admin key belongs to no tenant.")
    if scope != "admin" and not named:
        raise InvalidInput(f"A {scope} key needs a tenant.")
    owners: dict[str, None] = {}
    for name in named:
        tenant = get_tenant(connection, name)
        if tenant is None:
            raise NotFound(f"There is no tenant {name[:80]!r}.")
        owners[tenant.id] = None
    if scope == "tenant" and len(owners) != 1:
        raise InvalidInput("A tenant key belongs to one tenant; a service key may name several.")
    key = ApiKey(new_id("key"), scope, label, tuple(owners), now, None)
    text = new_key_text(key.id)
    connection.execute(
        api_keys.insert().values(id=key.id, scope=scope, label=label, hash=hash_key(text), created_at=now)
    )
    for owner in owners:
        connection.execute(key_tenants.insert().values(key_id=key.id, tenant_id=owner))
    return key, text


def list_keys(connection: sa.Connection, tenant_id: str | None) -> list[ApiKey]:
    """Newest first."""
    query = sa.select(api_keys).order_by(api_keys.c.id.desc())
    if tenant_id is not None:
        owned = sa.select(key_tenants.c.key_id).where(key_tenants.c.tenant_id == tenant_id)
        query = query.where(api_keys.c.id.in_(owned))
    owners: dict[str, list[str]] = {}
    for row in connection.execute(sa.select(key_tenants).order_by(key_tenants.c.tenant_id)):
        owners.setdefault(row.key_id, []).append(row.tenant_id)
    return [_key(row, owners.get(row.id, [])) for row in connection.execute(query)]


def revoke_key(connection: sa.Connection, now: float, key_id: str) -> ApiKey | None:
    """Revoke; a second call keeps the first time."""
    connection.execute(
        api_keys.update().where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    if row is None:
        return None
    owned = sa.select(key_tenants.c.tenant_id).where(key_tenants.c.key_id == key_id).order_by(key_tenants.c.tenant_id)
    return _key(row, list(connection.execute(owned).scalars()))


def authenticate(connection: sa.Connection, text: str) -> Principal | None:
    """The key is found by the ID in its text; the secret is compared in constant time."""
    key_id = key_id_of(text)
    if key_id is None:
        return None
    row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    right = same_hash(hash_key(text), row.hash if row is not None else "")
    if row is None or not right or row.revoked_at is not None:
        return None
    query = (
        sa.select(tenants)
        .join(key_tenants, key_tenants.c.tenant_id == tenants.c.id)
        .where(key_tenants.c.key_id == key_id)
        .order_by(tenants.c.name)
    )
    return Principal(row.id, row.scope, tuple(_tenant(owner) for owner in connection.execute(query)))


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.id, row.name, row.created_at)


def _key(row: sa.Row[Any], owners: Sequence[str]) -> ApiKey:
    return ApiKey(row.id, row.scope, row.label, tuple(owners), row.created_at, row.revoked_at)
