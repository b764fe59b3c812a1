"""Routing, retries, draining and autoscaling on a real Ray, with fake engines; tests/system/test_replicas.py has real
ones."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from serve.deployments.engine_context import ENGINE_DEAD
from tests.ray_nodes import ONE_NODE, RayNode

pytestmark = [pytest.mark.own_server, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def node() -> Iterator[RayNode]:
    ray = RayNode(environment=ONE_NODE)
    ray.start()
    yield ray
    ray.remove()


def run(node: RayNode, scenario: str) -> dict[str, Any]:
    output = node.run(sys.executable, "-m", "tests.serve.fake_engines", scenario, timeout_s=300)
    result: dict[str, Any] = json.loads(output.split("RESULT ", 1)[1].splitlines()[0])
    return result


def test_adapters_stick_and_spread_and_a_dead_replica_is_replaced(node: RayNode) -> None:
    seen = run(node, "replicas")
    first, after, victim = seen["first"], seen["after"], seen["victim"]
    assert len(set(first.values())) == 3
    assert seen["again"] == first
    # At once a popular adapter takes all replicas.
    assert len(seen["slow"]) == 3, seen["slow"]
    # Whoever was on its way to the dead replica was answered by another.
    assert all(answer["replica"] != victim for answer in seen["retried"]), seen["retried"]
    # Only the dead one's adapters moved, and those that the new replica draws.
    new = set(after.values()) - set(first.values())
    assert len(new) == 1 and victim not in after.values()
    assert all(after[name] == replica or replica == victim or after[name] in new for name, replica in first.items())
    # What had begun ends with an error event.
    head, piece, end = seen["broken"]
    assert head["status"] == 200 and piece.startswith("data: ")
    assert json.loads(end.split("\n\n")[0].removeprefix("data: "))["error"]["code"] == ENGINE_DEAD
    print(f"replaced after {seen['recovery_s']:.1f} s; adapters by replica: {sorted(Counter(first.values()).values())}")


def test_demand_for_slots_adds_replicas_and_streams_end_before_they_go(node: RayNode) -> None:
    seen = run(node, "autoscaling")
    assert seen["before"] == 1
    # Streams ran on all three, two of which were told to stop meanwhile.
    assert len(seen["replicas"]) == 3 and seen["unfinished"] > 0, seen
    assert seen["ends"] == ["data: [DONE]\n\n"] and seen["pieces"] > 100, seen
    print(f"three replicas after {seen['up_s']:.1f} s, one again after {seen['down_s']:.1f} s")
