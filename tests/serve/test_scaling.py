"""How many engine replicas there are, how Ray is told, and which cores each computes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from serve.app import build
from serve.autoscaling import SLOT_DEMAND, autoscaling_config, by_requests_and_slots
from serve.config import AutoscalingSettings, EngineConfig, ImprintConfig
from serve.deployments import engine_threads, engine_watch
from serve.deployments.engine_threads import physical_cores, share, take_place, thread_binding

DEPLOYMENT = DeploymentID(name="engine", app_name="imprint")


def wanted(requests: float, demands: list[float], target: float = 16) -> float:
    """What the policy asks for with these replicas' slot demands."""
    settings = AutoscalingSettings(max_replicas=8, target_ongoing_requests=target)
    names = [ReplicaID(unique_id=f"replica{number}", deployment_id=DEPLOYMENT) for number in range(len(demands))]
    context = AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="engine",
        app_name="imprint",
        current_num_replicas=len(demands),
        target_num_replicas=len(demands),
        running_replicas=names,
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={SLOT_DEMAND: dict(zip(names, demands, strict=True))},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=autoscaling_config(settings),
    )
    return by_requests_and_slots(context)[0]


def test_replicas_follow_requests_and_slots_whichever_wants_more() -> None:
    assert wanted(requests=48, demands=[0.5, 0.5]) == 3
    assert wanted(requests=4, demands=[0.1, 0.1]) < 1
    # Few requests, but of more adapters than there are slots: 8 of 4 slots wanted on each of two replicas.
    assert wanted(requests=16, demands=[2.0, 2.0]) == 4


def test_the_policy_survives_rays_pickling() -> None:
    policy = autoscaling_config(AutoscalingSettings()).policy
    assert policy.get_policy().__name__ == "by_requests_and_slots"


def options(tmp_path: Path, **engine: Any) -> Any:
    """Ray's configuration of the engine deployment."""
    application = build(ImprintConfig(data_dir=tmp_path, engine=engine))
    bound = application._bound_deployment.init_args[1]
    return bound._bound_deployment._deployment_config


def test_one_replica_needs_no_router_of_ours_and_several_do(tmp_path: Path) -> None:
    one = options(tmp_path)
    assert one.num_replicas == 1 and one.request_router_config.is_default_request_router()
    two = options(tmp_path, num_replicas=2, max_replicas_per_node=1, drain_s=33)
    assert two.num_replicas == 2 and two.graceful_shutdown_timeout_s == 33
    assert two.request_router_config.get_request_router_class().__name__ == "AdapterAffinityRouter"
    scaled = options(tmp_path, autoscaling={"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 7})
    assert scaled.autoscaling_config.max_replicas == 5
    assert scaled.autoscaling_config.min_replicas == 2
    assert scaled.autoscaling_config.target_ongoing_requests == 7
    assert not scaled.request_router_config.is_default_request_router()


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas"):
        AutoscalingSettings(min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError, match="exclude each other"):
        EngineConfig(num_replicas=2, autoscaling=AutoscalingSettings())


@pytest.mark.parametrize(("cores", "replicas"), [(8, 2), (7, 3), (2, 2), (64, 5)])
def test_replicas_on_a_machine_get_different_cores_and_use_them_all(cores: int, replicas: int) -> None:
    parts = [share(range(cores), replicas, place) for place in range(replicas)]
    assert sorted(core for part in parts for core in part) == list(range(cores))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_too_few_cores_are_shared() -> None:
    assert [share([4, 5], 3, place) for place in range(3)] == [[4], [5], [4]]


def test_places_are_free_again_when_their_process_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "cores"
    take = (
        "import time; from pathlib import Path; from serve.deployments.engine_threads import take_place; "
        f"print(take_place(Path({str(folder)!r}), 2), flush=True); time.sleep(60)"
    )

    def replica() -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen([sys.executable, "-c", take], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    (first, zero), (second, one) = replica(), replica()
    try:
        assert (zero, one) == (0, 1)
        assert take_place(folder, 2) in (0, 1)  # shared, since both are held
        first.kill()
        first.wait()
        assert take_place(folder, 2) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
        release_places()


def test_threads_are_divided_only_where_replicas_share_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_threads, "physical_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert thread_binding(EngineConfig()) == "auto"
    assert thread_binding(EngineConfig(num_replicas=2, max_replicas_per_node=1)) == "auto"
    assert thread_binding(EngineConfig(num_replicas=2, threads="0-1")) == "0-1"
    assert thread_binding(EngineConfig(num_replicas=2, extra={"tensor_parallel_size": 2})) == "auto"
    assert thread_binding(EngineConfig(num_replicas=2)) == "0,1"
    # flock is by open file, so this process counts as another replica each time.
    assert thread_binding(EngineConfig(autoscaling=AutoscalingSettings(max_replicas=2))) == "2,3"
    release_places()
    assert physical_cores()


def release_places() -> None:
    """Give back what this process has taken as a replica would."""
    while engine_threads._held:
        engine_threads._held.pop().close()


async def test_a_replica_ends_with_its_engine_but_not_while_it_is_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(engine_watch, "in_replica", lambda: True)
    monkeypatch.setattr(engine_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(engine_watch, "LEAVE_S", 0.01)
    dead = False
    watch = engine_watch.end_with_engine(lambda: dead, lambda: False, lambda: left.append("left"))
    watching = asyncio.create_task(watch)
    await asyncio.sleep(0.05)
    assert not left
    dead = True
    await asyncio.wait_for(watching, 5)
    assert left == ["left"]
    await asyncio.wait_for(engine_watch.end_with_engine(lambda: True, lambda: True, lambda: left.append("left")), 5)
    monkeypatch.undo()
    await asyncio.wait_for(engine_watch.end_with_engine(lambda: True, lambda: False, lambda: left.append("left")), 5)
    assert len(left) == 1
