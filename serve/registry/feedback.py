"""What clients say about answers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from serve.registry import decisions
from serve.registry.checks import check_limit, check_text
from serve.registry.errors import InvalidInput, NotFound
from serve.registry.records import Feedback, NewFeedback
from serve.registry.tables import documents, feedback

KEPT = 1000
"""Of each tenant."""
ANSWER_LENGTH = 20_000
"""Characters of a corrected answer."""


def give(connection: sa.Connection, now: float, tenant_id: str, given: NewFeedback) -> Feedback:
    """Store what is said about one response, in place of what was said before; see `Registry.give_feedback`."""
    if given.rating is None and given.right_document_id is None and not given.no_document and given.answer is None:
        raise InvalidInput("Feedback must say something: a rating, the right document, or an answer.")
    if given.no_document and given.right_document_id is not None:
        raise InvalidInput("Feedback can name a document, or say that there is none, not both.")
    if given.answer is not None:
        check_text("answer", given.answer, ANSWER_LENGTH)
    mine = feedback.c.tenant_id == tenant_id, feedback.c.response_id == given.response_id
    before = connection.execute(sa.select(feedback).where(*mine)).one_or_none()
    decision = before or decisions.get(connection, tenant_id, given.response_id)
    if decision is None:
        raise NotFound(f"There is no response {given.response_id[:80]!r}, or it is too old for feedback.")
    right = given.right_document_id
    if right is not None:
        live = sa.select(documents.c.id).where(
            documents.c.tenant_id == tenant_id, documents.c.id == right, documents.c.deleted_at.is_(None)
        )
        if connection.execute(live).one_or_none() is None:
            raise NotFound(f"There is no document {right[:80]!r}.")
    connection.execute(feedback.delete().where(*mine))
    connection.execute(
        feedback.insert().values(
            tenant_id=tenant_id,
            response_id=given.response_id,
            rating=given.rating,
            right_document_id=right,
            no_document=given.no_document,
            answer=given.answer,
            candidates=[{k: v for k, v in one.items() if k != "title"} for one in decision.candidates],
            adapter_id=decision.adapter_id,
            document_id=decision.document_id,
            created_at=now,
        )
    )
    _forget_old(connection, tenant_id)
    return _feedback(connection.execute(sa.select(feedback).where(*mine)).one())


def feedback_since(connection: sa.Connection, tenant_id: str, after: float, limit: int) -> list[Feedback]:
    """Given after a time, oldest first."""
    query = sa.select(feedback).where(feedback.c.tenant_id == tenant_id, feedback.c.created_at > after)
    order = query.order_by(feedback.c.created_at, feedback.c.response_id).limit(check_limit(limit))
    return [_feedback(row) for row in connection.execute(order)]


def newest_feedback(connection: sa.Connection, tenant_ids: Collection[str]) -> dict[str, float]:
    """Tenant -> time of its newest feedback."""
    query = (
        sa.select(feedback.c.tenant_id, sa.func.max(feedback.c.created_at))
        .where(feedback.c.tenant_id.in_(list(tenant_ids)))
        .group_by(feedback.c.tenant_id)
    )
    return {tenant_id: newest for tenant_id, newest in connection.execute(query)}


def forget_document(connection: sa.Connection, tenant_id: str, document_id: str) -> None:
    """Drop what was said about a document."""
    about = sa.or_(feedback.c.document_id == document_id, feedback.c.right_document_id == document_id)
    connection.execute(feedback.delete().where(feedback.c.tenant_id == tenant_id, about))


def _forget_old(connection: sa.Connection, tenant_id: str) -> None:
    mine = feedback.c.tenant_id == tenant_id
    oldest = sa.select(feedback.c.created_at).where(mine).order_by(feedback.c.created_at.desc())
    limit = connection.execute(oldest.offset(KEPT).limit(1)).scalar_one_or_none()
    if limit is not None:
        connection.execute(feedback.delete().where(mine, feedback.c.created_at <= limit))


def _feedback(row: sa.Row[Any]) -> Feedback:
    return Feedback(
        tenant_id=row.tenant_id,
        response_id=row.response_id,
        created_at=row.created_at,
        rating=row.rating,
        right_document_id=row.right_document_id,
        no_document=row.no_document,
        answer=row.answer,
        candidates=row.candidates,
        adapter_id=row.adapter_id,
        document_id=row.document_id,
    )
