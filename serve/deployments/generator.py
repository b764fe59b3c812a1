"""The generator deployment: turns queued documents into published adapters in the background."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from serve.blobs import BlobStore
from serve.config import ImprintConfig
from serve.metrics import GeneratorMetrics
from serve.registry import Registry


class GeneratorDeployment:
    """Undecorated; `serve.app` makes it a Ray deployment. It is not called with jobs: it takes them itself."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        """Load the base and the hypernetwork (seconds), then begin to work. Raises CheckpointMismatch."""
        # Imported here, so that whoever only deploys this class does not load torch.
        from transformers import AutoConfig

        from hypernet.generate import HypernetGenerator
        from router.embed import MiniLmEncoder
        from serve.deployments.generator_worker import GeneratorWorker

        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._metrics = GeneratorMetrics()
        self._registry = Registry.open(config.registry.url)
        base = config.base_folder()
        self._worker = GeneratorWorker(
            config,
            self._registry,
            BlobStore.open(config.blobs.url),
            HypernetGenerator.load(
                config.checkpoint_path(),
                base,
                max_rank=config.engine.max_lora_rank,
                batch_chunks=config.generator.batch_chunks,
                threads=config.generator.threads,
            ),
            MiniLmEncoder.load(config.router.encoder),
            AutoConfig.from_pretrained(base),
            self._metrics,
        )
        self._stopping = threading.Lock()
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
        for state, count in (await asyncio.to_thread(self._registry.count_jobs)).items():
            self._metrics.queue.labels(state).set(count)
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
