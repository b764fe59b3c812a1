"""Routing policies: every version is kept, the one with the highest number is in force.

Going back makes a new version with the old text, so numbers only grow and the history says who did what when. The
registry keeps texts; what they mean is checked before (`router.policy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.registry import changes
from serve.registry.checks import check_limit, check_text
from serve.registry.errors import Conflict, InvalidInput, NotFound, VersionNotFound
from serve.registry.records import DocumentFacts, Page, PolicyVersion
from serve.registry.tables import collections, document_versions, documents, policies, tenants

MAX_TEXT = 65_536
_LAST_NUMBER = 2**31 - 1
_IDS_AT_ONCE = 500  # databases bound the number of parameters of a query


def current_policy(connection: sa.Connection, tenant_id: str) -> PolicyVersion | None:
    """The version in force; None for a tenant that never had a policy."""
    query = sa.select(policies).where(policies.c.tenant_id == tenant_id).order_by(policies.c.number.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else _version(row)


def get_policy(connection: sa.Connection, tenant_id: str, number: int) -> PolicyVersion | None:
    """A version by number."""
    if not 0 < number <= _LAST_NUMBER:
        return None
    query = sa.select(policies).where(policies.c.tenant_id == tenant_id, policies.c.number == number)
    row = connection.execute(query).one_or_none()
    return None if row is None else _version(row)


def list_policies(connection: sa.Connection, tenant_id: str, limit: int, cursor: str | None) -> Page[PolicyVersion]:
    """Newest first."""
    limit = check_limit(limit)
    query = sa.select(policies).where(policies.c.tenant_id == tenant_id)
    if cursor is not None:
        if not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= 10 and int(cursor) <= _LAST_NUMBER):
            raise InvalidInput("The cursor is not one that a list has given.")
        query = query.where(policies.c.number < int(cursor))
    rows = connection.execute(query.order_by(policies.c.number.desc()).limit(limit + 1)).all()
    return Page([_version(row) for row in rows[:limit]], str(rows[limit - 1].number) if len(rows) > limit else None)


def put_policy(
    connection: sa.Connection,
    now: float,
    tenant_id: str,
    text: str,
    created_by: str,
    expected_version: int | None,
    restored_from: int | None = None,
) -> PolicyVersion:
    """Put a text in force. The version in force is returned where it has this text already."""
    check_text("policy", text, MAX_TEXT)
    if connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id)).first() is None:
        raise NotFound(f"There is no tenant {tenant_id}.")
    before = current_policy(connection, tenant_id)
    number = before.number if before else 0
    if expected_version is not None and expected_version != number:
        raise Conflict(f"The policy is at version {number} by now, not {expected_version}.")
    if before is not None and before.text == text:
        return before
    # Of two writers at once the second finds the number taken, and begins anew.
    new = PolicyVersion(tenant_id, number + 1, text, created_by, restored_from, now)
    connection.execute(
        policies.insert().values(
            tenant_id=tenant_id,
            number=new.number,
            text=text,
            created_by=created_by,
            restored_from=restored_from,
            created_at=now,
        )
    )
    changes.append(connection, now, tenant_id, "policy_changed", document_id="")
    return new


def roll_back_policy(
    connection: sa.Connection, now: float, tenant_id: str, number: int | None, created_by: str
) -> PolicyVersion:
    """Put the text of another version in force, by default that of the one before."""
    before = current_policy(connection, tenant_id)
    if before is None:
        raise NotFound("There is no policy to roll back.")
    if number is None and before.number == 1:
        raise Conflict("The policy has only one version; there is none to go back to.")
    old = get_policy(connection, tenant_id, before.number - 1 if number is None else number)
    if old is None:
        raise VersionNotFound(f"The policy has no version {number}; it has versions 1 to {before.number}.")
    return put_policy(connection, now, tenant_id, old.text, created_by, None, restored_from=old.number)


def document_facts(connection: sa.Connection, tenant_id: str, document_ids: Sequence[str]) -> list[DocumentFacts]:
    """What policies may ask about live documents that are served."""
    found: list[DocumentFacts] = []
    for start in range(0, len(document_ids), _IDS_AT_ONCE):
        query = (
            sa.select(
                documents.c.id,
                documents.c.external_id,
                documents.c.metadata.label("given"),
                collections.c.name,
                document_versions.c.created_at,
            )
            .join(
                document_versions,
                sa.and_(
                    document_versions.c.document_id == documents.c.id,
                    document_versions.c.number == documents.c.current_version,
                ),
            )
            .outerjoin(collections, collections.c.id == documents.c.collection_id)
            .where(
                documents.c.tenant_id == tenant_id,
                documents.c.deleted_at.is_(None),
                documents.c.id.in_(list(document_ids[start : start + _IDS_AT_ONCE])),
            )
        )
        found += [
            DocumentFacts(row.id, row.external_id, row.name, row.given, row.created_at)
            for row in connection.execute(query)
        ]
    return found


def _version(row: sa.Row[Any]) -> PolicyVersion:
    return PolicyVersion(row.tenant_id, row.number, row.text, row.created_by, row.restored_from, row.created_at)
