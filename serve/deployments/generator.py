"""The generator deployment: turns queued documents into published adapters in the background."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.blobs import BlobStore
from serve.config import DistillConfig, ImprintConfig
from serve.deployments.heap import tend_heap
from serve.metrics import GeneratorMetrics
from serve.registry import Registry

if TYPE_CHECKING:
    from hypernet.distill import DistillGenerator, DistillSettings
    from hypernet.generate import HypernetGenerator
    from hypernet.tasks import TaskGenerator
    from serve.deployments.generator_worker import GeneratorWorker


class GeneratorDeployment:
    """Undecorated; `serve.app` makes it a Ray deployment. It is not called with jobs: it takes them itself."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        """Load the base and what makes adapters for it (seconds), then begin to work.

        Raises CheckpointMismatch, CheckpointInvalid, OSError, or ValueError for settings that do not fit the base.
        """
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._metrics = GeneratorMetrics()
        self._registry = Registry.open(config.registry.url)
        self._worker = open_worker(config, self._registry, self._metrics)
        self._stopping = threading.Lock()
        tend_heap()
        self._worker.start()

    async def health(self) -> None:
        """Raise RuntimeError when the worker's threads have ended."""
        if not self._worker.alive():
            raise RuntimeError("the generator's worker has ended")

    async def check_health(self) -> None:
        """Ray's question: raises when this replica has to be replaced."""
        await self.health()

    async def metrics(self) -> str:
        """The generator's metrics as Prometheus text."""
        for state, count in (await asyncio.to_thread(self._registry.count_jobs, "generate")).items():
            self._metrics.queue.labels(state).set(count)
        for state, count in (await asyncio.to_thread(self._registry.count_jobs, "refine")).items():
            self._metrics.refine_queue.labels(state).set(count)
        return self._metrics.text()

    async def shutdown(self) -> None:
        """Stop the worker and give its jobs back. May be called twice."""
        await asyncio.to_thread(self._stop)

    def __del__(self) -> None:
        # Ray calls this when it stops a replica.
        self._stop()

    def _stop(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            with self._stopping:
                worker.stop()


def open_worker(config: ImprintConfig, registry: Registry, metrics: GeneratorMetrics) -> GeneratorWorker:
    """A worker as the configuration describes it, not yet started. Raises as GeneratorDeployment does."""
    # Imported here, so that whoever only deploys this module's class does not load torch.
    from transformers import AutoConfig

    from hypernet.distill_loop import Distiller
    from router.embed import MiniLmEncoder
    from serve.deployments.generator_gate import open_gate
    from serve.deployments.generator_refine import distill_settings
    from serve.deployments.generator_worker import GeneratorWorker

    settings = config.generator
    base = config.base_folder()
    generator = open_generator(config, base)
    refine = settings.refine.enabled and settings.kind != "distill"
    return GeneratorWorker(
        config,
        registry,
        BlobStore.open(config.blobs.url),
        generator,
        MiniLmEncoder.load(config.router.encoder, cache_size=1000),  # for documents that are refined soon after
        AutoConfig.from_pretrained(base),
        metrics,
        gate=open_gate(settings.gate, generator),
        distiller=Distiller(generator.base, generator.tokenizer, distill_settings(settings.refine)) if refine else None,
        tasks=open_tasks(config, base, generator.base_fingerprint),
        previous_encoder=MiniLmEncoder.load(config.router.previous_encoder) if config.router.previous_encoder else None,
    )


def open_generator(config: ImprintConfig, base: Path) -> HypernetGenerator | DistillGenerator:
    """What makes adapters of documents, with its base."""
    from hypernet.distill import DistillGenerator
    from hypernet.generate import HypernetGenerator

    settings = config.generator
    if settings.kind == "distill":
        return DistillGenerator.load(
            base,
            _distill_settings(settings.distill),
            max_rank=config.engine.max_lora_rank,
            max_parts=settings.max_parts,
            threads=settings.threads,
            **({"chunks_per_part": settings.chunks_per_part} if settings.chunks_per_part else {}),
        )
    return HypernetGenerator.load(
        config.checkpoint_path(),
        base,
        max_rank=config.engine.max_lora_rank,
        batch_chunks=settings.batch_chunks,
        chunks_per_part=settings.chunks_per_part,
        max_parts=settings.max_parts,
        long_documents=settings.long_documents,
        threads=settings.threads,
    )


def open_tasks(config: ImprintConfig, base: Path, base_fingerprint: str) -> TaskGenerator | None:
    """What makes adapters of descriptions of tasks; None where none is configured."""
    task = config.generator.task
    if not task.checkpoint:
        return None
    from hypernet.tasks import TaskGenerator

    return TaskGenerator(
        Path(task.checkpoint).expanduser().absolute(),
        base,
        task.encoder,
        max_rank=config.engine.max_lora_rank,
        base_fingerprint=base_fingerprint,
        trust_remote_code=task.trust_remote_code,
    )


def _distill_settings(config: DistillConfig) -> DistillSettings:
    from hypernet.distill_loop import DistillSettings

    settings = DistillSettings(
        steps=config.steps,
        seconds=config.budget_s,
        learning_rate=config.learning_rate,
        rank=config.rank,
        own_questions=config.own_questions,
    )
    return replace(settings, target_modules=config.target_modules) if config.target_modules else settings
