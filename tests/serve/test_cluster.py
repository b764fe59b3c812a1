"""SQLite is refused where Ray runs on several nodes, and what is shipped for clusters fits together."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema
from sqlalchemy.engine import make_url

from serve.cluster import check_registry_fits_cluster
from serve.config import ConfigError, ImprintConfig, load_serve_file
from serve.deployments.engine import EngineDeployment

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "configs" / "cluster.yaml"
MANIFEST = ROOT / "configs" / "kuberay" / "rayservice.yaml"


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


@pytest.fixture
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read as they are, whatever IMPRINT_… is set here."""
    for name in [name for name in os.environ if name.startswith("IMPRINT_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_overrides")
def test_the_shipped_cluster_file_is_for_several_nodes() -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(CLUSTER.read_text()))  # as `serve deploy` and KubeRay read it
    file = load_serve_file(CLUSTER)
    check_registry_fits_cluster(file.config.registry.url)
    assert make_url(file.config.registry.url).get_backend_name() == "postgresql"
    assert make_url(file.config.registry.url).password is None
    assert file.config.blobs.url.startswith("s3://")
    engine = file.config.engine
    assert engine.most_replicas > 1 and engine.most_replicas_per_node == 1
    assert engine.autoscaling is not None and engine.autoscaling.target_ongoing_requests < engine.max_num_seqs


@pytest.mark.usefixtures("no_overrides")
def test_the_kubernetes_manifest_runs_the_cluster_file() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    spec = manifest["spec"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert spec["serveConfigV2"] == CLUSTER.read_text()
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] == "token"
    engine = load_serve_file(CLUSTER).config.engine
    assert engine.autoscaling is not None
    (workers,) = cluster["workerGroupSpecs"]
    # One engine a node, so as many nodes as replicas.
    assert workers["minReplicas"] == workers["replicas"] == engine.autoscaling.min_replicas
    assert workers["maxReplicas"] == engine.autoscaling.max_replicas
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > engine.drain_s
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert "env" not in container and container["envFrom"] == [{"secretRef": {"name": "imprint-store"}}]


def test_the_kubernetes_manifest_has_no_field_that_kuberay_does_not_know() -> None:
    """By the fields of KubeRay's documented API; the pods' own are Kubernetes'."""
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    cluster = spec["rayClusterConfig"]
    assert set(spec) <= {
        "serveConfigV2", "rayClusterConfig", "excludeHeadPodFromServeSvc", "serveService", "suspend", "managedBy",
        "upgradeStrategy", "rayClusterDeletionDelaySeconds",
    }  # fmt: skip
    assert set(cluster) <= {
        "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
        "authOptions", "gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy",
    }  # fmt: skip
    assert set(cluster["authOptions"]) <= {"mode", "secretName", "enableK8sTokenAuth"}
    assert set(cluster["headGroupSpec"]) <= {"rayStartParams", "template", "serviceType", "enableIngress"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts",
            "idleTimeoutSeconds", "scaleStrategy", "suspend",
        }  # fmt: skip
    # KubeRay hands these to `ray start` as text.
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_image_holds_what_the_manifest_needs_and_runs_as_its_user() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["imprint"]
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    pins = (ROOT / "constraints" / "s3.txt").read_text()
    assert "s3fs==" + version("fsspec") in pins  # the two are released together
