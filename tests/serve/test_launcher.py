"""What the launcher does before anything heavy starts; the rest is in tests/e2e."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from serve import launcher
from serve.config import ImprintConfig
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


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPRINT_BASE__MODEL", raising=False)
    local = launcher.environment(ImprintConfig(base={"model": str(make_base(tmp_path / "base"))}))
    assert local["RAY_worker_niceness"] == "0" and local["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in launcher.environment(ImprintConfig(base={"model": "someone/some-model"}))
