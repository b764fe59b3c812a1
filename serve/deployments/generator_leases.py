"""The jobs that a generator's worker holds: taking them, telling their progress, ending them, and losing them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from serve.config import GeneratorConfig
from serve.registry import LeaseLost, Registry
from serve.registry.records import Job, LeasedJob

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5


class Stopping(Exception):
    """The worker was told to stop; what it holds goes back to the queue."""


class HeldJobs:
    """One worker's jobs. May be shared by the thread that works and the one that renews the leases."""

    def __init__(self, registry: Registry, worker: str, config: GeneratorConfig, stop: threading.Event) -> None:
        """`worker` is the name that the registry knows the jobs' holder by. `stop` is set when it is to end."""
        self.worker = worker
        self._registry = registry
        self._config = config
        self._stop = stop
        self._held: set[str] = set()
        self._lock = threading.Lock()

    def take(self, limit: int) -> list[LeasedJob]:
        """Lease up to `limit` jobs."""
        leased = self._registry.lease_jobs(self.worker, limit, self._config.lease_s)
        with self._lock:
            self._held |= {item.job.id for item in leased}
        return leased

    def holds(self, item: LeasedJob) -> bool:
        """Whether the job is still this worker's, as far as is known."""
        with self._lock:
            return item.job.id in self._held

    def let_go(self, item: LeasedJob) -> None:
        """Renew the job's lease no more."""
        self._drop(item.job.id)

    def clear(self) -> None:
        """Renew no lease any more."""
        with self._lock:
            self._held.clear()

    def give_back(self, item: LeasedJob) -> bool:
        """Queue the only job that is held again; this start does not count as an attempt. False: it had ended."""
        self.let_go(item)
        return self._registry.release_leases(self.worker) > 0

    def renew(self) -> None:
        """Push out the ends of all leases; a job that turns out to be lost is no longer held."""
        with self._lock:
            held = list(self._held)
        for job_id in held:
            try:
                self._registry.renew_lease(job_id, self.worker, self._config.lease_s)
            except LeaseLost:
                self._drop(job_id)
            except Exception:
                logger.exception("lease of %s could not be renewed", job_id)

    def progress(self, item: LeasedJob, stage: str, fraction: float) -> None:
        """Tell how far a job is (0..1). Raises LeaseLost."""
        try:
            self._registry.set_job_progress(item.job.id, self.worker, stage, fraction)
        except LeaseLost:
            self.let_go(item)
            raise

    def steps(self, item: LeasedJob, stage: str, first: float, last: float) -> Callable[[float], None]:
        """A callback for the share of a long stage that is done (0..1), which runs over `first`..`last` of the job.

        It writes now and then only. A job that is lost shows in `holds`; the callback raises nothing.
        """
        written = time.monotonic()

        def done(share: float) -> None:
            nonlocal written
            if time.monotonic() - written < PROGRESS_EVERY_S:
                return
            written = time.monotonic()
            try:
                self.progress(item, stage, first + (last - first) * share)
            except LeaseLost as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("progress of %s could not be told", item.job.id)

        return done

    def cancelled(self, item: LeasedJob) -> bool:
        """Whether work on the job is in vain: it is lost, or the worker is to stop."""
        return self._stop.is_set() or not self.holds(item)

    def must_hold(self, item: LeasedJob) -> None:
        """Raises Stopping when the worker is to stop, LeaseLost when the job is known to be lost."""
        if self._stop.is_set():
            raise Stopping
        if not self.holds(item):
            raise LeaseLost(f"Job {item.job.id} is no longer held by {self.worker}.")

    def fail(self, item: LeasedJob, error: str, retry: bool) -> Job | None:
        """End a job with an error, or queue it again where `retry` allows; None where it was lost already."""
        try:
            return self._registry.fail_job(item.job.id, self.worker, error, retry)
        except LeaseLost as lost:
            logger.warning("%s", lost)
            return None
        finally:
            self.let_go(item)

    def reached(self, point: str, items: Sequence[LeasedJob]) -> None:
        """Stay here until the end if the configuration says so: fault tests kill the process at a known point.

        Raises Stopping when the worker is to stop.
        """
        if self._config.hold_at == point:
            logger.warning("held at '%s' with %s", point, [item.job.id for item in items])
            self._stop.wait()
        if self._stop.is_set():
            raise Stopping

    def _drop(self, job_id: str) -> None:
        with self._lock:
            self._held.discard(job_id)
