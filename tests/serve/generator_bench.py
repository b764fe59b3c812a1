"""What tests of the generator's worker share: a worker over a real registry, blob store and encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hypernet import nano
from hypernet.distill_loop import Distiller
from hypernet.gate import Gate
from hypernet.generate import HypernetGenerator
from router.embed import MiniLmEncoder
from serve.blobs import BlobStore
from serve.config import GateConfig, ImprintConfig
from serve.deployments.generator_gate import open_gate
from serve.deployments.generator_jobs import DocumentGenerator, TaskAdapters
from serve.deployments.generator_worker import GeneratorWorker
from serve.metrics import GeneratorMetrics
from serve.registry import Registry, migrate
from serve.registry.records import Adapter, Document, Job, PostResult

OFF = {"enabled": False}


@cache
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load()


@cache
def nano_generator() -> HypernetGenerator:
    """The shipped pair. Tests must not change it."""
    return HypernetGenerator.load(nano.hypernet_dir(), nano.base_dir(), threads=1)


@cache
def nano_gate() -> Gate:
    gate = open_gate(GateConfig(budget_s=60), nano_generator())
    assert gate is not None
    return gate


@dataclass
class Bench:
    """A worker and what it works on."""

    worker: GeneratorWorker
    registry: Registry
    blobs: BlobStore
    generator: Any
    config: ImprintConfig
    metrics: GeneratorMetrics
    tenant_id: str

    def post(self, text: str, title: str = "Notice", **fields: Any) -> PostResult:
        return self.registry.post_document(self.tenant_id, title, text, **fields)

    def job(self, posted: PostResult) -> Job:
        job = self.registry.get_job(self.tenant_id, posted.job.id)
        assert job is not None
        return job

    def document(self, posted: PostResult) -> Document:
        document = self.registry.get_document(self.tenant_id, posted.document.id)
        assert document is not None
        return document

    def current(self, posted: PostResult) -> list[Adapter]:
        return self.registry.current_adapters_of(self.tenant_id, posted.document.id)

    def stored(self) -> int:
        """How many adapters' weights are in the blob store."""
        return len(list((self.config.data_dir / "blobs").rglob("*.safetensors")))

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def open_bench(
    data_dir: Path,
    base: Path,
    generator: DocumentGenerator,
    *,
    gate: Gate | None = None,
    distiller: Distiller | None = None,
    tasks: TaskAdapters | None = None,
    embedder: MiniLmEncoder | None = None,
    previous_embedder: MiniLmEncoder | None = None,
    **settings: Any,
) -> Iterator[Bench]:
    """A worker that is not started, by default with the shipped encoder. `settings` are the generator section's; a
    second bench may use the same folder."""
    defaults = {"lease_s": 5, "gate": {} if gate else OFF, "refine": {"after_s": 0} if distiller else OFF}
    config = ImprintConfig(data_dir=data_dir, base={"model": str(base)}, generator={**defaults, **settings})
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    blobs = BlobStore.open(config.blobs.url)
    metrics = GeneratorMetrics()
    worker = GeneratorWorker(
        config, registry, blobs, generator, embedder or encoder(), AutoConfig.from_pretrained(base), metrics,
        gate=gate, distiller=distiller, tasks=tasks, previous_encoder=previous_embedder,
    )
    known = {tenant.name: tenant.id for tenant in registry.list_tenants()}
    tenant_id = known.get("acme") or registry.create_tenant("acme").id
    try:
        yield Bench(worker, registry, blobs, generator, config, metrics, tenant_id)
    finally:
        worker.stop()
        registry.close()
