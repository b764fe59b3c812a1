"""Configuration: files, environment, defaults, and errors that name the field."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from serve.config import ConfigError, ImprintConfig, load_serve_file

SHIPPED = Path(__file__).parents[2] / "configs" / "nano.yaml"


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for section in ("BASE__MODEL", "GENERATOR__CHECKPOINT"):
        monkeypatch.delenv(f"IMPRINT_{section}", raising=False)


def write(folder: Path, text: str) -> Path:
    path = folder / "server.yaml"
    path.write_text(text)
    return path


def test_shipped_file() -> None:
    file = load_serve_file(SHIPPED)
    assert (file.host, file.port, file.url) == ("127.0.0.1", 8000, "http://127.0.0.1:8000")
    assert file.application_name == "imprint" and file.config.base.model == "nano"
    assert file.config.generator.gate.enabled and file.config.generator.refine.enabled


def test_places_are_filled_in_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ImprintConfig(data_dir=Path("data"))
    assert config.data_dir == tmp_path / "data"
    assert config.registry.url == f"sqlite:///{tmp_path}/data/registry.db"
    assert config.blobs.url == f"file://{tmp_path}/data/blobs"
    assert ImprintConfig(registry={"url": "postgresql://x/y"}).registry.url == "postgresql://x/y"


def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_ENGINE__MAX_LORAS", "3")
    monkeypatch.setenv("IMPRINT_ENGINE__EXTRA", '{"seed": 1}')
    monkeypatch.setenv("IMPRINT_KEY", "imp_of_a_client")
    config = load_serve_file(SHIPPED).config
    assert config.engine.max_loras == 3 and config.engine.block_size == 32
    assert config.engine.extra["seed"] == 1


def test_environment_reaches_sections_in_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_GENERATOR__REFINE__ENABLED", "false")
    monkeypatch.setenv("IMPRINT_GENERATOR__GATE__PROBES", "3")
    config = load_serve_file(SHIPPED).config
    assert not config.generator.refine.enabled and config.generator.gate.probes == 3
    assert config.generator.refine.steps == 5 and config.generator.gate.enabled


def test_survives_the_way_to_a_worker() -> None:
    config = ImprintConfig(engine={"max_loras": 2})
    assert pickle.loads(pickle.dumps(config)) == config
    assert ImprintConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "cannot be read"),
        ("a: 1", "applications"),
        ("applications: []", "applications"),
        ("applications: [{args: [1]}]", "args"),
        ("applications: [{args: {engine: {max_lora: 1}}}]", "engine.max_lora"),
        ("applications: [{args: {engine: {max_loras: 0}}}]", "engine.max_loras"),
        ("applications: [{args: {engine: {max_loras: 9, max_cpu_loras: 8}}}]", "max_cpu_loras"),
        ("applications: [{args: {engine: {tenant_slot_share: 0}}}]", "engine.tenant_slot_share"),
        ("applications: [{args: {engine: {on_missing_adapter: wait}}}]", "engine.on_missing_adapter"),
        ("applications: [{args: {colour: red}}]", "colour"),
        ("applications: [{args: {generator: {hold_at: x}}}]", "generator.hold_at"),
        ("applications: [{args: {generator: {kind: magic}}}]", "generator.kind"),
        ("applications: [{args: {generator: {long_documents: cut}}}]", "generator.long_documents"),
        ("applications: [{args: {generator: {gate: {treshold: 0}}}}]", "generator.gate.treshold"),
        ("applications: [{args: {generator: {gate: {probes: 0}}}}]", "generator.gate.probes"),
        ("applications: [{args: {generator: {gate: {enabled: false}}}}]", "refine.enabled needs gate.enabled"),
        ("applications: [{args: {generator: {distill: {target_modules: [lm_head]}}}}]", "distill.target_modules"),
        ("applications: [{args: {generator: {task: {checkpoint: x}}}}]", "task.encoder"),
        ("http_options: {port: x}\napplications: [{args: {}}]", "port"),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_serve_file(path)
    assert named in str(error.value) and str(path) in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml"):
        load_serve_file(tmp_path / "none.yaml")
