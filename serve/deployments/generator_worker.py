"""The generator's work: take jobs, make adapters of their documents in batches, publish them. Threads, no Ray.

A job goes through the stages leased, generating, generated, uploaded; it is visible to nobody until the one
transaction that publishes it. A worker that dies leaves its jobs to whoever finds their leases run out.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from hypernet.documents import Chunk, DocumentError, DocumentText
from hypernet.generate import GeneratedAdapter
from hypernet.lora import AdapterInvalid, validate_folder
from router.centroids import document_centroids
from router.embed import Encoder
from serve.blobs import BlobStore, StoredFolder
from serve.config import ImprintConfig
from serve.ids import new_id
from serve.metrics import GeneratorMetrics
from serve.registry import LeaseLost, Registry
from serve.registry.records import LeasedJob, NewAdapter, NewCentroids

logger = logging.getLogger(__name__)

ERROR_PAUSE_S = 2.0
PURGE_EVERY_S = 60.0
PURGE_AFTER_S = 600.0  # requests that began before the deletion are over by then


class AdapterGenerator(Protocol):
    """What the worker needs of a generator, such as hypernet.generate.HypernetGenerator."""

    base_fingerprint: str
    fingerprint: str

    def chunk(self, document: DocumentText) -> list[Chunk]:
        """Check a document. Raises DocumentError."""
        ...

    def generate(self, documents: Sequence[DocumentText], chunks: Sequence[list[Chunk]]) -> list[GeneratedAdapter]:
        """Adapters for documents and what `chunk` gave for them, in one batch."""
        ...


class _Stopping(Exception):
    """The worker was told to stop; what it holds goes back to the queue."""


class GeneratorWorker:
    """Runs jobs on a thread of its own from `start` until `stop`; a second thread keeps their leases."""

    def __init__(
        self,
        config: ImprintConfig,
        registry: Registry,
        blobs: BlobStore,
        generator: AdapterGenerator,
        encoder: Encoder,
        base_config: Any,
        metrics: GeneratorMetrics,
    ) -> None:
        """`base_config` is the base's transformers configuration."""
        self.name = f"gen-{uuid.uuid4().hex}"
        self._config = config
        self._registry = registry
        self._blobs = blobs
        self._generator = generator
        self._encoder = encoder
        self._base_config = base_config
        self._metrics = metrics
        self._stop = threading.Event()
        self._held: set[str] = set()
        self._held_lock = threading.Lock()
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
        self._registry.release_leases(self.name)

    def alive(self) -> bool:
        """Whether both threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def run_once(self) -> int:
        """Take one batch of jobs and see it through; returns how many jobs were taken."""
        settings = self._config.generator
        leased = self._registry.lease_jobs(self.name, settings.batch_chunks, settings.lease_s)
        if not leased:
            return 0
        with self._held_lock:
            self._held = {item.job.id for item in leased}
        try:
            self._run_batch(leased)
        finally:
            with self._held_lock:
                self._held.clear()
        return len(leased)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                if not self.run_once():
                    self._purge()
                    self._stop.wait(self._config.generator.poll_s)
            except _Stopping:
                return
            except Exception:
                # A registry or disk that fails now may work again; jobs stay leased or queued meanwhile.
                logger.exception("generator step failed")
                self._stop.wait(ERROR_PAUSE_S)

    def _keep_leases(self) -> None:
        lease_s = self._config.generator.lease_s
        while not self._stop.wait(lease_s / 3):
            with self._held_lock:
                held = list(self._held)
            for job_id in held:
                try:
                    self._registry.renew_lease(job_id, self.name, lease_s)
                except LeaseLost:
                    self._let_go(job_id)
                except Exception:
                    logger.exception("lease of %s could not be renewed", job_id)

    def _run_batch(self, leased: list[LeasedJob]) -> None:
        self._metrics.batch_documents.observe(len(leased))
        self._reached("leased", leased)
        checked = [(item, self._check(item)) for item in leased]
        for item, generated in self._generate([(item, chunks) for item, chunks in checked if chunks]):
            try:
                self._deliver(item, generated)
            except _Stopping:
                raise
            except LeaseLost as error:
                logger.warning("%s", error)
                self._metrics.jobs.labels("lost").inc()
            except AdapterInvalid as error:
                self._fail(item, f"The generated adapter is not valid: {error}", retry=False)
            except Exception as error:
                logger.exception("job %s failed", item.job.id)
                self._fail(item, f"The adapter could not be stored: {error}", retry=True)
            self._let_go(item.job.id)

    def _check(self, item: LeasedJob) -> list[Chunk]:
        """The chunks of the document; none where the job is no longer ours or fails, alone, for its document."""
        try:
            self._progress(item, "generating", 0.1)
            return self._generator.chunk(_text(item))
        except LeaseLost as error:
            logger.warning("%s", error)
            self._let_go(item.job.id)
        except DocumentError as error:
            self._fail(item, str(error), retry=False)
        return []

    def _generate(self, items: list[tuple[LeasedJob, list[Chunk]]]) -> list[tuple[LeasedJob, GeneratedAdapter]]:
        """Adapters of a batch; when it fails as a whole, one by one, so that only the culprit's job fails."""
        if not items:
            return []
        started = time.monotonic()
        try:
            generated = self._generator.generate([_text(item) for item, _ in items], [chunks for _, chunks in items])
        except Exception as error:
            if len(items) > 1:
                logger.exception("a batch of %d documents failed; trying one by one", len(items))
                return [pair for one in items for pair in self._generate([one])]
            item = items[0][0]
            logger.exception("job %s failed", item.job.id)
            self._fail(item, f"Generation failed: {error}", retry=not isinstance(error, DocumentError))
            return []
        self._metrics.stage_seconds.labels("generate").observe(time.monotonic() - started)
        return [(item, one) for (item, _), one in zip(items, generated, strict=True)]

    def _deliver(self, item: LeasedJob, generated: GeneratedAdapter) -> None:
        adapter_id = new_id("adp")
        blob_path = f"adapters/{item.job.tenant_id}/{adapter_id}"
        try:
            stored = self._store(item, generated, adapter_id, blob_path)
            self._progress(item, "uploaded", 0.8)
            self._reached("uploaded", [item])
            with self._metrics.stage_seconds.labels("centroids").time():
                centroids = self._centroids(item, generated)
            adapter = NewAdapter(
                id=adapter_id,
                kind="lora",
                rank=generated.lora.rank,
                alpha=generated.lora.alpha,
                target_modules=generated.lora.target_modules,
                blob_path=blob_path,
                checksum=stored.checksum,
                size_bytes=stored.size_bytes,
                base_fingerprint=self._generator.base_fingerprint,
                generator_fingerprint=self._generator.fingerprint,
                manifest=_manifest(self._config.generator.kind, generated),
            )
            self._registry.publish(item.job.id, self.name, adapter, centroids)
        except Exception:
            # Never published, so nobody can name it.
            self._blobs.delete_folder(blob_path)
            raise
        self._metrics.jobs.labels("succeeded").inc()
        logger.info("document %s version %d: adapter %s", item.document.id, item.version.number, adapter_id)

    def _store(
        self, item: LeasedJob, generated: GeneratedAdapter, adapter_id: str, blob_path: str
    ) -> StoredFolder:
        """Write the adapter's files, check them as they are on disk, and put them into the blob store."""
        self._config.staging_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{adapter_id}-", dir=self._config.staging_dir))
        try:
            generated.lora.save(folder)
            validate_folder(folder, self._base_config, self._config.engine.max_lora_rank)
            self._progress(item, "generated", 0.6)
            self._reached("generated", [item])
            with self._metrics.stage_seconds.labels("upload").time():
                return self._blobs.put_folder(blob_path, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _centroids(self, item: LeasedJob, generated: GeneratedAdapter) -> NewCentroids:
        text = item.version.text
        chunks = [text[chunk.start : chunk.end] for chunk in generated.chunks]
        count = self._config.router.centroids_per_adapter
        matrix = document_centroids(self._encoder, item.version.title, chunks, count)
        return NewCentroids(self._encoder.id, self._encoder.version, matrix)

    def _fail(self, item: LeasedJob, error: str, retry: bool) -> None:
        try:
            job = self._registry.fail_job(item.job.id, self.name, error, retry)
        except LeaseLost as lost:
            logger.warning("%s", lost)
        else:
            self._metrics.jobs.labels("failed" if job.state == "failed" else "retried").inc()
        self._let_go(item.job.id)

    def _progress(self, item: LeasedJob, stage: str, fraction: float) -> None:
        self._registry.set_job_progress(item.job.id, self.name, stage, fraction)

    def _reached(self, point: str, items: list[LeasedJob]) -> None:
        """Stay here until the end if the configuration says so: fault tests kill the process at a known point.

        Raises _Stopping when the worker is to stop.
        """
        if self._config.generator.hold_at == point:
            logger.warning("held at '%s' with %s", point, [item.job.id for item in items])
            self._stop.wait()
        if self._stop.is_set():
            raise _Stopping

    def _let_go(self, job_id: str) -> None:
        with self._held_lock:
            self._held.discard(job_id)

    def _purge(self) -> None:
        """Now and then, remove the files of adapters that were deleted a while ago."""
        if time.monotonic() - self._purged_at < PURGE_EVERY_S:
            return
        self._purged_at = time.monotonic()
        for adapter in self._registry.list_purgeable(time.time() - PURGE_AFTER_S):
            self._blobs.delete_folder(adapter.blob_path)
            self._registry.mark_purged(adapter.id)


def _text(item: LeasedJob) -> DocumentText:
    return DocumentText(item.version.title, item.version.text)


def _manifest(kind: str, generated: GeneratedAdapter) -> dict[str, Any]:
    return {
        "generator": kind,
        "chunks": [asdict(chunk) for chunk in generated.chunks],
        "seconds": {stage: round(seconds, 6) for stage, seconds in generated.seconds.items()},
    }
