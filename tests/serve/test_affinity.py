"""Requests of one adapter stay on one replica, adapters spread over replicas, and no replica is overloaded."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve.affinity import AdapterAffinityRouter, adapter_of, order_by_affinity, rank
from serve.deployments.engine_context import EngineContext

ADAPTERS = [f"adp_{number:04}" for number in range(2000)]
DEPLOYMENT = DeploymentID(name="engine", app_name="imprint")


def replicas(count: int) -> list[str]:
    return [f"replica{number}" for number in range(count)]


def serve_requests(
    adapters: Iterable[str], count: int, balance: float = 1.25
) -> tuple[Counter[str], dict[str, set[str]]]:
    """Requests that all stay in flight: the loads that they make, and which replicas each adapter was sent to."""
    loads = Counter(dict.fromkeys(replicas(count), 0))
    places: dict[str, set[str]] = {}
    for adapter_id in adapters:
        chosen = order_by_affinity(adapter_id, loads, balance)[0]
        loads[chosen] += 1
        places.setdefault(adapter_id, set()).add(chosen)
    return loads, places


def test_an_adapter_sticks_to_its_replica_while_loads_are_even() -> None:
    idle = dict.fromkeys(replicas(5), 0)
    for adapter_id in ADAPTERS[:200]:
        first = order_by_affinity(adapter_id, idle)[0]
        assert first == rank(adapter_id, replicas(5))[0]
        # Neither the order in which replicas are listed nor an even load matters.
        assert order_by_affinity(adapter_id, dict.fromkeys(reversed(replicas(5)), 7))[0] == first


@pytest.mark.parametrize("count", [2, 3, 8])
def test_adapters_spread_evenly_over_replicas(count: int) -> None:
    owners = Counter(rank(adapter_id, replicas(count))[0] for adapter_id in ADAPTERS)
    mean = len(ADAPTERS) / count
    assert set(owners) == set(replicas(count))
    # Five standard deviations of a fair draw.
    assert all(abs(owned - mean) < 5 * (mean * (1 - 1 / count)) ** 0.5 for owned in owners.values())


def test_a_new_replica_takes_only_its_share_and_a_lost_one_moves_only_its_own() -> None:
    before = {adapter_id: rank(adapter_id, replicas(4))[0] for adapter_id in ADAPTERS}
    after = {adapter_id: rank(adapter_id, replicas(5))[0] for adapter_id in ADAPTERS}
    moved = [adapter_id for adapter_id in ADAPTERS if before[adapter_id] != after[adapter_id]]
    assert all(after[adapter_id] == "replica4" for adapter_id in moved)
    assert 0.16 < len(moved) / len(ADAPTERS) < 0.24
    without = [name for name in replicas(4) if name != "replica2"]
    for adapter_id in ADAPTERS:
        expected = before[adapter_id] if before[adapter_id] != "replica2" else rank(adapter_id, replicas(4))[1]
        assert rank(adapter_id, without)[0] == expected


def test_a_popular_adapter_spreads_over_as_many_replicas_as_it_needs() -> None:
    loads, places = serve_requests(["adp_popular"] * 100, 4)
    assert places["adp_popular"] == set(replicas(4))
    assert max(loads.values()) <= 1.25 * 100 / 4 + 1
    # Fewer requests take fewer replicas, always the first ones of the adapter's order.
    for requests in (1, 2, 3):
        _, few = serve_requests(["adp_popular"] * requests, 4)
        assert few["adp_popular"] == set(rank("adp_popular", replicas(4))[: len(few["adp_popular"])])
    assert len(serve_requests(["adp_popular"], 4)[1]["adp_popular"]) == 1


def test_no_load_is_above_the_bound_with_skewed_traffic() -> None:
    chance = random.Random(1)
    weights = [1 / (number + 1) for number in range(len(ADAPTERS))]  # Zipf
    loads, places = serve_requests(chance.choices(ADAPTERS, weights, k=400), 5)
    assert max(loads.values()) <= 1.25 * 400 / 5 + 1
    # Beside the most popular ones nearly all adapters have one place.
    single = sum(len(place) == 1 for place in places.values())
    assert single / len(places) > 0.8


def test_replicas_beyond_the_bound_come_last_the_least_loaded_first() -> None:
    loads = {"a": 90, "b": 70, "c": 0, "d": 1}
    for adapter_id in ADAPTERS[:20]:
        order = order_by_affinity(adapter_id, loads)
        assert order[2:] == ["b", "a"] and order[:2] == rank(adapter_id, ["c", "d"])


class FakeReplica:
    """A replica that takes requests and says how many it has."""

    def __init__(self, name: str, ongoing: int = 0, limit: int = 100) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.node_id = "node"
        self.availability_zone = None
        self.multiplexed_model_ids: set[str] = set()
        self.max_ongoing_requests = limit
        self.ongoing = ongoing

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.ongoing


def make_router(fakes: list[FakeReplica]) -> AdapterAffinityRouter:
    """Ray's own router with our choice, over fake replicas."""
    router = AdapterAffinityRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        create_replica_wrapper_func=lambda info: info,
        initial_backoff_s=0.001,
        max_backoff_s=0.01,
    )
    router.initialize_state()
    router.update_replicas(fakes)
    for fake in fakes:
        router.on_new_queue_len_info(fake.replica_id, fake.ongoing)
    return router


def request(number: int, adapter_id: str | None, by_argument: bool = True) -> PendingRequest:
    context = EngineContext(f"req_{number}", "ten_1", adapter_id if by_argument else None)
    metadata = RequestMetadata(
        request_id=f"r{number}",
        internal_request_id=f"i{number}",
        call_method="chat",
        multiplexed_model_id="" if by_argument else adapter_id or "",
    )
    return PendingRequest(args=[{}, context], kwargs={}, metadata=metadata)


async def choose(router: AdapterAffinityRouter, asked: PendingRequest) -> str:
    """The replica that the router picks; the request is sent there."""
    chosen: Any = await asyncio.wait_for(router._choose_replica_for_request(asked), 10)
    router.on_send_request(chosen.replica_id)
    return str(chosen.replica_id.unique_id)


async def test_the_router_sends_adapters_to_their_replica_and_counts_what_it_sent() -> None:
    router = make_router([FakeReplica(name) for name in replicas(3)])
    for number, adapter_id in enumerate(ADAPTERS[:3]):
        expected = rank(adapter_id, replicas(3))[0]
        assert await choose(router, request(2 * number, adapter_id)) == expected
    spread = {await choose(router, request(100 + number, "adp_popular")) for number in range(30)}
    assert spread == set(replicas(3))


async def test_base_requests_go_to_the_less_loaded_of_two() -> None:
    router = make_router([FakeReplica("replica0", 5), FakeReplica("replica1", 1)])
    picks = Counter([await choose(router, request(number, None)) for number in range(4)])
    assert picks == {"replica1": 4}


async def test_a_full_replica_is_passed_over_and_full_ones_are_waited_for() -> None:
    first, second = rank("adp_1", replicas(2))
    fakes = {name: FakeReplica(name, limit=1) for name in replicas(2)}
    fakes[first].ongoing = 1
    router = make_router(list(fakes.values()))
    assert await choose(router, request(1, "adp_1")) == second
    fakes[second].ongoing = 1
    waiting = asyncio.create_task(choose(router, request(2, "adp_1")))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fakes[first].ongoing = 0
    assert await waiting == first


@pytest.mark.parametrize("by_argument", [True, False])
async def test_the_adapter_is_read_from_the_call(by_argument: bool) -> None:
    assert adapter_of(request(1, "adp_1", by_argument)) == "adp_1"
    assert adapter_of(request(1, None, by_argument)) is None


def test_a_balance_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="balance"):
        AdapterAffinityRouter.initialize_state(SimpleNamespace(), 0.5)  # type: ignore[arg-type]
