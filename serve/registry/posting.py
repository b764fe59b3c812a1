"""Posting documents: new ones, new versions, and the same content again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from serve.ids import new_id
from serve.registry import changes, jobs
from serve.registry.checks import check_label, check_metadata, check_mode, check_probes, check_text
from serve.registry.documents import any_document, any_version, lock_document
from serve.registry.errors import Conflict, IdempotencyConflict, NotFound
from serve.registry.keys import lock_tenant
from serve.registry.records import DocumentMode, PostResult
from serve.registry.tables import collections, document_versions, documents, idempotency

IDEMPOTENCY_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Post:
    """What a client posts; see `Registry.post_document`."""

    title: str
    text: str
    external_id: str | None
    collection: str | None
    metadata: Mapping[str, Any] | None
    document_id: str | None
    idempotency_key: str | None
    mode: DocumentMode = "document"
    probes: Sequence[Mapping[str, str | None]] = ()

    def checked(self) -> Post:
        """A copy that the database can store. Raises InvalidInput."""
        check_text("title", self.title, 1000)
        check_text("text", self.text)
        if self.external_id is not None:
            check_label("external ID", self.external_id, 255)
        if self.collection is not None:
            check_label("collection name", self.collection, 200)
        if self.idempotency_key is not None:
            check_text("idempotency key", self.idempotency_key, 255)
        metadata = None if self.metadata is None else check_metadata(self.metadata)
        return replace(self, metadata=metadata, mode=check_mode(self.mode), probes=check_probes(self.probes))


def content_hash(
    title: str, text: str, mode: DocumentMode = "document", probes: Sequence[Mapping[str, str | None]] = ()
) -> str:
    """SHA-256 over title and text, and over mode and probes where they are not the usual ones.

    The title's length keeps the border to the text unambiguous. No title is so long that its length begins with 0xff,
    which is the mark of the second form.
    """
    head = title.encode()
    content = len(head).to_bytes(8, "big") + head + text.encode()
    if mode != "document" or probes:
        more = json.dumps([mode, [dict(probe) for probe in probes]], sort_keys=True).encode()
        content = b"\xff" + len(more).to_bytes(8, "big") + more + content
    return hashlib.sha256(content).hexdigest()


def post_document(connection: sa.Connection, now: float, tenant_id: str, post: Post) -> PostResult:
    """The whole of `Registry.post_document`, in the caller's transaction."""
    post = post.checked()
    lock_tenant(connection, tenant_id)
    request_hash = _request_hash(post)
    replay = _replay(connection, now, tenant_id, post, request_hash)
    if replay is not None:
        return replay
    digest = content_hash(post.title, post.text, post.mode, post.probes)
    collection_id = _collection(connection, now, tenant_id, post.collection)
    target, addressed = _target(connection, tenant_id, post, digest, collection_id)
    if target is None:
        document_id = _insert(connection, now, tenant_id, post, digest, collection_id)
        created = True
    else:
        document_id = target.id
        if addressed:
            _update_properties(connection, now, target, post, collection_id)
        created = _update_content(connection, now, target, post, digest)
    document = any_document(connection, tenant_id, document_id)
    version = any_version(connection, tenant_id, document_id, document.version)
    job = jobs.existing_job(connection, document.job_id)
    if post.idempotency_key is not None:
        connection.execute(
            idempotency.insert().values(
                tenant_id=tenant_id,
                key=post.idempotency_key,
                request_hash=request_hash,
                document_id=document_id,
                version=version.number,
                job_id=job.id,
                created=created,
                created_at=now,
            )
        )
    return PostResult(document, version, job, created)


def _request_hash(post: Post) -> str:
    fields: list[Any] = [post.title, post.text, post.external_id, post.collection, post.metadata, post.document_id]
    if post.mode != "document" or post.probes:  # the usual form is as it was before these existed
        fields += [post.mode, [dict(probe) for probe in post.probes]]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _replay(connection: sa.Connection, now: float, tenant_id: str, post: Post, request_hash: str) -> PostResult | None:
    if post.idempotency_key is None:
        return None
    mine = idempotency.c.tenant_id == tenant_id
    connection.execute(idempotency.delete().where(mine, idempotency.c.created_at <= now - IDEMPOTENCY_S))
    row = connection.execute(
        sa.select(idempotency).where(mine, idempotency.c.key == post.idempotency_key)
    ).one_or_none()
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise IdempotencyConflict("This Idempotency-Key was used before with another request.")
    return PostResult(
        any_document(connection, tenant_id, row.document_id),
        any_version(connection, tenant_id, row.document_id, row.version),
        jobs.existing_job(connection, row.job_id),
        created=row.created,
        replayed=True,
    )


def _collection(connection: sa.Connection, now: float, tenant_id: str, name: str | None) -> str | None:
    if name is None:
        return None
    query = sa.select(collections.c.id).where(collections.c.tenant_id == tenant_id, collections.c.name == name)
    found: str | None = connection.execute(query).scalar_one_or_none()
    if found is None:
        found = new_id("col")
        connection.execute(collections.insert().values(id=found, tenant_id=tenant_id, name=name, created_at=now))
    return found


def _target(
    connection: sa.Connection, tenant_id: str, post: Post, digest: str, collection_id: str | None
) -> tuple[sa.Row[Any] | None, bool]:
    """The document that this post is about, locked, and whether the client named it."""
    if post.document_id is not None:
        row = lock_document(connection, tenant_id, post.document_id)
        if row is None or row.deleted_at is not None:
            raise NotFound("There is no such document.")
        return row, True
    live = (documents.c.tenant_id == tenant_id, documents.c.deleted_at.is_(None))
    query = sa.select(documents.c.id).where(*live)
    if post.external_id is not None:
        query = query.where(documents.c.external_id == post.external_id)
    else:
        # `== None` becomes IS NULL: outside all collections is a place of its own.
        query = query.where(documents.c.content_hash == digest, documents.c.collection_id == collection_id)
    found = connection.execute(query.order_by(documents.c.id).limit(1)).scalar_one_or_none()
    row = None if found is None else lock_document(connection, tenant_id, found)
    if row is not None and row.deleted_at is not None:  # deleted while we waited for the lock
        row = None
    return row, post.external_id is not None


def _insert(
    connection: sa.Connection, now: float, tenant_id: str, post: Post, digest: str, collection_id: str | None
) -> str:
    document_id, job_id = new_id("doc"), new_id("job")
    connection.execute(
        documents.insert().values(
            id=document_id,
            tenant_id=tenant_id,
            external_id=post.external_id,
            collection_id=collection_id,
            title=post.title,
            metadata=dict(post.metadata or {}),
            content_hash=digest,
            latest_version=1,
            latest_job_id=job_id,
            created_at=now,
            updated_at=now,
        )
    )
    _insert_version(connection, now, tenant_id, document_id, 1, post, digest)
    jobs.insert_job(connection, now, job_id, tenant_id, document_id, 1)
    return document_id


def _insert_version(
    connection: sa.Connection, now: float, tenant_id: str, document_id: str, number: int, post: Post, digest: str
) -> None:
    connection.execute(
        document_versions.insert().values(
            document_id=document_id,
            number=number,
            tenant_id=tenant_id,
            title=post.title,
            text=post.text,
            content_hash=digest,
            size_bytes=len(post.text.encode()),
            mode=post.mode,
            probes=[dict(probe) for probe in post.probes],
            created_at=now,
        )
    )


def _update_properties(
    connection: sa.Connection, now: float, target: sa.Row[Any], post: Post, collection_id: str | None
) -> None:
    values: dict[str, Any] = {}
    if post.external_id is not None and post.external_id != target.external_id:
        taken = sa.select(documents.c.id).where(
            documents.c.tenant_id == target.tenant_id, documents.c.external_id == post.external_id
        )
        if connection.execute(taken).first() is not None:
            raise Conflict(f"Another document has the external ID {post.external_id!r}.")
        values["external_id"] = post.external_id
    if collection_id is not None and collection_id != target.collection_id:
        values["collection_id"] = collection_id
    if post.metadata is not None and dict(post.metadata) != target.metadata:
        values["metadata"] = dict(post.metadata)
    if not values:
        return
    connection.execute(documents.update().where(documents.c.id == target.id).values(updated_at=now, **values))
    if "collection_id" in values or "metadata" in values:
        changes.append(connection, now, target.tenant_id, "document_updated", target.id, target.current_adapter_id)


def _update_content(connection: sa.Connection, now: float, target: sa.Row[Any], post: Post, digest: str) -> bool:
    """Add a version when the content differs from the wanted one's, a job when that one's failed; say whether either.

    Only the version that is to be served counts: whoever puts back an older text wants it to be served in the end.
    """
    if digest == target.content_hash:
        job = jobs.existing_job(connection, target.latest_job_id)
        if job.state != "failed":
            return False
        number, latest = job.version, target.latest_version
    else:
        number = latest = target.latest_version + 1
        _insert_version(connection, now, target.tenant_id, target.id, number, post, digest)
    jobs.end_refinements(connection, now, target.id, "The document was posted again.")
    job_id = new_id("job")
    jobs.insert_job(connection, now, job_id, target.tenant_id, target.id, number)
    connection.execute(
        documents.update()
        .where(documents.c.id == target.id)
        .values(title=post.title, content_hash=digest, latest_version=latest, latest_job_id=job_id, updated_at=now)
    )
    return True
