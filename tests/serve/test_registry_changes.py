"""Publication, change log, routable adapters, names, stale adapters."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from serve.registry import InvalidInput, LeaseLost, NotFound, Registry
from serve.registry.records import NewCentroids, Resolution
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    acme,
    centroids,
    clock,
    lease_one,
    make_ready,
    new_adapter,
    one_part,
    registry,
    several_parts,
    url,
)

# ruff: noqa: F811


def test_publication_is_visible_as_a_whole(registry: Registry, acme: str, clock: Clock) -> None:
    posted = registry.post_document(acme, "Title", "text", collection="c")
    lease_one(registry)
    new = new_adapter()
    matrix = np.arange(6, dtype=np.float64).reshape(2, 3) / 7
    event = registry.publish(posted.job.id, "w1", [(new, NewCentroids("minilm", "v1", matrix))])  # type: ignore[arg-type]
    assert (event.seq, event.kind, event.adapter_id) == (1, "adapter_published", new.id)
    assert event.retired_adapter_ids == () and registry.head(acme) == 1
    assert registry.changes_since(acme, 0) == [event] and registry.changes_since(acme, 1) == []
    adapter = registry.get_adapter(acme, new.id)
    assert adapter is not None
    for name in ("id", "kind", "rank", "alpha", "target_modules", "blob_path", "checksum", "size_bytes",
                 "base_fingerprint", "generator_fingerprint", "manifest", "state"):  # fmt: skip
        assert getattr(adapter, name) == getattr(new, name)
    assert (adapter.document_id, adapter.version, adapter.retired_at) == (posted.document.id, 1, None)
    (one,) = registry.routable(acme)
    assert (one.adapter_id, one.document_title, one.state) == (new.id, "Title", "ready")
    assert (one.encoder, one.encoder_version, one.collection_id) == ("minilm", "v1", posted.document.collection_id)
    assert one.centroids.dtype == np.float32 and np.array_equal(one.centroids, matrix.astype(np.float32))
    assert (one.version, one.part, one.parts, one.spans, one.mode) == (1, 0, 1, ((0, 4),), "document")
    assert registry.routable(acme, [posted.document.id])[0].adapter_id == new.id
    assert registry.routable(acme, []) == []
    assert registry.routable_snapshot(acme).seq == 1


def test_a_new_version_replaces_the_old_one_only_when_it_is_ready(registry: Registry, acme: str, clock: Clock) -> None:
    first = make_ready(registry, acme, "Old title", "one", external_id="ext")
    registry.post_document(acme, "New title", "two", "ext")
    document = registry.get_document(acme, "ext")
    assert document is not None and document.adapter_id == first.adapter_id and document.state == "processing"
    assert document.title == "New title" and registry.routable(acme)[0].document_title == "Old title"
    leased = lease_one(registry)
    event = registry.publish(leased.job.id, "w1", one_part())
    assert event.retired_adapter_ids == (first.adapter_id,)
    assert [one.adapter_id for one in registry.routable(acme)] == [event.adapter_id]
    now = registry.routable(acme, [first.document_id])
    assert [one.adapter_id for one in now] == [event.adapter_id], "an old event applied late brings nothing back"
    old = registry.get_adapter(acme, first.adapter_id or "")
    assert old is not None and old.retired_at == clock.now, "still usable when pinned"


@pytest.mark.parametrize(
    "matrix", [np.zeros((0, 3)), np.zeros((2, 0)), np.zeros(3), np.array([[np.nan, 1.0]]), np.array([[np.inf]])]
)
def test_bad_centroids_change_nothing(registry: Registry, acme: str, matrix: np.ndarray) -> None:
    posted = registry.post_document(acme, "T", "x")
    lease_one(registry)
    with pytest.raises(InvalidInput):
        registry.publish(posted.job.id, "w1", [(new_adapter(), NewCentroids("minilm", "1", matrix))])
    job = registry.get_job(acme, posted.job.id)
    assert job is not None and job.state == "running" and registry.list_adapters(acme).items == []


def test_numbers_follow_commit_order_under_concurrent_publishers(registry: Registry, acme: str) -> None:
    """A follower that reads the head and catches up must never see a number before all smaller ones."""
    beta = registry.create_tenant("beta").id
    for tenant in (acme, beta):
        for n in range(24):
            registry.post_document(tenant, f"T{n}", "x")
    stop = threading.Event()
    errors: list[BaseException] = []
    seen: dict[str, list[int]] = {acme: [], beta: []}

    def publisher(name: str) -> None:
        try:
            while leased := registry.lease_jobs(name, 2, 60):
                for one in leased:
                    registry.publish(one.job.id, name, one_part())
        except BaseException as error:
            errors.append(error)

    def follower(tenant: str) -> None:
        try:
            routable: set[str] = set()
            while True:
                last = stop.is_set()
                at = seen[tenant][-1] if seen[tenant] else 0
                head = registry.head(tenant)
                events = registry.changes_since(tenant, at)
                assert [event.seq for event in events] == list(range(at + 1, at + 1 + len(events)))
                assert at + len(events) >= head, "all that the head promises is there"
                got = registry.routable(tenant, [event.document_id for event in events])
                assert {one.adapter_id for one in got} == {event.adapter_id for event in events}
                routable |= {one.adapter_id for one in got}
                seen[tenant].extend(event.seq for event in events)
                if last:
                    break
            assert len(routable) == 24
        except BaseException as error:
            errors.append(error)

    followers = [threading.Thread(target=follower, args=(tenant,)) for tenant in (acme, beta)]
    publishers = [threading.Thread(target=publisher, args=(f"w{n}",)) for n in range(4)]
    for thread in followers + publishers:
        thread.start()
    for thread in publishers:
        thread.join()
    stop.set()
    for thread in followers:
        thread.join()
    assert errors == []
    assert seen == {acme: list(range(1, 25)), beta: list(range(1, 25))}


def test_deletions_publications_and_posts_at_once_do_not_deadlock(registry: Registry, acme: str) -> None:
    for n in range(20):
        registry.post_document(acme, f"T{n}", "x", f"ext-{n}")
    errors: list[BaseException] = []

    def guard(work: object, *arguments: object) -> threading.Thread:
        def run() -> None:
            try:
                work(*arguments)  # type: ignore[operator]
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def publish() -> None:
        while leased := registry.lease_jobs("w", 3, 60):
            for one in leased:
                try:
                    registry.publish(one.job.id, "w", one_part())
                except LeaseLost:
                    continue

    def delete() -> None:
        for n in range(0, 20, 2):
            registry.delete_document(acme, f"ext-{n}")

    def post() -> None:
        for n in range(1, 20, 2):
            registry.post_document(acme, f"T{n}", "y", f"ext-{n}", collection="c")

    threads = [guard(publish), guard(delete), guard(post), guard(lambda: registry.mark_stale("other", "other"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    publish()
    documents = registry.list_documents(acme).items
    assert len(documents) == 10 and all(one.state == "ready" and one.latest_version == 2 for one in documents)
    assert {one.document_id for one in registry.routable(acme)} == {one.id for one in documents}
    events = registry.changes_since(acme, 0)
    assert [event.seq for event in events] == list(range(1, registry.head(acme) + 1))


def test_names(registry: Registry, acme: str) -> None:
    waiting = registry.post_document(acme, "later", "x", collection="c").document
    assert registry.resolve_model(acme, waiting.id) == Resolution("document", waiting.id, ())
    events = [make_ready(registry, acme, f"T{n}", collection="c") for n in range(2)]
    adapter_id, document_id = events[0].adapter_id or "", events[0].document_id or ""
    assert registry.resolve_model(acme, adapter_id) == Resolution("adapter", adapter_id, (adapter_id,))
    assert registry.resolve_model(acme, document_id) == Resolution("document", document_id, (adapter_id,))
    collection_id = registry.list_collections(acme)[0].id
    found = registry.resolve_model(acme, collection_id)
    assert found == Resolution("collection", collection_id, (adapter_id, events[1].adapter_id or ""))
    registry.set_alias(acme, "docs-v3", document_id)
    assert registry.resolve_model(acme, "docs-v3") == Resolution("alias", document_id, (adapter_id,))
    registry.set_alias(acme, "docs-v3", collection_id)
    assert [(one.name, one.target) for one in registry.list_aliases(acme)] == [("docs-v3", collection_id)]
    assert registry.delete_alias(acme, "docs-v3") and not registry.delete_alias(acme, "docs-v3")
    for bad in ("imprint", "base", "BASE", "a:b", "a@b", "doc_x", "", "a b"):
        with pytest.raises(InvalidInput):
            registry.set_alias(acme, bad, document_id)
    with pytest.raises(InvalidInput):
        registry.set_alias(acme, "x", "docs-v3")
    with pytest.raises(NotFound):
        registry.set_alias(acme, "x", document_id[:-1] + ("0" if document_id[-1] != "0" else "1"))


def test_a_new_base_or_generator_makes_adapters_stale(registry: Registry, acme: str) -> None:
    beta = registry.create_tenant("beta").id
    first = make_ready(registry, acme, "A", external_id="a")
    second = make_ready(registry, acme, "B")
    other = make_ready(registry, beta, "C")
    pending = registry.post_document(acme, "A", "second version", "a")
    assert registry.mark_stale("base-1", "gen-1") == 0 and registry.head(acme) == 2
    assert registry.mark_stale("base-2", "gen-1") == 2, "A has a job under way already"
    assert registry.mark_stale("base-2", "gen-1") == 0
    assert registry.count_stale_pending() == 3
    events = registry.changes_since(acme, 2)
    assert [(event.kind, event.document_id, event.retired_adapter_ids) for event in events] == [
        ("adapters_stale", made.document_id, (made.adapter_id,)) for made in (first, second)
    ]
    assert registry.changes_since(beta, 1)[0].retired_adapter_ids == (other.adapter_id,) and registry.head(beta) == 2
    assert {one.state for one in registry.routable(acme) + registry.routable(beta)} == {"stale"}
    leased = registry.lease_jobs("w", 10, 60)
    assert len(leased) == 3 and pending.job.id in {one.job.id for one in leased}
    for one in leased:
        registry.publish(one.job.id, "w", one_part(base="base-2"))
    assert registry.count_stale_pending() == 0
    assert {one.state for one in registry.routable(acme) + registry.routable(beta)} == {"ready"}
    assert all(document.state == "ready" for document in registry.list_documents(acme).items)


def test_which_adapters_are_known_and_current(registry: Registry, acme: str) -> None:
    """Asked for all tenants at once, by whoever keeps files of adapters."""
    old = make_ready(registry, acme, "A", external_id="a").adapter_id or ""
    new = make_ready(registry, acme, "A", "two", external_id="a").adapter_id or ""
    other = make_ready(registry, registry.create_tenant("beta").id, "B").adapter_id or ""
    gone = make_ready(registry, acme, "C", external_id="c").adapter_id or ""
    registry.delete_document(acme, "c")
    registry.mark_stale("base-2", "gen-1")
    asked = {old, new, other, gone, "adp_unknown", *(f"adp_{number}" for number in range(1200))}
    assert registry.known_adapters(asked) == {old, new, other, gone}
    assert registry.current_adapters(asked) == {new, other}, "a stale adapter is its document's current one"
    assert registry.known_adapters(set()) == registry.current_adapters(set()) == set()
