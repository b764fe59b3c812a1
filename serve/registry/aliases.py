"""Names that a client may give as `model`: IDs, and aliases of its own."""

from __future__ import annotations

import sqlalchemy as sa

from serve.ids import id_kind
from serve.registry.adapters import CURRENT
from serve.registry.checks import check_name
from serve.registry.errors import InvalidInput, NotFound
from serve.registry.records import Alias, Resolution
from serve.registry.tables import adapters, aliases, collections, documents


def resolve_model(connection: sa.Connection, tenant_id: str, name: str) -> Resolution | None:
    """What a name stands for. Nothing outside the tenant is ever looked at."""
    if "\x00" in name:
        return None
    if id_kind(name) is not None:
        return _resolve_id(connection, tenant_id, name)
    query = sa.select(aliases.c.target).where(aliases.c.tenant_id == tenant_id, aliases.c.name == name)
    target = connection.execute(query).scalar_one_or_none()
    found = None if target is None else _resolve_id(connection, tenant_id, target)
    return None if found is None else Resolution("alias", found.target, found.adapter_ids)


def set_alias(connection: sa.Connection, now: float, tenant_id: str, name: str, target: str) -> Alias:
    """Make an alias or point it elsewhere. Raises InvalidInput, NotFound."""
    check_name("an alias", name)
    if id_kind(target) not in ("adp", "doc", "col"):
        raise InvalidInput("An alias stands for an adapter, document or collection ID.")
    if _resolve_id(connection, tenant_id, target) is None:
        raise NotFound(f"There is no {target}.")
    delete_alias(connection, tenant_id, name)
    connection.execute(aliases.insert().values(tenant_id=tenant_id, name=name, target=target, created_at=now))
    return Alias(tenant_id, name, target, now)


def list_aliases(connection: sa.Connection, tenant_id: str) -> list[Alias]:
    """By name."""
    query = sa.select(aliases).where(aliases.c.tenant_id == tenant_id).order_by(aliases.c.name)
    return [Alias(row.tenant_id, row.name, row.target, row.created_at) for row in connection.execute(query)]


def delete_alias(connection: sa.Connection, tenant_id: str, name: str) -> bool:
    """False when there was none."""
    mine = sa.and_(aliases.c.tenant_id == tenant_id, aliases.c.name == name)
    return connection.execute(aliases.delete().where(mine)).rowcount == 1


def _resolve_id(connection: sa.Connection, tenant_id: str, name: str) -> Resolution | None:
    kind = id_kind(name)
    live = (documents.c.tenant_id == tenant_id, documents.c.deleted_at.is_(None))
    serving = (
        sa.select(adapters.c.id)
        .join(documents, documents.c.id == adapters.c.document_id)
        .where(*live, *CURRENT)
        .order_by(adapters.c.document_id, adapters.c.part)
    )
    if kind == "adp":
        query = sa.select(adapters.c.id).where(
            adapters.c.tenant_id == tenant_id, adapters.c.id == name, adapters.c.deleted_at.is_(None)
        )
        return None if connection.execute(query).first() is None else Resolution("adapter", name, (name,))
    if kind == "doc":
        if connection.execute(sa.select(documents.c.id).where(*live, documents.c.id == name)).first() is None:
            return None
        return Resolution("document", name, tuple(connection.execute(serving.where(documents.c.id == name)).scalars()))
    if kind == "col":
        known = sa.select(collections.c.id).where(collections.c.tenant_id == tenant_id, collections.c.id == name)
        if connection.execute(known).first() is None:
            return None
        rows = connection.execute(serving.where(documents.c.collection_id == name))
        return Resolution("collection", name, tuple(rows.scalars()))
    return None
