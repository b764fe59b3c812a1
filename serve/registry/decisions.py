"""Routing decisions: the newest of each tenant, for feedback, dry runs of policies and suggested documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.registry.checks import check_limit
from serve.registry.records import RecordedDecision
from serve.registry.tables import decisions, documents

KEPT = 2000
"""Of each tenant."""


def record(connection: sa.Connection, rows: Sequence[RecordedDecision], kept: int = KEPT) -> None:
    """Store a batch; of each tenant concerned the newest `kept` stay. Titles of candidates are left out."""
    if rows:
        connection.execute(decisions.insert(), [_values(row) for row in rows])
    for tenant_id in {row.tenant_id for row in rows}:
        mine = decisions.c.tenant_id == tenant_id
        oldest = sa.select(decisions.c.created_at).where(mine).order_by(decisions.c.created_at.desc())
        limit = connection.execute(oldest.offset(kept).limit(1)).scalar_one_or_none()
        if limit is not None:
            connection.execute(decisions.delete().where(mine, decisions.c.created_at <= limit))


def recent(connection: sa.Connection, tenant_id: str, limit: int) -> list[RecordedDecision]:
    """Newest first. Candidates have their documents' present titles, empty where the document is gone."""
    query = sa.select(decisions).where(decisions.c.tenant_id == tenant_id)
    order = query.order_by(decisions.c.created_at.desc(), decisions.c.response_id)
    rows = connection.execute(order.limit(check_limit(limit))).all()
    return [_decision(row, titles) for titles in [_titles(connection, tenant_id, rows)] for row in rows]


def get(connection: sa.Connection, tenant_id: str, response_id: str) -> RecordedDecision | None:
    """A tenant's own decision."""
    query = sa.select(decisions).where(decisions.c.tenant_id == tenant_id, decisions.c.response_id == response_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else _decision(row, _titles(connection, tenant_id, [row]))


def forget_document(connection: sa.Connection, tenant_id: str, document_id: str) -> None:
    """Drop decisions that a document answered: their questions tell of it."""
    connection.execute(
        decisions.delete().where(decisions.c.tenant_id == tenant_id, decisions.c.document_id == document_id)
    )


def _titles(connection: sa.Connection, tenant_id: str, rows: Sequence[sa.Row[Any]]) -> dict[Any, str]:
    if not any(row.candidates for row in rows):
        return {}
    live = sa.select(documents.c.id, documents.c.title)
    live = live.where(documents.c.tenant_id == tenant_id, documents.c.deleted_at.is_(None))
    named = {one.get("document_id") for row in rows for one in row.candidates}
    if len(named) <= 500:  # databases bound the number of parameters of a query
        live = live.where(documents.c.id.in_(named))
    return {row.id: row.title for row in connection.execute(live)}


def _values(row: RecordedDecision) -> dict[str, Any]:
    return {
        "response_id": row.response_id,
        "tenant_id": row.tenant_id,
        "created_at": row.created_at,
        "model": row.model.replace("\x00", ""),
        "text": row.text.replace("\x00", ""),
        "headers": dict(row.headers),
        "candidates": [{k: v for k, v in candidate.items() if k != "title"} for candidate in row.candidates],
        "adapter_id": row.adapter_id,
        "document_id": row.document_id,
        "reason": row.reason,
        "confidence": row.confidence,
    }


def _decision(row: sa.Row[Any], titles: dict[Any, str]) -> RecordedDecision:
    return RecordedDecision(
        response_id=row.response_id,
        tenant_id=row.tenant_id,
        created_at=row.created_at,
        model=row.model,
        text=row.text,
        headers=row.headers,
        candidates=[{**one, "title": titles.get(one.get("document_id"), "")} for one in row.candidates],
        adapter_id=row.adapter_id,
        document_id=row.document_id,
        reason=row.reason,
        confidence=row.confidence,
    )
