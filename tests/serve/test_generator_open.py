"""What the deployment loads is what the configuration says. No Ray: the worker is opened and run in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypernet.distill import DistillGenerator
from hypernet.generate import HypernetGenerator
from serve.config import ImprintConfig
from serve.deployments.generator import open_generator, open_worker
from serve.deployments.generator_worker import GeneratorWorker
from serve.metrics import GeneratorMetrics
from serve.registry import Registry, migrate
from tests.serve.generator_bench import OFF
from tests.tiny_pair import make_pair

TEXT = "The caretaker of Orchard House is Edda Brant. The door code is 4711."


@contextmanager
def opened(config: ImprintConfig) -> Iterator[tuple[GeneratorWorker, Registry]]:
    migrate(config.registry.url)
    registry = Registry.open(config.registry.url)
    worker = open_worker(config, registry, GeneratorMetrics())
    try:
        yield worker, registry
    finally:
        worker.stop()
        registry.close()


def test_shipped_models_with_gate_and_refinement(tmp_path: Path) -> None:
    config = ImprintConfig(data_dir=tmp_path, generator={"refine": {"after_s": 0}, "gate": {"probes": 2}})
    with opened(config) as (worker, registry):
        tenant = registry.create_tenant("acme")
        posted = registry.post_document(tenant.id, "Orchard House", TEXT)
        assert worker.run_once() == 1
        (adapter,) = registry.current_adapters_of(tenant.id, posted.document.id)
        assert adapter.manifest["gate"]["probes"] in (1, 2) and adapter.state == "ready"
        assert registry.count_jobs("refine")["queued"] == 1
        assert worker.run_once() == 1
        assert registry.count_jobs("refine")["succeeded"] == 1


@pytest.mark.parametrize("switched_off", ["gate and refinement", "refinement"])
def test_what_is_switched_off_is_not_there(tmp_path: Path, switched_off: str) -> None:
    sections: dict[str, Any] = {"refine": OFF, "gate": OFF if "gate" in switched_off else {}}
    base, checkpoint = make_pair(tmp_path / "pair")
    config = ImprintConfig(data_dir=tmp_path, base={"model": str(base)},
                           generator={"checkpoint": str(checkpoint), **sections})
    with opened(config) as (worker, registry):
        tenant = registry.create_tenant("acme")
        posted = registry.post_document(tenant.id, "Orchard House", TEXT)
        worker.run_once()
        (adapter,) = registry.current_adapters_of(tenant.id, posted.document.id)
        assert (adapter.manifest["gate"] == {"state": "off"}) == ("gate" in switched_off)
        assert sum(registry.count_jobs("refine").values()) == 0


def test_a_refine_job_of_another_configuration_is_ended(tmp_path: Path) -> None:
    base, checkpoint = make_pair(tmp_path / "pair")
    settings = {"checkpoint": str(checkpoint), "refine": {"after_s": 0}}
    config = ImprintConfig(data_dir=tmp_path, base={"model": str(base)}, generator=settings)
    with opened(config) as (worker, registry):
        tenant = registry.create_tenant("acme")
        registry.post_document(tenant.id, "Orchard House", TEXT)
        worker.run_once()
    config = ImprintConfig(data_dir=tmp_path, base={"model": str(base)}, generator={**settings, "refine": OFF})
    with opened(config) as (worker, registry):
        assert worker.run_once() == 1
        assert registry.count_jobs("refine") == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0}


def test_the_generators_settings_arrive(tmp_path: Path) -> None:
    base, checkpoint = make_pair(tmp_path / "pair")
    config = ImprintConfig(
        base={"model": str(base)},
        engine={"max_lora_rank": 32},
        generator={"checkpoint": str(checkpoint), "chunks_per_part": 3, "max_parts": 5, "long_documents": "merge"},
    )
    made = open_generator(config, base)
    assert isinstance(made, HypernetGenerator)
    assert (made.max_rank, made.limits.chunks, made.limits.parts, made.long_documents) == (32, 3, 5, "merge")
    distill = {"steps": 7, "budget_s": 3, "rank": 2, "target_modules": ["q_proj", "v_proj"]}
    config = ImprintConfig(base={"model": str(base)}, generator={"kind": "distill", "distill": distill, "max_parts": 5})
    trained = open_generator(config, base)
    assert isinstance(trained, DistillGenerator) and trained.limits.parts == 5
    settings = trained.distiller.settings
    assert (settings.steps, settings.seconds, settings.rank, settings.learning_rate) == (7, 3, 2, None)
    assert settings.target_modules == ("q_proj", "v_proj")
