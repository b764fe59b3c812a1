"""Engine replicas that are fake but for what the project adds to Ray around them: routing by adapter, retries, draining
and autoscaling. Run by test_replicas_on_ray.py on a Ray of its own; prints what happened as JSON.

    python -m tests.serve.fake_engines SCENARIO
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.app import engine_scale
from serve.autoscaling import SLOT_DEMAND
from serve.config import EngineConfig
from serve.deployments.engine_context import EngineContext
from serve.deployments.ingress import EngineHandle

NAME = "fake"
PATIENCE_S = 90.0


class FakeEngine:
    """Answers with its replica's ID; does as the body says: dies before or after the first piece, or takes long."""

    def __init__(self) -> None:
        self._id = ray_serve.get_replica_context().replica_id.unique_id
        self._demand = 0.0

    async def generate(self, endpoint: str, body: dict[str, Any], context: EngineContext) -> AsyncGenerator[Any, None]:
        dies = body.get("die") if self._id == body.get("victim") else None
        if dies == "before":
            os._exit(1)
        seconds = body.get("seconds", 0)
        if not seconds and dies is None:
            yield [{"status": 200, "stream": False, "headers": {}}, {"replica": self._id}]
            return
        yield [{"status": 200, "stream": True, "headers": {}}, f"data: {self._id}\n\n"]
        if dies == "after":
            await asyncio.sleep(0.5)  # for the piece to reach the ingress
            os._exit(1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(0.2)
            yield "data: more\n\n"
        yield "data: [DONE]\n\n"

    async def demand(self, demand: float) -> None:
        """From now on this replica says that its slots are wanted so many times."""
        self._demand = demand

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {SLOT_DEMAND: self._demand}


def deploy(**engine: Any) -> tuple[DeploymentHandle, EngineHandle]:
    """Fake engines under the options that the real ones have."""
    scaled = ray_serve.deployment(
        FakeEngine, name="engine", ray_actor_options={"num_cpus": 0.01}, health_check_period_s=1,
        **engine_scale(EngineConfig(**engine)),
    )  # fmt: skip
    handle = ray_serve.run(scaled.bind(), name=NAME, route_prefix=None)
    return handle, EngineHandle(handle)


async def ask(engines: EngineHandle, adapter: str | None, **body: Any) -> list[Any]:
    """All items of one request."""
    context = EngineContext("req_1", "ten_1", adapter)
    return [item async for item in engines.generate("chat", body, context)]


async def owner(engines: EngineHandle, adapter: str) -> str:
    """The replica that answers for an adapter."""
    _, answer = await ask(engines, adapter)
    return str(answer["replica"])


def running() -> int:
    """Replicas that run."""
    return ray_serve.status().applications[NAME].deployments["engine"].replica_states.get("RUNNING", 0)


async def until(done: Callable[[], bool]) -> float:
    """Wait; the seconds that it took. Raises TimeoutError."""
    started = time.monotonic()
    while not done():
        if time.monotonic() > started + PATIENCE_S:
            raise TimeoutError(f"not after {PATIENCE_S} s: {ray_serve.status()}")
        await asyncio.sleep(0.2)
    return time.monotonic() - started


async def replaced() -> float:
    """Wait until the controller has noticed that one of three replicas is gone and another runs; the seconds."""
    return await until(lambda: running() < 3) + await until(lambda: running() == 3)


async def replicas() -> dict[str, Any]:
    """Three replicas: who answers for which adapter, before and after one has died; and what requests at death get."""
    _, engines = deploy(num_replicas=3)
    adapters = [f"adp_{number}" for number in range(60)]
    first = {adapter: await owner(engines, adapter) for adapter in adapters}
    again = {adapter: await owner(engines, adapter) for adapter in reversed(adapters)}
    together = [answer["replica"] for _, answer in await asyncio.gather(*(ask(engines, "adp_1") for _ in range(30)))]
    slow = await asyncio.gather(*(ask(engines, "adp_1", seconds=1) for _ in range(30)))
    victim = first[adapters[0]]
    retried = await asyncio.gather(
        *(ask(engines, adapters[0], die="before", victim=victim) for _ in range(5)), return_exceptions=True
    )
    recovery_s = await replaced()
    after = {adapter: await owner(engines, adapter) for adapter in adapters}
    broken = await ask(engines, adapters[0], die="after", victim=after[adapters[0]])
    return {
        "first": first, "again": again, "together": together, "slow": sorted({items[1] for items in slow}),
        "victim": victim, "retried": [repr(one) if isinstance(one, BaseException) else one[1] for one in retried],
        "recovery_s": recovery_s, "after": after, "broken": broken,
    }  # fmt: skip


async def autoscaling() -> dict[str, Any]:
    """From one replica to three by demand for slots, and back while streams run on all of them."""
    handle, engines = deploy(
        autoscaling={"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 100,
                     "upscale_delay_s": 0, "downscale_delay_s": 0}, drain_s=60,
    )  # fmt: skip
    before = running()
    await handle.demand.remote(3.0)
    up_s = await until(lambda: running() == 3)
    streams = [asyncio.create_task(ask(engines, f"adp_{number}", seconds=50)) for number in range(12)]
    await handle.broadcast("demand", 0.0).results_async(timeout_s=10)
    down_s = await until(lambda: running() == 1)
    unfinished = sum(not stream.done() for stream in streams)
    ended = await asyncio.gather(*streams)
    return {
        "before": before, "up_s": up_s, "down_s": down_s, "unfinished": unfinished,
        "replicas": sorted({items[1] for items in ended}), "ends": sorted({items[-1] for items in ended}),
        "pieces": min(len(items) for items in ended),
    }  # fmt: skip


def main() -> None:
    """Runs one scenario in the Ray that RAY_ADDRESS names."""
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    ray_serve.start(proxy_location="Disabled")
    result = asyncio.run({"replicas": replicas, "autoscaling": autoscaling}[sys.argv[1]]())
    ray_serve.shutdown()
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
