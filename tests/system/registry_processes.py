"""What several processes do at once to one registry, as the replicas of a cluster do."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any

from serve.registry import LeaseLost, Registry
from tests.serve.registry_helpers import centroids, new_adapter, one_part

LEASE_S = 60.0
TIMEOUT_S = 300.0

_start: Barrier


@contextmanager
def at_once(*calls: tuple[Callable[..., Any], *tuple[Any, ...]]) -> Iterator[list[Future[Any]]]:
    """Run each (function, argument, ...) in a process of its own, all released at the same moment."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(calls))
    with ProcessPoolExecutor(len(calls), mp_context=context, initializer=_keep, initargs=(barrier,)) as pool:
        # No process can take a second call, for none gets past the barrier before all have one.
        yield [pool.submit(_released, *call) for call in calls]


def results(*calls: tuple[Callable[..., Any], *tuple[Any, ...]]) -> list[Any]:
    """What the calls of `at_once` return."""
    with at_once(*calls) as futures:
        return [future.result(TIMEOUT_S) for future in futures]


def make_adapters(url: str, worker: str, count: int) -> list[tuple[str, str]]:
    """Lease and publish until `count` jobs of the registry have ended; returns (job, adapter) of each of its own."""
    made = []
    deadline = time.monotonic() + TIMEOUT_S
    with closing(Registry.open(url)) as registry:
        while True:
            for leased in registry.lease_jobs(worker, 2, LEASE_S):
                adapter = new_adapter()
                try:
                    registry.publish(leased.job.id, worker, [(adapter, centroids())])
                except LeaseLost:  # its document was deleted
                    continue
                made.append((leased.job.id, adapter.id))
            jobs = registry.count_jobs()
            if jobs["succeeded"] + jobs["failed"] >= count:
                return made
            assert time.monotonic() < deadline, jobs


def publish_all(url: str, worker: str, job_ids: Sequence[str]) -> list[str]:
    """Publish jobs that are leased already, in this order; returns those that were not refused."""
    done = []
    with closing(Registry.open(url)) as registry:
        for job_id in job_ids:
            try:
                registry.publish(job_id, worker, one_part())
            except LeaseLost:
                continue
            done.append(job_id)
    return done


def post_versions(url: str, tenant_id: str, external_id: str, texts: Sequence[str]) -> list[int]:
    """Post the texts as versions of one document; returns their numbers."""
    with closing(Registry.open(url)) as registry:
        return [registry.post_document(tenant_id, "Title", text, external_id).version.number for text in texts]


def update_and_delete(url: str, tenant_id: str, external_ids: Sequence[str]) -> None:
    """Change the metadata of every document, then delete every second one."""
    with closing(Registry.open(url)) as registry:
        for number, external_id in enumerate(external_ids):
            registry.post_document(tenant_id, external_id, "text", external_id, metadata={"changed": True})
            if number % 2:
                registry.delete_document(tenant_id, external_id)


def _keep(barrier: Barrier) -> None:
    global _start
    _start = barrier


def _released(function: Callable[..., Any], *arguments: Any) -> Any:
    _start.wait(TIMEOUT_S)
    return function(*arguments)
