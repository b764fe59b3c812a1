"""Refine jobs: when they run, what they may replace, and what ends them."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest

from serve.registry import InvalidInput, LeaseLost, Registry
from serve.registry.jobs import MAX_ATTEMPTS
from serve.registry.records import LeasedJob
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    acme,
    clock,
    lease_one,
    make_ready,
    one_part,
    read,
    registry,
    several_parts,
    url,
)

# ruff: noqa: F811


def lease_refine(registry: Registry, tenant: str, **post: object) -> tuple[LeasedJob, list[str]]:
    """A document's refine job as a worker holds it, and the adapters that it starts from."""
    event = make_ready(registry, tenant, "T", refine_after_s=0, external_id="ext", **post)
    leased = lease_one(registry, "w1")
    assert (leased.job.kind, leased.document.id, leased.version.number) == ("refine", event.document_id, 1)
    return leased, [one.id for one in registry.current_adapters_of(tenant, event.document_id)]


def test_a_refine_job_waits_and_leaves_its_document_alone(registry: Registry, acme: str, clock: Clock) -> None:
    event = make_ready(registry, acme, "T", refine_after_s=30)
    before = read(registry, acme, event.document_id)
    assert before.state == "ready" and registry.count_jobs("refine")["queued"] == 1
    assert registry.count_jobs("generate") == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0}
    assert registry.count_jobs()["queued"] == 1
    clock.now += 29
    assert registry.lease_jobs("w1", 10, 60) == []
    clock.now += 1
    leased = lease_one(registry)
    assert (leased.job.kind, leased.job.version, leased.document.id) == ("refine", 1, event.document_id)
    assert read(registry, acme, event.document_id) == before, "neither queued nor running does it show"
    generate = registry.get_job(acme, before.job_id)
    assert generate is not None and generate.kind == "generate"


def test_no_refinement_is_asked_for_by_default(registry: Registry, acme: str) -> None:
    make_ready(registry, acme, "T")
    assert registry.count_jobs("refine") == dict.fromkeys(("queued", "running", "succeeded", "failed"), 0)


def test_refinements_come_one_by_one_when_nothing_else_waits(registry: Registry, acme: str) -> None:
    beta = registry.create_tenant("beta").id
    for number in range(3):
        make_ready(registry, acme, f"T{number}", refine_after_s=0)
    urgent = [registry.post_document(beta, f"U{number}", "x").job.id for number in range(2)]
    assert registry.generate_waits()
    assert [leased.job.id for leased in registry.lease_jobs("w1", 10, 60)] == urgent, "no batch holds both kinds"
    assert not registry.generate_waits()
    assert [leased.job.kind for leased in registry.lease_jobs("w2", 10, 60)] == ["refine"]
    later = registry.post_document(acme, "later", "x").job.id
    assert lease_one(registry, "w3").job.id == later
    assert [leased.job.kind for leased in registry.lease_jobs("w3", 10, 60)] == ["refine"]
    assert registry.release_leases("w2") == 1 and lease_one(registry, "w4").job.attempts == 1


def test_running_refinements_do_not_delay_their_tenants_documents(registry: Registry, acme: str) -> None:
    for number in range(2):
        make_ready(registry, acme, f"T{number}", refine_after_s=0)
    lease_one(registry, "w1")
    lease_one(registry, "w2")
    beta = registry.create_tenant("beta").id
    for tenant in (acme, beta, acme, beta):
        registry.post_document(tenant, f"new {registry.count_jobs()}", "x")
    assert {leased.job.tenant_id for leased in registry.lease_jobs("w3", 2, 60)} == {acme, beta}


def test_a_better_version_replaces_all_parts(registry: Registry, acme: str) -> None:
    leased, started_from = lease_refine(registry, acme, parts=several_parts(3))
    better = several_parts(2)
    event = registry.publish(leased.job.id, "w1", better, expected_adapter_ids=started_from)
    assert (event.kind, event.adapter_id) == ("adapter_published", better[0][0].id)
    assert list(event.retired_adapter_ids) == started_from
    document = read(registry, acme, "ext")
    assert document.adapter_ids == tuple(one.id for one, _ in better) and document.state == "ready"
    assert document.current_version == document.latest_version == 1 and document.job_id != leased.job.id
    assert registry.lease_jobs("w1", 10, 60) == [], "refined once"


def test_a_version_that_is_no_better_changes_nothing(registry: Registry, acme: str, clock: Clock) -> None:
    leased, started_from = lease_refine(registry, acme)
    before, head = read(registry, acme, "ext"), registry.head(acme)
    registry.set_job_progress(leased.job.id, "w1", "distilling", 0.5)
    job = registry.finish_job(leased.job.id, "w1", "No better: \x000.81 after 0.83.")
    assert (job.state, job.note, job.error, job.adapter_id) == ("succeeded", "No better: 0.81 after 0.83.", None, None)
    assert (job.worker, job.finished_at) == (None, clock.now) and registry.get_job(acme, job.id) == job
    assert read(registry, acme, "ext") == before and registry.head(acme) == head
    with pytest.raises(LeaseLost):
        registry.finish_job(job.id, "w1", "again")
    with pytest.raises(LeaseLost):
        registry.publish(job.id, "w1", one_part(), expected_adapter_ids=started_from)


def test_a_failed_refinement_does_not_fail_its_document(registry: Registry, acme: str, clock: Clock) -> None:
    leased, _ = lease_refine(registry, acme)
    for _ in range(MAX_ATTEMPTS):
        registry.fail_job(leased.job.id, "w1", "out of memory", retry=True)
        clock.now += 60
        registry.lease_jobs("w1", 1, 60)
    job = registry.get_job(acme, leased.job.id)
    assert job is not None and job.state == "failed"
    assert read(registry, acme, "ext").state == "ready"
    assert not registry.post_document(acme, "T", "text", "ext").created, "its content has not failed"


def test_a_new_version_ends_refinements_of_the_old_one(registry: Registry, acme: str) -> None:
    leased, started_from = lease_refine(registry, acme)
    posted = registry.post_document(acme, "T", "two", "ext")
    for lost in (
        lambda: registry.renew_lease(leased.job.id, "w1", 60),
        lambda: registry.set_job_progress(leased.job.id, "w1", "x", 0.5),
        lambda: registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from),
        lambda: registry.finish_job(leased.job.id, "w1", "no better"),
    ):
        with pytest.raises(LeaseLost):
            lost()
    job = registry.get_job(acme, leased.job.id)
    assert job is not None and (job.state, job.stage) == ("succeeded", "outdated")
    assert "posted again" in (job.note or "")
    assert list(read(registry, acme, "ext").adapter_ids) == started_from, "served until the new version is ready"
    assert lease_one(registry).job.id == posted.job.id
    registry.publish(posted.job.id, "w1", one_part(), refine_after_s=0)
    again = lease_one(registry)
    assert (again.job.kind, again.job.version) == ("refine", 2)


def test_a_queued_refinement_of_an_old_version_is_never_leased(registry: Registry, acme: str) -> None:
    make_ready(registry, acme, "T", refine_after_s=0, external_id="ext")
    registry.post_document(acme, "T", "two", "ext")
    assert [leased.job.kind for leased in registry.lease_jobs("w", 10, 60)] == ["generate"]
    assert registry.lease_jobs("w", 10, 60) == [] and registry.count_jobs("refine")["succeeded"] == 1


def test_the_same_content_and_new_properties_let_a_refinement_go_on(registry: Registry, acme: str) -> None:
    leased, started_from = lease_refine(registry, acme)
    registry.post_document(acme, "T", "text", "ext", metadata={"a": 1})
    registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from)


def test_a_change_of_base_ends_refinements(registry: Registry, acme: str) -> None:
    leased, started_from = lease_refine(registry, acme)
    assert registry.mark_stale("base-2", "gen-1") == 1
    with pytest.raises(LeaseLost):
        registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from)
    assert {one.state for one in registry.routable(acme)} == {"stale"}
    assert lease_one(registry).job.kind == "generate"


@pytest.mark.parametrize("expected", ["none", "first", "reversed", "others"])
def test_other_adapters_than_those_refined_stay(registry: Registry, acme: str, expected: str) -> None:
    leased, started_from = lease_refine(registry, acme, parts=several_parts(2))
    head = registry.head(acme)
    wrong = {
        "none": [], "first": started_from[:1], "reversed": started_from[::-1], "others": ["adp_x", "adp_y"]
    }[expected]  # fmt: skip
    refined = one_part()
    with pytest.raises(LeaseLost, match="no longer current"):
        registry.publish(leased.job.id, "w1", refined, expected_adapter_ids=wrong)
    assert registry.known_adapters({refined[0][0].id}) == set()
    job = registry.get_job(acme, leased.job.id)
    assert job is not None and (job.state, job.stage, job.adapter_id) == ("succeeded", "outdated", None)
    assert list(read(registry, acme, "ext").adapter_ids) == started_from and registry.head(acme) == head


def test_a_refinement_must_say_what_it_started_from(registry: Registry, acme: str) -> None:
    leased, started_from = lease_refine(registry, acme)
    with pytest.raises(InvalidInput, match="started from"):
        registry.publish(leased.job.id, "w1", one_part())
    assert registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from).seq == 2


def test_of_two_holders_of_a_refinement_only_the_later_one_publishes(
    registry: Registry, acme: str, clock: Clock
) -> None:
    leased, started_from = lease_refine(registry, acme)
    clock.now += 60
    assert lease_one(registry, "w2").job.id == leased.job.id
    with pytest.raises(LeaseLost):
        registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from)
    registry.publish(leased.job.id, "w2", one_part(), expected_adapter_ids=started_from)


def test_a_new_version_wins_over_a_refinement_that_ends_at_the_same_moment(registry: Registry, acme: str) -> None:
    for number in range(12):
        name = f"ext-{number}"
        make_ready(registry, acme, name, "one", external_id=name, refine_after_s=0)
        leased = lease_one(registry, "w1")
        started_from = list(read(registry, acme, name).adapter_ids)
        barrier = threading.Barrier(2)
        posted: list[str] = []

        def post(name: str = name, barrier: threading.Barrier = barrier, posted: list[str] = posted) -> None:
            barrier.wait(30)
            posted.append(registry.post_document(acme, name, "two", name).job.id)

        thread = threading.Thread(target=post)
        thread.start()
        barrier.wait(30)
        with suppress(LeaseLost):  # the post was first; else it comes after this and replaces it
            registry.publish(leased.job.id, "w1", one_part(), expected_adapter_ids=started_from, refine_after_s=0)
        thread.join()
        assert lease_one(registry, "w2").job.id == posted[0], "a refinement of the old version is not queued any more"
        new = one_part()
        assert registry.publish(posted[0], "w2", new).kind == "adapter_published"
        document = read(registry, acme, name)
        assert (document.state, document.current_version) == ("ready", 2)
        assert document.adapter_ids == (new[0][0].id,)
        assert registry.lease_jobs("w1", 10, 60) == []
