"""The change log: what routers and engines follow."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from serve.registry.checks import check_limit
from serve.registry.records import ChangeEvent, EventKind
from serve.registry.tables import change_events, tenant_heads


def head(connection: sa.Connection, tenant_id: str) -> int:
    """The newest number, 0 for none (also for a tenant that does not exist)."""
    query = sa.select(tenant_heads.c.seq).where(tenant_heads.c.tenant_id == tenant_id)
    return connection.execute(query).scalar_one_or_none() or 0


def append(
    connection: sa.Connection,
    now: float,
    tenant_id: str,
    kind: EventKind,
    document_id: str,
    adapter_id: str | None = None,
    retired: Sequence[str] = (),
) -> ChangeEvent:
    """Write the next event in the caller's transaction.

    The counter row stays locked until that commits, so no event can become visible before one with a smaller number.
    Call it last: every later writer of this tenant waits from here on.
    """
    counter = tenant_heads.c.tenant_id == tenant_id
    connection.execute(tenant_heads.update().where(counter).values(seq=tenant_heads.c.seq + 1))
    seq = connection.execute(sa.select(tenant_heads.c.seq).where(counter)).scalar_one()
    event = ChangeEvent(tenant_id, seq, kind, adapter_id, document_id, tuple(retired), now)
    connection.execute(
        change_events.insert().values(
            tenant_id=tenant_id,
            seq=seq,
            kind=kind,
            adapter_id=adapter_id,
            document_id=document_id,
            retired_adapter_ids=list(retired),
            created_at=now,
        )
    )
    return event


def changes_since(connection: sa.Connection, tenant_id: str, seq: int, limit: int) -> list[ChangeEvent]:
    """Events with larger numbers, oldest first."""
    query = (
        sa.select(change_events)
        .where(change_events.c.tenant_id == tenant_id, change_events.c.seq > seq)
        .order_by(change_events.c.seq)
        .limit(check_limit(limit))
    )
    return [
        ChangeEvent(
            row.tenant_id,
            row.seq,
            row.kind,
            row.adapter_id,
            row.document_id,
            tuple(row.retired_adapter_ids),
            row.created_at,
        )
        for row in connection.execute(query)
    ]
