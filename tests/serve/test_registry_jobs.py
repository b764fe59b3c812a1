"""Leases, fairness, attempts."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from serve.registry import LeaseLost, Registry
from serve.registry.jobs import MAX_ATTEMPTS
from tests.serve.registry_helpers import (  # noqa: F401
    Clock,
    centroids,
    clock,
    lease_one,
    new_adapter,
    one_part,
    registry,
    url,
)

# ruff: noqa: F811


@pytest.fixture
def acme(registry: Registry) -> str:
    return registry.create_tenant("acme").id


def post(registry: Registry, tenant: str, count: int) -> list[str]:
    return [registry.post_document(tenant, f"T{n}", f"text {n}").job.id for n in range(count)]


def test_lease_and_finish(registry: Registry, acme: str, clock: Clock) -> None:
    (job_id,) = post(registry, acme, 1)
    leased = lease_one(registry, "w1", 60)
    assert leased.job.id == job_id and leased.version.text == "text 0" and leased.document.title == "T0"
    assert (leased.job.state, leased.job.attempts, leased.job.worker) == ("running", 1, "w1")
    assert leased.job.lease_expires_at == clock.now + 60
    assert registry.lease_jobs("w2", 10, 60) == []
    registry.set_job_progress(job_id, "w1", "generating", 0.5)
    job = registry.get_job(acme, job_id)
    assert job is not None and (job.stage, job.fraction) == ("generating", 0.5)
    adapter = new_adapter(state="degraded")
    registry.publish(job_id, "w1", [(adapter, centroids())])
    job = registry.get_job(acme, job_id)
    assert job is not None
    assert (job.state, job.fraction, job.adapter_id, job.finished_at) == ("succeeded", 1.0, adapter.id, clock.now)
    document = registry.get_document(acme, job.document_id)
    assert document is not None and document.state == "degraded"
    assert registry.lease_jobs("w2", 10, 60) == []
    assert registry.count_jobs() == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0}


def test_an_expired_lease_is_taken_again_and_the_loser_cannot_publish(
    registry: Registry, acme: str, clock: Clock
) -> None:
    (job_id,) = post(registry, acme, 1)
    lease_one(registry, "w1", 60)
    clock.now += 59
    assert registry.lease_jobs("w2", 1, 60) == []
    clock.now += 1
    again = lease_one(registry, "w2", 60)
    assert again.job.id == job_id and again.job.attempts == 2
    for lost in (
        lambda: registry.publish(job_id, "w1", one_part()),
        lambda: registry.renew_lease(job_id, "w1", 60),
        lambda: registry.set_job_progress(job_id, "w1", "x", 0.1),
        lambda: registry.fail_job(job_id, "w1", "x"),
        lambda: registry.publish("job_unknown", "w1", one_part()),
    ):
        with pytest.raises(LeaseLost):
            lost()
    assert registry.list_adapters(acme).items == [] and registry.head(acme) == 0
    registry.publish(job_id, "w2", one_part())
    with pytest.raises(LeaseLost):
        registry.publish(job_id, "w2", one_part())
    assert len(registry.list_adapters(acme).items) == 1 and registry.head(acme) == 1


def test_a_late_worker_that_nobody_replaced_may_still_publish(registry: Registry, acme: str, clock: Clock) -> None:
    (job_id,) = post(registry, acme, 1)
    lease_one(registry, "w1", 60)
    clock.now += 1000
    registry.publish(job_id, "w1", one_part())
    assert registry.lease_jobs("w2", 1, 60) == []


def test_renewal_holds_others_off(registry: Registry, acme: str, clock: Clock) -> None:
    (job_id,) = post(registry, acme, 1)
    lease_one(registry, "w1", 60)
    for _ in range(5):
        clock.now += 50
        registry.renew_lease(job_id, "w1", 60)
        assert registry.lease_jobs("w2", 1, 60) == []


def test_a_job_that_ends_its_workers_is_given_up(registry: Registry, acme: str, clock: Clock) -> None:
    (job_id,) = post(registry, acme, 1)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert lease_one(registry, f"w{attempt}", 60).job.attempts == attempt
        clock.now += 60
    assert registry.lease_jobs("last", 1, 60) == []
    job = registry.get_job(acme, job_id)
    assert job is not None and job.state == "failed" and "Gave up" in (job.error or "")


def test_failures_with_and_without_retry(registry: Registry, acme: str, clock: Clock) -> None:
    (job_id,) = post(registry, acme, 1)
    pauses = []
    for attempt in range(1, MAX_ATTEMPTS + 1):
        lease_one(registry)
        job = registry.fail_job(job_id, "w1", "disk \x00full", retry=True)
        assert job.error == "disk full" and job.worker is None
        if attempt < MAX_ATTEMPTS:
            assert job.state == "queued" and job.finished_at is None
            pause = 0
            while not registry.lease_jobs("probe", 1, 60):
                clock.now += 1
                pause += 1
            registry.release_leases("probe")
            pauses.append(pause)
    assert pauses == [1, 2, 4, 8]
    assert job.state == "failed" and job.finished_at == clock.now
    (other,) = [registry.post_document(acme, "other", "x").job.id]
    lease_one(registry)
    assert registry.fail_job(other, "w1", "empty text").state == "failed"
    assert registry.lease_jobs("w1", 1, 60) == []


def test_a_worker_that_stops_in_order_gives_its_jobs_back(registry: Registry, acme: str) -> None:
    post(registry, acme, 3)
    assert len(registry.lease_jobs("w1", 2, 60)) == 2 and len(registry.lease_jobs("w2", 1, 60)) == 1
    assert registry.release_leases("w1") == 2
    again = registry.lease_jobs("w3", 5, 60)
    assert len(again) == 2 and all(leased.job.attempts == 1 for leased in again)


def test_a_small_tenant_does_not_wait_behind_a_large_one(registry: Registry, acme: str) -> None:
    beta, gamma = registry.create_tenant("beta").id, registry.create_tenant("gamma").id
    post(registry, acme, 50)
    post(registry, beta, 3)
    post(registry, gamma, 1)
    batch = Counter(leased.job.tenant_id for leased in registry.lease_jobs("w", 7, 60))
    assert batch == {acme: 3, beta: 3, gamma: 1}
    registry.release_leases("w")
    # one at a time, each done before the next is taken: turns rotate
    order = []
    for _ in range(6):
        leased = lease_one(registry)
        order.append(leased.job.tenant_id)
        registry.publish(leased.job.id, "w1", one_part())
    assert Counter(order)[gamma] == 1 and Counter(order)[beta] >= 2 and order.count(acme) <= 3


def test_running_jobs_count_against_a_tenant(registry: Registry, acme: str) -> None:
    post(registry, acme, 10)
    assert len(registry.lease_jobs("w1", 4, 60)) == 4
    beta = registry.create_tenant("beta").id
    post(registry, beta, 10)
    assert [leased.job.tenant_id for leased in registry.lease_jobs("w2", 4, 60)] == [beta] * 4


def test_a_tenants_jobs_run_oldest_first(registry: Registry, acme: str) -> None:
    made = post(registry, acme, 5)
    assert [leased.job.id for leased in registry.lease_jobs("w", 5, 60)] == made


def test_concurrent_workers_never_share_a_job(registry: Registry, acme: str) -> None:
    beta = registry.create_tenant("beta").id
    made = post(registry, acme, 20) + post(registry, beta, 20)
    taken: list[str] = []
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(100):
                leased = registry.lease_jobs(name, 3, 60)
                taken.extend(one.job.id for one in leased)
                for one in leased:
                    registry.publish(one.job.id, name, one_part())
                if len(taken) >= len(made):
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and sorted(taken) == sorted(made)
