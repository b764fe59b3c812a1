"""What the launcher does before anything heavy starts; the rest is in tests/e2e."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from hypernet import nano
from serve import launcher
from serve.checkpoint_rank import check_ranks, smallest_rank
from serve.config import ConfigError, ImprintConfig
from serve.registry import Registry, migrate
from tests.tiny_models import make_base


def test_first_admin_key_is_given_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    migrate(url)
    registry = Registry.open(url)
    secret = launcher.first_admin_key(registry)
    assert secret is not None
    principal = registry.authenticate(secret)
    assert principal is not None and principal.scope == "admin"
    assert launcher.first_admin_key(registry) is None
    registry.revoke_key(principal.key_id)
    assert launcher.first_admin_key(registry) is not None
    registry.close()


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "server.yaml"
        args = {"data_dir": str(tmp_path / "data")}
        config.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [{"args": args}]}))
        with pytest.raises(SystemExit) as stopped:
            launcher.run(config)
    assert stopped.value.code == 1
    assert f"127.0.0.1:{port}" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_bad_file_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launcher.run(tmp_path / "none.yaml")
    assert "none.yaml" in capsys.readouterr().err


def test_a_rank_above_the_engines_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "server.yaml"
    args = {"data_dir": str(tmp_path / "data"), "engine": {"max_lora_rank": 4}}
    config.write_text(yaml.safe_dump({"http_options": {"port": 0}, "applications": [{"args": args}]}))
    with pytest.raises(SystemExit) as stopped:
        launcher.run(config)
    assert stopped.value.code == 1
    rank = json.loads((nano.hypernet_dir() / "config.json").read_text())["rank"]
    said = capsys.readouterr().err
    assert f"engine.max_lora_rank is 4, but generator.checkpoint makes adapters of rank {rank}" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ({"rank": 8, "layers": 2}, 8),
        ({"format": "perceiver", "network": {"rank": 16}}, 16),
        ({"format": "doc-to-lora", "sizes": {"rank": 8}, "use_bias": True}, 16),
        ({"format": "doc-to-lora", "sizes": {"rank": 8}, "use_bias": False}, 8),
        ({"format": "text-to-lora", "sizes": {"rank": 4}}, 4),
        ({"format": "of another time"}, None),
        ([], None),
    ],
)
def test_ranks_of_all_kinds_of_checkpoints(tmp_path: Path, values: object, rank: int | None) -> None:
    assert smallest_rank(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert smallest_rank(tmp_path) == rank


def test_the_rank_of_distillation_and_of_tasks_counts_too(tmp_path: Path) -> None:
    check_ranks(ImprintConfig())
    check_ranks(ImprintConfig(generator={"checkpoint": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match="distill.rank makes adapters of rank 65"):
        check_ranks(ImprintConfig(generator={"kind": "distill", "distill": {"rank": 65}}))
    (tmp_path / "config.json").write_text(json.dumps({"format": "text-to-lora", "sizes": {"rank": 128}}))
    with pytest.raises(ConfigError, match="task.checkpoint makes adapters of rank 128; at least 128 is needed"):
        check_ranks(ImprintConfig(generator={"task": {"checkpoint": str(tmp_path), "encoder": "x"}}))


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPRINT_BASE__MODEL", raising=False)
    local = launcher.environment(ImprintConfig(base={"model": str(make_base(tmp_path / "base"))}), 8000)
    assert local["RAY_worker_niceness"] == "0" and local["HF_HUB_OFFLINE"] == "1"
    assert local["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1" and local["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == "8000"
    several = launcher.environment(ImprintConfig(ingress={"num_replicas": 2}), 8000)
    assert several["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert "HF_HUB_OFFLINE" not in launcher.environment(ImprintConfig(base={"model": "someone/some-model"}), 8000)
