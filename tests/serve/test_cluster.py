"""SQLite is refused where Ray runs on several nodes, before the engine loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from serve.cluster import check_registry_fits_cluster
from serve.config import ConfigError, ImprintConfig
from serve.deployments.engine import EngineDeployment


def cluster_of(monkeypatch: pytest.MonkeyPatch, *alive: bool) -> None:
    """Make Ray say that it runs on nodes of these states."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": str(index), "Alive": one} for index, one in enumerate(alive)])


def test_several_nodes_need_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, True, True, False)
    config = ImprintConfig(data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"registry\.url: SQLite .* has 2\. .*PostgreSQL"):
        check_registry_fits_cluster(config.registry.url)
    with pytest.raises(ConfigError, match="SQLite"):
        EngineDeployment(config.model_dump(mode="json"))
    check_registry_fits_cluster("postgresql://user:password@db/imprint")


def test_one_node_may_use_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ImprintConfig(data_dir=tmp_path).registry.url
    check_registry_fits_cluster(url)
    cluster_of(monkeypatch, True, False)
    check_registry_fits_cluster(url)
