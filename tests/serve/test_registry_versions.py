"""Going back to another version: which adapters serve, what becomes of jobs, and what the change log says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.ids import new_id
from serve.registry import Conflict, InvalidInput, LeaseLost, NotFound, Registry, VersionNotFound
from serve.registry.records import Document
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    clock,
    make_ready,
    one_part,
    registry,
    several_parts,
    url,
)

# ruff: noqa: F811


@pytest.fixture
def acme(registry: Registry) -> str:
    return registry.create_tenant("acme").id


def current(registry: Registry, tenant: str, name: str = "ext") -> Document:
    """The document as it stands, after checking that all ways to its adapters agree."""
    document = registry.get_document(tenant, name)
    assert document is not None
    assert document == next(one for one in registry.list_documents(tenant).items if one.id == document.id)
    found = registry.resolve_model(tenant, document.id)
    assert found is not None and found.adapter_ids == document.adapter_ids
    routable = registry.routable(tenant, [document.id])
    assert tuple(one.adapter_id for one in routable) == document.adapter_ids
    assert {one.version for one in routable} <= {document.current_version}
    assert document.adapter_id == (document.adapter_ids or (None,))[0]
    return document


def three_versions(registry: Registry, tenant: str) -> list[tuple[str, ...]]:
    """A document `ext` whose three versions have one, two and three parts; their adapters' IDs."""
    sets = []
    for number in (1, 2, 3):
        parts = several_parts(number)
        make_ready(registry, tenant, f"T{number}", f"text {number}", parts, external_id="ext")
        sets.append(tuple(adapter.id for adapter, _ in parts))
    return sets


def test_rollback_serves_what_the_version_had(registry: Registry, acme: str) -> None:
    first, second, third = three_versions(registry, acme)
    head = registry.head(acme)
    done = registry.rollback_document(acme, "ext", 1)
    document = current(registry, acme)
    assert done.document == document and done.job.state == "succeeded" and done.job.id == document.job_id
    assert (document.version, document.current_version, document.latest_version) == (1, 1, 3)
    assert (document.adapter_ids, document.state, document.title) == (first, "ready", "T1")
    version = registry.get_version(acme, document.id)
    assert version is not None and (version.number, version.text) == (1, "text 1")
    (event,) = registry.changes_since(acme, head)
    assert (event.kind, event.document_id) == ("document_rolled_back", document.id)
    assert (event.adapter_id, event.retired_adapter_ids) == (first[0], third)
    # Forward again, by ID as well.
    assert registry.rollback_document(acme, document.id, 3).document.adapter_ids == third
    assert current(registry, acme).adapter_ids == third
    assert registry.rollback_document(acme, "ext", 2).document.adapter_ids == second


def test_rollback_to_what_is_served_changes_nothing(registry: Registry, acme: str) -> None:
    three_versions(registry, acme)
    first = registry.rollback_document(acme, "ext", 2)
    head = registry.head(acme)
    assert registry.rollback_document(acme, "ext", 2) == first
    assert registry.head(acme) == head and registry.count_jobs()["queued"] == 0


def test_by_default_the_newest_before_this_one_that_can_serve(registry: Registry, acme: str) -> None:
    sets = three_versions(registry, acme)
    posted = registry.post_document(acme, "T4", "text 4", "ext")
    (leased,) = registry.lease_jobs("w", 1, 60)
    registry.fail_job(leased.job.id, "w", "too odd")
    registry.post_document(acme, "T5", "text 5", "ext")
    # A version that is not served yet is taken back as well: what was served stays.
    assert registry.rollback_document(acme, "ext").document.adapter_ids == sets[2]
    assert current(registry, acme).version == 3
    assert registry.rollback_document(acme, "ext").document.adapter_ids == sets[1]
    assert registry.rollback_document(acme, "ext").document.adapter_ids == sets[0]
    with pytest.raises(Conflict, match="No version before 1 .* versions 1 to 5"):
        registry.rollback_document(acme, "ext")
    assert current(registry, acme).adapter_ids == sets[0]
    assert registry.rollback_document(acme, posted.document.id, 3).document.adapter_ids == sets[2]


def test_unknown_documents_and_versions(registry: Registry, acme: str) -> None:
    three_versions(registry, acme)
    for number in (4, 0, -1):
        with pytest.raises(VersionNotFound, match=f"no version {number}; it has versions 1 to 3"):
            registry.rollback_document(acme, "ext", number)
    other = registry.create_tenant("globex").id
    document = current(registry, acme)
    for tenant, name in ((other, document.id), (other, "ext"), (acme, new_id("doc")), (acme, "x\x00")):
        with pytest.raises(NotFound, match="no such document"):
            registry.rollback_document(tenant, name, 1)
    registry.delete_document(acme, "ext")
    with pytest.raises(NotFound):
        registry.rollback_document(acme, document.id, 1)
    assert registry.list_versions(acme, document.id).items == []
    single = make_ready(registry, acme, "S", external_id="single")
    with pytest.raises(VersionNotFound, match="it has version 1"):
        registry.rollback_document(acme, single.document_id, 2)


def test_a_version_posted_after_a_rollback_gets_a_new_number(registry: Registry, acme: str) -> None:
    three_versions(registry, acme)
    registry.rollback_document(acme, "ext", 1)
    assert not registry.post_document(acme, "T1", "text 1", "ext").created, "this is what is served"
    posted = registry.post_document(acme, "T2", "text 2", "ext")
    assert posted.created and posted.version.number == 4, "an older text is a new version"
    (leased,) = registry.lease_jobs("w", 1, 60)
    parts = one_part()
    assert registry.publish(leased.job.id, "w", parts).kind == "adapter_published"
    document = current(registry, acme)
    assert (document.version, document.current_version, document.latest_version) == (4, 4, 4)
    assert document.adapter_ids == (parts[0][0].id,)


def test_what_is_being_made_of_a_later_version_does_not_undo_a_rollback(registry: Registry, acme: str) -> None:
    (first, *_) = three_versions(registry, acme)
    running = registry.post_document(acme, "T4", "text 4", "ext")
    registry.lease_jobs("w", 1, 60)
    queued = registry.post_document(acme, "T5", "text 5", "ext")
    registry.rollback_document(acme, "ext", 1)
    cancelled = registry.get_job(acme, queued.job.id)
    assert cancelled is not None and cancelled.state == "failed" and "rolled back to version 1" in str(cancelled.error)
    assert registry.lease_jobs("w2", 10, 60) == []
    parts = several_parts(2)
    event = registry.publish(running.job.id, "w", parts, refine_after_s=0)
    assert (event.kind, event.retired_adapter_ids) == ("adapter_superseded", ())
    assert current(registry, acme).adapter_ids == first
    assert registry.lease_jobs("w2", 10, 60) == [], "what is not served is not refined"
    # It was made, so it can be gone to at once; version 5 must be generated.
    assert registry.rollback_document(acme, "ext", 4).document.adapter_ids == tuple(one.id for one, _ in parts)
    five = registry.rollback_document(acme, "ext", 5)
    assert five.job.state == "queued" and five.job.id != queued.job.id
    assert (five.document.version, five.document.current_version, five.document.state) == (5, 4, "processing")


def test_a_job_that_crashed_and_is_taken_up_again_does_not_undo_a_rollback(
    registry: Registry, acme: str, clock: Clock
) -> None:
    (first, *_) = three_versions(registry, acme)
    registry.post_document(acme, "T4", "text 4", "ext")
    registry.lease_jobs("w", 1, 60)
    registry.rollback_document(acme, "ext", 1)
    clock.now += 61
    (again,) = registry.lease_jobs("w2", 1, 60)
    assert again.version.text == "text 4"
    assert registry.publish(again.job.id, "w2", one_part()).kind == "adapter_superseded"
    assert current(registry, acme).adapter_ids == first


def test_refined_adapters_win_and_running_refinements_end(registry: Registry, acme: str) -> None:
    event = make_ready(registry, acme, "T1", "text 1", external_id="ext", refine_after_s=0)
    (leased,) = registry.lease_jobs("w", 1, 60)
    refined = one_part()
    registry.publish(leased.job.id, "w", refined, expected_adapter_ids=[str(event.adapter_id)])
    make_ready(registry, acme, "T2", "text 2", external_id="ext", refine_after_s=0)
    (held,) = registry.lease_jobs("w", 1, 60)
    assert (held.job.kind, held.job.version) == ("refine", 2)
    started_from = current(registry, acme).adapter_ids
    done = registry.rollback_document(acme, "ext", 1)
    assert done.document.adapter_ids == (refined[0][0].id,)
    assert (done.job.kind, done.job.version, done.document.state) == ("generate", 1, "ready")
    with pytest.raises(LeaseLost):
        registry.publish(held.job.id, "w", one_part(), expected_adapter_ids=started_from)
    assert current(registry, acme).adapter_ids == (refined[0][0].id,)
    ended = registry.get_job(acme, held.job.id)
    assert ended is not None and ended.note == "The document was rolled back to version 1."


def test_a_version_without_adapters_is_generated_while_the_other_serves(registry: Registry, acme: str) -> None:
    failed = registry.post_document(acme, "T1", "text 1", "ext")
    (leased,) = registry.lease_jobs("w", 1, 60)
    registry.fail_job(leased.job.id, "w", "out of memory")
    serving = make_ready(registry, acme, "T2", "text 2", external_id="ext")
    head = registry.head(acme)
    done = registry.rollback_document(acme, "ext", 1)
    assert done.job.state == "queued" and done.job.id != failed.job.id and done.job.version == 1
    document = current(registry, acme)
    assert (document.version, document.current_version, document.state) == (1, 2, "processing")
    assert document.adapter_ids == (serving.adapter_id,) and registry.head(acme) == head
    assert registry.rollback_document(acme, "ext", 1) == done, "asked for again it is not queued twice"
    (leased,) = registry.lease_jobs("w", 10, 60)
    assert leased.version.text == "text 1"
    parts = one_part()
    event = registry.publish(leased.job.id, "w", parts)
    assert (event.kind, event.retired_adapter_ids) == ("adapter_published", (serving.adapter_id,))
    document = current(registry, acme)
    assert (document.version, document.current_version, document.latest_version) == (1, 1, 2)


def test_a_version_under_way_is_waited_for(registry: Registry, acme: str) -> None:
    make_ready(registry, acme, "T1", "text 1", external_id="ext")
    two = registry.post_document(acme, "T2", "text 2", "ext")
    registry.lease_jobs("w", 1, 60)
    registry.rollback_document(acme, "ext", 1)
    done = registry.rollback_document(acme, "ext", 2)
    assert (done.job.id, done.job.state, done.document.state) == (two.job.id, "running", "processing")
    assert registry.publish(two.job.id, "w", one_part()).kind == "adapter_published"
    assert current(registry, acme).current_version == 2


def test_stale_versions_are_generated_again(registry: Registry, acme: str) -> None:
    three_versions(registry, acme)
    registry.rollback_document(acme, "ext", 2)
    assert registry.mark_stale("base-2", "gen-1") == 1
    (leased,) = registry.lease_jobs("w", 10, 60)
    assert leased.version.number == 2, "the version that is served, not the newest one"
    assert [one.state for one in registry.list_versions(acme, leased.document.id).items] == [
        "stale", "processing", "stale",
    ]  # fmt: skip
    with pytest.raises(Conflict):
        registry.rollback_document(acme, "ext")
    new = one_part(base="base-2")
    registry.publish(leased.job.id, "w", new)
    assert current(registry, acme).adapter_ids == (new[0][0].id,)
    done = registry.rollback_document(acme, "ext", 3)
    assert done.job.state == "queued" and done.document.adapter_ids == (new[0][0].id,)
    assert registry.mark_stale("base-2", "gen-1") == 0
    (leased,) = registry.lease_jobs("w", 10, 60)
    newest = several_parts(2, base="base-2")
    registry.publish(leased.job.id, "w", newest)
    assert current(registry, acme).adapter_ids == tuple(one.id for one, _ in newest)
    # Of version 2 the adapters that fit the base are taken, not the stale ones.
    assert registry.rollback_document(acme, "ext").document.adapter_ids == (new[0][0].id,)


def test_a_rollback_while_adapters_go_stale_is_generated_again(registry: Registry, acme: str) -> None:
    names = [f"ext-{number}" for number in range(16)]
    for name in names:
        make_ready(registry, acme, name, "one", external_id=name)
        make_ready(registry, acme, name, "two", one_part(base="base-2"), external_id=name)
    with ThreadPoolExecutor(4) as pool:
        marked = pool.submit(registry.mark_stale, "base-2", "gen-1")
        list(pool.map(lambda name: registry.rollback_document(acme, name, 1), reversed(names)))
        marked.result()
    # Whichever came first: nobody is left with stale adapters and no job to replace them.
    for name in names:
        document = current(registry, acme, name)
        assert (document.version, document.state) == (1, "processing")
    leased = registry.lease_jobs("w", 100, 60)
    assert sorted(item.document.external_id or "" for item in leased) == sorted(names)
    assert {item.job.version for item in leased} == {1}


def test_a_degraded_version_comes_back_degraded(registry: Registry, acme: str) -> None:
    make_ready(registry, acme, "T1", "text 1", several_parts(2, ["degraded", "ready"]), external_id="ext")
    make_ready(registry, acme, "T2", "text 2", external_id="ext")
    document = registry.rollback_document(acme, "ext").document
    assert (document.state, document.degraded_parts) == ("ready", (0,))


def test_list_of_versions(registry: Registry, acme: str) -> None:
    sets = three_versions(registry, acme)
    queued = registry.post_document(acme, "T4", "text 4", "ext")
    document = registry.rollback_document(acme, "ext", 2).document
    page = registry.list_versions(acme, document.id)
    assert page.next_cursor is None
    rows = [(one.number, one.state, one.current, one.adapter_ids, one.title) for one in page.items]
    assert rows == [
        (4, "failed", False, (), "T4"),
        (3, "ready", False, sets[2], "T3"),
        (2, "ready", True, sets[1], "T2"),
        (1, "ready", False, sets[0], "T1"),
    ]
    assert page.items[0].job_id == queued.job.id and page.items[2].job_id == document.job_id
    first = registry.list_versions(acme, document.id, limit=3)
    rest = registry.list_versions(acme, document.id, limit=3, cursor=first.next_cursor)
    assert [one.number for one in (*first.items, *rest.items)] == [4, 3, 2, 1] and rest.next_cursor is None
    for cursor in ("x", "-1", "", "1" * 30, "²"):
        with pytest.raises(InvalidInput):
            registry.list_versions(acme, document.id, cursor=cursor)
    assert registry.list_versions(registry.create_tenant("globex").id, document.id).items == []


def test_rollbacks_and_posts_at_once_leave_one_version(registry: Registry, acme: str) -> None:
    sets = dict(enumerate(three_versions(registry, acme), 1))

    def work(number: int) -> None:
        if number % 4 == 3:
            registry.post_document(acme, f"N{number}", f"new {number}", "ext")
            for leased in registry.lease_jobs(f"w{number}", 5, 60):
                parts = one_part()
                sets[leased.job.version] = (parts[0][0].id,)
                registry.publish(leased.job.id, f"w{number}", parts)
        else:
            registry.rollback_document(acme, "ext", 1 + number % 3)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(36)))
    document = current(registry, acme)
    assert document.latest_version == 3 + 9
    assert document.state == "ready" and document.current_version == document.version
    assert document.adapter_ids == sets[document.version]
    head = registry.head(acme)
    assert [event.seq for event in registry.changes_since(acme, 0)] == list(range(1, head + 1))
