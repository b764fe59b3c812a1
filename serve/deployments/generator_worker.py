"""The generator's worker: takes jobs, has them done, keeps their leases. Threads, no Ray.

A worker that dies leaves its jobs to whoever finds their leases run out.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypernet.distill_loop import Distiller
from hypernet.gate import Gate
from router.embed import Encoder
from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.deployments.generator_embed import EmbedAnew
from serve.deployments.generator_gate import AdapterGate
from serve.deployments.generator_jobs import DocumentGenerator, GenerateJobs, TaskAdapters
from serve.deployments.generator_leases import HeldJobs, Stopping
from serve.deployments.generator_refine import RefineJobs
from serve.deployments.generator_store import AdapterStore
from serve.metrics import GeneratorMetrics
from serve.niceness import step_back
from serve.registry import Registry

logger = logging.getLogger(__name__)

ERROR_PAUSE_S = 2.0
PURGE_EVERY_S = 60.0
PURGE_AFTER_S = 600.0  # requests that began before the deletion are over by then


class GeneratorWorker:
    """Runs jobs on a thread of its own from `start` until `stop`; a second thread keeps their leases."""

    def __init__(
        self,
        config: ImprintConfig,
        registry: Registry,
        blobs: BlobStore,
        generator: DocumentGenerator,
        encoder: Encoder,
        base_config: Any,
        metrics: GeneratorMetrics,
        *,
        gate: Gate | None = None,
        distiller: Distiller | None = None,
        tasks: TaskAdapters | None = None,
        previous_encoder: Encoder | None = None,
    ) -> None:
        """`base_config` is the base's transformers configuration. Without a gate all adapters are ready; without a
        distiller, or a gate, nothing is refined; without `tasks` jobs of mode "task" fail. `previous_encoder`: what
        tenants may still be served with, so that new documents get its vectors as well."""
        self.name = f"gen-{uuid.uuid4().hex}"
        self._config = config
        self._registry = registry
        self._blobs = blobs
        self._generator = generator
        self._tasks = tasks
        self._stop = threading.Event()
        self._held = HeldJobs(registry, self.name, config.generator, self._stop)
        adapter_gate = AdapterGate(gate, metrics)
        store = AdapterStore(
            config, registry, blobs, [encoder] if previous_encoder is None else [encoder, previous_encoder],
            base_config, generator.base_fingerprint, self._held, metrics,
        )
        self._generate = GenerateJobs(config, generator, tasks, adapter_gate, store, self._held, metrics)
        self._refine: RefineJobs | None = None
        if distiller is not None and gate is not None:
            fingerprints = generator.base_fingerprint, generator.fingerprint
            self._refine = RefineJobs(
                config.generator.refine, registry, distiller, fingerprints, adapter_gate, store, self._held, metrics
            )
        self._embedding = EmbedAnew(registry, encoder, config.router, metrics, self._stop)
        self._background = ThreadPoolExecutor(1, "generator-background", initializer=step_back)
        self._purged_at = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, name="generator", daemon=True),
            threading.Thread(target=self._keep_leases, name="generator-leases", daemon=True),
        ]

    def start(self) -> None:
        """Queue documents of other fingerprints again and begin to work."""
        stale = self._registry.mark_stale(self._generator.base_fingerprint, self._generator.fingerprint)
        if stale:
            logger.info("base or generator changed: %d documents are generated again", stale)
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 10) -> None:
        """End after the step under way and give unfinished jobs back."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)
        self._background.shutdown(wait=False)
        self._registry.release_leases(self.name)

    def alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def run_once(self) -> int:
        """Take one batch of jobs and see it through; returns how many jobs were taken."""
        settings = self._config.generator
        # Distillation takes one document after the other, so another worker may as well have the next one.
        leased = self._held.take(1 if settings.kind == "distill" else settings.batch_chunks)
        if not leased:
            return 0
        try:
            if leased[0].job.kind == "generate":
                self._generate.run(leased)
            elif self._refine is not None:
                # One thread works and the other waits, so they never use the base at the same time.
                self._background.submit(self._refine.run, leased[0]).result()
            else:
                # Queued by a worker with another configuration.
                self._registry.finish_job(leased[0].job.id, self.name, "Refinement is switched off.")
        finally:
            self._held.clear()
        return len(leased)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                if not self.run_once():
                    self._purge()
                    if not self._background.submit(self._embedding.run_once).result():
                        self._stop.wait(self._config.generator.poll_s)
            except Stopping:
                return
            except Exception:
                # A registry or disk that fails now may work again; jobs stay leased or queued meanwhile.
                logger.exception("generator step failed")
                self._stop.wait(ERROR_PAUSE_S)

    def _keep_leases(self) -> None:
        while not self._stop.wait(self._config.generator.lease_s / 3):
            self._held.renew()

    def _purge(self) -> None:
        """Now and then, remove the files of adapters that were deleted a while ago."""
        if time.monotonic() - self._purged_at < PURGE_EVERY_S:
            return
        self._purged_at = time.monotonic()
        for adapter in self._registry.list_purgeable(time.time() - PURGE_AFTER_S):
            self._blobs.delete_folder(adapter.blob_path)
            self._registry.mark_purged(adapter.id)
