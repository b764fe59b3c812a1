"""Posting, versions, idempotency, deletion, paging, collections, isolation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from serve.ids import new_id
from serve.registry import Conflict, IdempotencyConflict, InvalidInput, LeaseLost, NotFound, Registry
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    centroids,
    clock,
    lease_one,
    make_ready,
    new_adapter,
    one_part,
    registry,
    url,
)

# ruff: noqa: F811


@pytest.fixture
def acme(registry: Registry) -> str:
    return registry.create_tenant("acme").id


def test_post_and_read_back(registry: Registry, acme: str) -> None:
    posted = registry.post_document(acme, "Title", "Text ü", "ext-1", "handbook", {"a": [1, {"b": None}]})
    assert posted.created and not posted.replayed
    document = posted.document
    assert (document.state, document.latest_version, document.current_version) == ("processing", 1, None)
    assert (document.collection, document.metadata, document.adapter_id) == ("handbook", {"a": [1, {"b": None}]}, None)
    assert document.job_id == posted.job.id and posted.job.state == "queued"
    assert posted.version.size_bytes == 7 and "Text" not in repr(posted.version)
    assert registry.get_document(acme, document.id) == registry.get_document(acme, "ext-1") == document
    assert registry.get_version(acme, document.id) == registry.get_version(acme, document.id, 1) == posted.version
    assert registry.get_version(acme, document.id, 2) is None
    (collection,) = registry.list_collections(acme)
    assert (collection.id, collection.name) == (document.collection_id, "handbook")


def test_same_content_gives_the_same_document(registry: Registry, acme: str) -> None:
    first = registry.post_document(acme, "T", "one")
    again = registry.post_document(acme, "T", "one")
    assert not again.created and (again.document, again.job) == (first.document, first.job)
    assert registry.post_document(acme, "T2", "one").created
    assert registry.post_document(acme, "To", "ne").created, "title and text do not run together"
    assert registry.post_document(acme, "T", "one", collection="other").created, "another collection, another document"
    assert registry.post_document(acme, "T", "one", external_id="x").created, "a name of its own, another document"
    assert registry.post_document(registry.create_tenant("beta").id, "T", "one").created


def test_same_content_posted_at_once_makes_one_document(registry: Registry, acme: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        posts = list(pool.map(lambda _: registry.post_document(acme, "T", "same", "ext"), range(16)))
    assert len({post.document.id for post in posts}) == 1
    assert sum(post.created for post in posts) == 1
    assert registry.count_jobs()["queued"] == 1


def test_versions(registry: Registry, acme: str) -> None:
    first = registry.post_document(acme, "T", "one", "ext")
    second = registry.post_document(acme, "T", "two", "ext")
    third = registry.post_document(acme, "T", "one", document_id=first.document.id)
    assert [post.version.number for post in (first, second, third)] == [1, 2, 3]
    assert third.created, "going back to an older text is a new version, or the second would win in the end"
    assert not registry.post_document(acme, "T", "one", "ext").created
    texts = [registry.get_version(acme, first.document.id, number).text for number in (1, 2, 3)]  # type: ignore[union-attr]
    assert texts == ["one", "two", "one"]
    with pytest.raises(NotFound):
        registry.post_document(acme, "T", "x", document_id=new_id("doc"))
    with pytest.raises(NotFound):
        registry.post_document("ten_unknown", "T", "x")


def test_only_the_latest_version_becomes_current(registry: Registry, acme: str) -> None:
    first = registry.post_document(acme, "T", "one", "ext")
    second = registry.post_document(acme, "T", "two", "ext")
    registry.lease_jobs("w", 2, 60)
    late = new_adapter()
    event = registry.publish(first.job.id, "w", [(late, centroids())])
    assert event.kind == "adapter_superseded"
    document = registry.get_document(acme, "ext")
    assert document is not None and document.adapter_id is None and document.state == "processing"
    new = new_adapter()
    assert registry.publish(second.job.id, "w", [(new, centroids())]).kind == "adapter_published"
    document = registry.get_document(acme, "ext")
    assert document is not None
    assert (document.adapter_id, document.current_version, document.state) == (new.id, 2, "ready")
    assert [one.adapter_id for one in registry.routable(acme)] == [new.id]
    kept = registry.get_adapter(acme, late.id)
    assert kept is not None and kept.retired_at is not None and kept.state == "ready"


def test_mode_and_probes_are_content(registry: Registry, acme: str) -> None:
    probes = [{"question": "When?", "answer": "At nine."}, {"question": "Where?"}]
    plain = registry.post_document(acme, "T", "one", "ext")
    assert (plain.document.mode, plain.version.mode, plain.version.probes) == ("document", "document", ())
    probed = registry.post_document(acme, "T", "one", "ext", probes=probes)
    assert probed.created and probed.version.number == 2
    stored = ({"question": "When?", "answer": "At nine."}, {"question": "Where?", "answer": None})
    assert probed.version.probes == stored and "nine" not in repr(probed.version)
    assert not registry.post_document(acme, "T", "one", "ext", probes=stored).created
    assert registry.post_document(acme, "T", "one", "ext", probes=probes[::-1]).version.number == 3
    task = registry.post_document(acme, "T", "one", "ext", mode="task")
    assert (task.version.number, task.document.mode, task.version.probes) == (4, "task", ())
    assert registry.get_document(acme, "ext") == task.document and registry.get_version(acme, task.document.id, 2)
    assert lease_one(registry).version.mode == "document" and lease_one(registry).version.probes == stored
    assert registry.post_document(acme, "T", "one", "ext").version.number == 5
    # Without a name of its own, other content is another document.
    ids = {registry.post_document(acme, "T", "one", **more).document.id  # type: ignore[arg-type]
           for more in ({}, {"mode": "task"}, {"probes": probes}, {"mode": "task", "probes": probes})}  # fmt: skip
    assert len(ids) == 4


def test_an_idempotency_key_covers_mode_and_probes(registry: Registry, acme: str) -> None:
    registry.post_document(acme, "T", "one", idempotency_key="k", mode="task", probes=[{"question": "Q?"}])
    again = registry.post_document(
        acme, "T", "one", idempotency_key="k", mode="task", probes=[{"question": "Q?", "answer": None}]
    )
    assert again.replayed
    for other in ({"mode": "document"}, {"probes": []}, {"probes": [{"question": "Q?", "answer": "a"}]}):
        with pytest.raises(IdempotencyConflict):
            registry.post_document(
                acme, "T", "one", idempotency_key="k", **{"mode": "task", "probes": [{"question": "Q?"}], **other}
            )  # type: ignore[arg-type]


def test_content_whose_job_failed_is_tried_again(registry: Registry, acme: str) -> None:
    first = registry.post_document(acme, "T", "one")
    registry.fail_job(lease_one(registry).job.id, "w1", "no text in it")
    document = registry.get_document(acme, first.document.id)
    assert document is not None and document.state == "failed"
    again = registry.post_document(acme, "T", "one")
    assert again.created and again.document.id == first.document.id and again.version == first.version
    assert again.job.id != first.job.id and again.document.state == "processing"


def test_properties_change_without_a_new_version(registry: Registry, acme: str) -> None:
    event = make_ready(registry, acme, "T", external_id="ext", collection="a", metadata={"v": 1})
    again = registry.post_document(acme, "T", "text", "ext", "b")
    assert not again.created and again.document.collection == "b" and again.document.metadata == {"v": 1}
    (change,) = registry.changes_since(acme, event.seq)
    assert (change.kind, change.adapter_id) == ("document_updated", event.adapter_id)
    assert registry.routable(acme)[0].collection_id == again.document.collection_id
    registry.post_document(acme, "T", "text", "ext", "b", {"v": 1})
    assert registry.head(acme) == change.seq, "nothing changed, nothing to tell"
    other = registry.post_document(acme, "U", "u")
    with pytest.raises(Conflict):
        registry.post_document(acme, "U", "u", "ext", document_id=other.document.id)
    renamed = registry.post_document(acme, "U", "u", "ext-2", document_id=other.document.id)
    assert renamed.document.external_id == "ext-2" and not renamed.created


def test_idempotency_key(registry: Registry, acme: str, clock: Clock) -> None:
    first = registry.post_document(acme, "T", "one", "ext", idempotency_key="k")
    registry.post_document(acme, "T", "two", "ext")
    again = registry.post_document(acme, "T", "one", "ext", idempotency_key="k")
    assert again.replayed and again.created and again.version == first.version and again.job == first.job
    assert again.document.latest_version == 2, "a replay changes nothing"
    with pytest.raises(IdempotencyConflict):
        registry.post_document(acme, "T", "other", "ext", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        registry.post_document(acme, "T", "one", "ext", metadata={"a": 1}, idempotency_key="k")
    beta = registry.create_tenant("beta").id
    assert not registry.post_document(beta, "T", "one", idempotency_key="k").replayed
    registry.delete_document(acme, "ext")
    gone = registry.post_document(acme, "T", "one", "ext", idempotency_key="k")
    assert gone.replayed and gone.document.state == "deleted", "a late retry does not bring a document back"
    clock.now += 24 * 3600
    fresh = registry.post_document(acme, "T", "one", "ext", idempotency_key="k")
    assert not fresh.replayed and fresh.document.id != first.document.id


def test_a_refused_post_leaves_nothing(registry: Registry, acme: str) -> None:
    with pytest.raises(NotFound):
        registry.post_document(acme, "T", "x", collection="new", document_id=new_id("doc"), idempotency_key="k")
    assert registry.list_collections(acme) == []
    assert not registry.post_document(acme, "T", "x", idempotency_key="k").replayed


@pytest.mark.parametrize(
    "arguments",
    [
        {"title": "a\x00b"},
        {"text": "a\x00b"},
        {"text": "\ud800"},
        {"title": "x" * 1001},
        {"external_id": ""},
        {"external_id": "doc_mine"},
        {"external_id": "x" * 256},
        {"collection": " "},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": object()}},
        {"metadata": {"a": "\x00"}},
        {"idempotency_key": "x" * 256},
        {"mode": "tasks"},
        {"probes": [{"question": "Q?"}] * 33},
        {"probes": [{"answer": "a"}]},
        {"probes": [{"question": None}]},
        {"probes": [{"question": " "}]},
        {"probes": [{"question": "Q?", "answer": ""}]},
        {"probes": [{"question": "Q?", "weight": "1"}]},
        {"probes": [{"question": "x" * 501}]},
        {"probes": [{"question": "a\x00"}]},
        {"probes": [{"question": "Q?", "answer": "\ud800"}]},
    ],
)
def test_values_that_cannot_be_stored(registry: Registry, acme: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        registry.post_document(acme, **{"title": "T", "text": "x", **arguments})  # type: ignore[arg-type]
    assert registry.list_documents(acme).items == []


def test_odd_names_find_nothing_and_raise_nothing(registry: Registry, acme: str) -> None:
    for name in ("", "a\x00", "doc_", "'; --", "x" * 5000):
        assert registry.get_document(acme, name) is None
        assert registry.get_job(acme, name) is None
        assert registry.get_adapter(acme, name) is None
        assert registry.resolve_model(acme, name) is None
        assert registry.delete_document(acme, name) is None


def test_deletion(registry: Registry, acme: str, clock: Clock) -> None:
    event = make_ready(registry, acme, "Secret title", "secret text", external_id="ext", metadata={"s": "secret"})
    registry.set_alias(acme, "mine", event.document_id or "")
    probes = [{"question": "Secret question?", "answer": "secret answer"}]
    second = registry.post_document(acme, "Secret title", "secret too", "ext", probes=probes)
    lease_one(registry, "w2")
    change = registry.delete_document(acme, "ext")
    assert change is not None
    assert (change.kind, change.seq, change.document_id) == ("document_deleted", event.seq + 1, event.document_id)
    assert change.retired_adapter_ids == (event.adapter_id,)
    assert registry.delete_document(acme, second.document.id) is None
    assert registry.get_document(acme, second.document.id) is registry.get_document(acme, "ext") is None
    assert registry.get_version(acme, second.document.id, 1) is None
    assert registry.get_adapter(acme, event.adapter_id or "") is None
    assert registry.list_adapters(acme).items == registry.list_documents(acme).items == registry.routable(acme) == []
    assert registry.resolve_model(acme, "mine") is registry.resolve_model(acme, event.adapter_id or "") is None
    job = registry.get_job(acme, second.job.id)
    assert job is not None and job.state == "failed" and "deleted" in (job.error or "")
    with pytest.raises(LeaseLost):
        registry.publish(second.job.id, "w2", one_part())
    with pytest.raises(NotFound):
        registry.post_document(acme, "T", "x", document_id=second.document.id)

    def everything(connection: sa.Connection) -> str:
        tables = sa.MetaData()
        tables.reflect(connection)
        return repr([connection.execute(sa.select(table)).all() for table in tables.sorted_tables])

    assert "secret" not in registry._db.read(everything).lower()
    reborn = registry.post_document(acme, "T", "x", "ext")
    assert reborn.created and reborn.document.id != second.document.id

    clock.now += 100
    assert registry.list_purgeable(clock.now - 100) == []
    (purgeable,) = registry.list_purgeable(clock.now)
    assert purgeable.id == event.adapter_id
    registry.mark_purged(purgeable.id)
    assert registry.list_purgeable(clock.now) == []


def test_paging_is_stable_while_documents_come_and_go(registry: Registry, acme: str) -> None:
    ids = [registry.post_document(acme, f"T{n}", "x", collection="even" if n % 2 == 0 else None).document.id
           for n in range(7)]  # fmt: skip
    page = registry.list_documents(acme, limit=3)
    assert [document.id for document in page.items] == ids[:3:-1] and page.next_cursor == ids[4]
    registry.post_document(acme, "new", "x")
    registry.delete_document(acme, ids[4])
    rest = registry.list_documents(acme, limit=3, cursor=page.next_cursor)
    assert [document.id for document in rest.items] == [ids[3], ids[2], ids[1]]
    last = registry.list_documents(acme, limit=3, cursor=rest.next_cursor)
    assert [document.id for document in last.items] == [ids[0]] and last.next_cursor is None
    exact = registry.list_documents(acme, limit=7)
    assert len(exact.items) == 7 and exact.next_cursor is None
    even = registry.list_documents(acme, collection_id=registry.list_collections(acme)[0].id)
    assert [document.id for document in even.items] == [ids[6], ids[2], ids[0]]
    for bad in ("", "x", ids[0].replace("doc", "adp")):
        with pytest.raises(InvalidInput):
            registry.list_documents(acme, cursor=bad)
    with pytest.raises(InvalidInput):
        registry.list_documents(acme, limit=0)


def test_adapter_pages(registry: Registry, acme: str) -> None:
    made = [make_ready(registry, acme, f"T{n}").adapter_id for n in range(5)]
    page = registry.list_adapters(acme, limit=2)
    assert [one.id for one in page.items] == [made[4], made[3]]
    rest = registry.list_adapters(acme, limit=10, cursor=page.next_cursor)
    assert [one.id for one in rest.items] == [made[2], made[1], made[0]] and rest.next_cursor is None
    first = registry.get_adapter(acme, made[0] or "")
    assert first is not None
    assert registry.list_adapters(acme, document_id=first.document_id).items == [first]


def test_no_lookup_reaches_another_tenant(registry: Registry, acme: str) -> None:
    beta = registry.create_tenant("beta").id
    event = make_ready(registry, acme, "T", "x", external_id="ext", collection="c")
    document_id, adapter_id = event.document_id or "", event.adapter_id or ""
    document = registry.get_document(acme, document_id)
    assert document is not None
    registry.set_alias(acme, "mine", document_id)
    for name in (document_id, "ext"):
        assert registry.get_document(beta, name) is None
        assert registry.delete_document(beta, name) is None
    assert registry.get_version(beta, document_id) is registry.get_version(beta, document_id, 1) is None
    assert registry.get_job(beta, document.job_id) is None
    assert registry.get_adapter(beta, adapter_id) is None
    assert registry.list_documents(beta, collection_id=document.collection_id).items == []
    assert registry.list_documents(beta, cursor=document_id).items == []
    assert registry.list_adapters(beta, document_id=document_id).items == []
    assert registry.list_collections(beta) == registry.list_aliases(beta) == []
    assert registry.routable(beta) == registry.routable(beta, [document_id]) == []
    assert registry.routable_snapshot(beta).adapters == []
    assert registry.head(beta) == 0 and registry.changes_since(beta, 0) == []
    for name in (adapter_id, document_id, document.collection_id or "", "mine"):
        assert registry.resolve_model(acme, name) is not None
        assert registry.resolve_model(beta, name) is None
    for target in (adapter_id, document_id, document.collection_id or ""):
        with pytest.raises(NotFound):
            registry.set_alias(beta, "mine", target)
    assert not registry.delete_alias(beta, "mine")
    with pytest.raises(NotFound):
        registry.post_document(beta, "T", "y", document_id=document_id)
    assert registry.post_document(beta, "T", "x", "ext").document.id != document_id
    assert registry.get_document(acme, document_id) == document
