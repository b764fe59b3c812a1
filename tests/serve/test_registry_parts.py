"""Documents with several adapters: published, replaced, looked up and removed as one."""

from __future__ import annotations

import pytest

from serve.registry import InvalidInput, Registry
from serve.registry.records import NewAdapter, NewCentroids, Resolution
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    acme,
    clock,
    lease_one,
    make_ready,
    new_adapter,
    one_part,
    read,
    registry,
    several_parts,
    url,
)

# ruff: noqa: F811

Parts = list[tuple[NewAdapter, NewCentroids]]


def ids(parts: Parts) -> tuple[str, ...]:
    return tuple(adapter.id for adapter, _ in parts)


def test_all_parts_are_published_at_once_and_found_in_order(registry: Registry, acme: str) -> None:
    parts = several_parts(3)
    event = make_ready(registry, acme, "Long", "x" * 12, parts, external_id="ext", collection="c")
    assert (event.kind, event.adapter_id, event.retired_adapter_ids) == ("adapter_published", ids(parts)[0], ())
    assert event.seq == registry.head(acme) == 1, "one change for all parts"
    document = read(registry, acme, "ext")
    assert (document.state, document.adapter_id, document.adapter_ids) == ("ready", ids(parts)[0], ids(parts))
    assert registry.list_documents(acme).items == [document]
    job = registry.get_job(acme, document.job_id)
    assert job is not None and (job.state, job.adapter_id) == ("succeeded", ids(parts)[0])
    found = registry.current_adapters_of(acme, document.id)
    assert [(one.id, one.part, one.parts, one.job_id) for one in found] == [
        (adapter_id, part, 3, job.id) for part, adapter_id in enumerate(ids(parts))
    ]
    assert registry.current_adapters_of(registry.create_tenant("beta").id, document.id) == []
    assert registry.current_adapters_of(acme, "doc_\x00") == []
    entries = registry.routable(acme, [document.id])
    assert [(one.adapter_id, one.part, one.parts, one.spans, one.version) for one in entries] == [
        (adapter_id, part, 3, ((4 * part, 4 * part + 4),), 1) for part, adapter_id in enumerate(ids(parts))
    ]
    assert [float(one.centroids[0, 0]) for one in entries] == [1.0, 2.0, 3.0], "each part has its own vectors"
    # Adapter IDs of one publication need not sort in order of part.
    assert registry.resolve_model(acme, document.id) == Resolution("document", document.id, ids(parts))
    assert registry.resolve_model(acme, ids(parts)[1]) == Resolution("adapter", ids(parts)[1], (ids(parts)[1],))
    registry.set_alias(acme, "long", document.id)
    assert registry.resolve_model(acme, "long") == Resolution("alias", document.id, ids(parts))
    other = make_ready(registry, acme, "Short", collection="c")
    collection = registry.resolve_model(acme, document.collection_id or "")
    assert collection is not None and collection.adapter_ids == (*ids(parts), other.adapter_id)


def test_order_is_that_of_parts_not_of_ids(registry: Registry, acme: str) -> None:
    third, second, first = (new_adapter(part=part, parts=3) for part in (2, 1, 0))
    assert third.id < second.id < first.id
    centroids = several_parts(1)[0][1]
    event = make_ready(registry, acme, "Long", parts=[(one, centroids) for one in (first, second, third)])
    wanted = (first.id, second.id, third.id)
    document = read(registry, acme, event.document_id)
    found = registry.resolve_model(acme, document.id)
    assert document.adapter_ids == wanted and found is not None and found.adapter_ids == wanted
    assert tuple(one.id for one in registry.current_adapters_of(acme, document.id)) == wanted
    assert tuple(one.adapter_id for one in registry.routable(acme)) == wanted


def test_a_publication_retires_all_that_was_current(registry: Registry, acme: str, clock: Clock) -> None:
    old, new, last = several_parts(3), several_parts(2), one_part()
    make_ready(registry, acme, "T", "one", old, external_id="ext")
    event = make_ready(registry, acme, "T", "two", new, external_id="ext")
    assert event.retired_adapter_ids == ids(old)
    assert read(registry, acme, "ext").adapter_ids == ids(new)
    assert make_ready(registry, acme, "T", "three", last, external_id="ext").retired_adapter_ids == ids(new)
    assert [one.adapter_id for one in registry.routable(acme)] == list(ids(last))
    assert registry.current_adapters({*ids(old), *ids(new), *ids(last)}) == {*ids(last)}
    for adapter_id in (*ids(old), *ids(new)):
        kept = registry.get_adapter(acme, adapter_id)
        assert kept is not None and kept.retired_at == clock.now and kept.state == "ready"


def test_parts_of_an_older_version_do_not_become_current(registry: Registry, acme: str) -> None:
    old = registry.post_document(acme, "T", "one", "ext")
    lease_one(registry, "w")
    registry.post_document(acme, "T", "two", "ext")
    late = several_parts(2)
    event = registry.publish(old.job.id, "w", late, refine_after_s=0)
    assert (event.kind, event.adapter_id) == ("adapter_superseded", ids(late)[0])
    assert registry.routable(acme) == registry.current_adapters_of(acme, event.document_id) == []
    assert registry.count_jobs("refine")["queued"] == 0, "nobody improves what is not served"
    assert read(registry, acme, "ext").adapter_ids == ()


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["ready", "ready"], "ready"),
        (["ready", "degraded"], "ready"),
        (["degraded", "ready"], "ready"),
        (["degraded", "degraded"], "degraded"),
    ],
)
def test_a_document_is_ready_with_its_first_good_part(
    registry: Registry, acme: str, states: list[str], state: str
) -> None:
    event = make_ready(registry, acme, "T", parts=several_parts(2, states))
    document = read(registry, acme, event.document_id)
    assert document.state == state
    assert document.degraded_parts == tuple(i for i, one in enumerate(states) if one == "degraded")
    assert [one.state for one in registry.routable(acme)] == states


@pytest.mark.parametrize("numbers", [[], [(0, 2)], [(1, 1)], [(0, 2), (0, 2)], [(1, 2), (0, 2)], [(0, 2), (1, 3)]])
def test_parts_must_all_be_there_in_order(registry: Registry, acme: str, numbers: list[tuple[int, int]]) -> None:
    posted = registry.post_document(acme, "T", "x")
    lease_one(registry)
    centroids = several_parts(1)[0][1]
    with pytest.raises(InvalidInput, match="numbered from 0"):
        registry.publish(
            posted.job.id, "w1", [(new_adapter(part=part, parts=parts), centroids) for part, parts in numbers]
        )
    job = registry.get_job(acme, posted.job.id)
    assert job is not None and job.state == "running" and registry.head(acme) == 0


def test_one_bad_part_publishes_none(registry: Registry, acme: str) -> None:
    posted = registry.post_document(acme, "T", "x")
    lease_one(registry)
    (good, centroids), (bad, _) = several_parts(2)
    with pytest.raises(InvalidInput):
        registry.publish(posted.job.id, "w1", [(good, centroids), (bad, NewCentroids("e", "1", centroids.matrix[:0]))])
    assert registry.list_adapters(acme).items == registry.routable(acme) == []
    assert registry.known_adapters({good.id, bad.id}) == set()


def test_deletion_takes_all_parts(registry: Registry, acme: str, clock: Clock) -> None:
    parts = several_parts(3)
    event = make_ready(registry, acme, "T", parts=parts, refine_after_s=0)
    deleted = registry.delete_document(acme, event.document_id)
    assert deleted is not None and set(deleted.retired_adapter_ids) == set(ids(parts))
    assert registry.routable(acme) == registry.current_adapters_of(acme, event.document_id) == []
    clock.now += 1
    assert {one.id for one in registry.list_purgeable(clock.now)} == set(ids(parts))
    assert registry.lease_jobs("w", 1, 60) == [], "nor is there anything to refine"


def test_a_document_with_stale_parts_is_queued_once(registry: Registry, acme: str) -> None:
    parts, refined = several_parts(3), several_parts(2)
    first = make_ready(registry, acme, "T", "one", parts)
    other = make_ready(registry, acme, "U", parts=refined)
    assert registry.mark_stale("base-2", "gen-1") == registry.count_stale_pending() == 2
    events = registry.changes_since(acme, other.seq)
    assert [(event.document_id, event.retired_adapter_ids) for event in events] == [
        (first.document_id, ids(parts)), (other.document_id, ids(refined))
    ]  # fmt: skip
    assert {one.state for one in registry.routable(acme)} == {"stale"} and len(registry.routable(acme)) == 5
    for leased in registry.lease_jobs("w", 10, 60):
        registry.publish(leased.job.id, "w", several_parts(2, base="base-2"))
    assert registry.count_stale_pending() == 0 and registry.mark_stale("base-2", "gen-1") == 0
    assert {one.state for one in registry.routable(acme)} == {"ready"} and len(registry.routable(acme)) == 4


@pytest.mark.parametrize("chunks", [None, [], [{"index": 0}], [{"start": "a", "end": 1}], 7, [3]])
def test_a_manifest_without_spans_stands_for_all_of_the_text(registry: Registry, acme: str, chunks: object) -> None:
    make_ready(registry, acme, "T", parts=one_part(manifest={"chunks": chunks}))
    assert registry.routable(acme)[0].spans == ()


def test_many_documents_are_looked_up_in_batches(registry: Registry, acme: str) -> None:
    event = make_ready(registry, acme, "T")
    asked = [*(f"doc_{number}" for number in range(1200)), event.document_id]
    assert [one.document_id for one in registry.routable(acme, asked)] == [event.document_id]
