"""Which adapters an engine takes in, keeps and lets go, over a real registry, blob store and node cache; vLLM's own
adapter lists without its model. With the real vLLM: test_engine.py."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from serve.deployments import engine as engine_module
from serve.deployments.engine import EngineDeployment
from serve.deployments.engine_adapters import _make_private
from tests.serve.engine_helpers import World, vllm, world

__all__ = ["world"]


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


async def rows(engine: EngineDeployment) -> dict[str, dict[str, Any]]:
    return {row["adapter_id"]: row for row in (await engine.slots())["adapters"]}


async def test_a_resident_adapter_costs_no_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    looked_up = 0
    get_adapter = engine._registry.get_adapter

    def counted(*args: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        return get_adapter(*args)

    monkeypatch.setattr(engine._registry, "get_adapter", counted)
    for _ in range(5):
        assert await world.ask(engine, adapter_id) == 200
    assert vllm(engine).calls == ["add_lora"] and looked_up == 1
    row = (await rows(engine))[adapter_id]
    assert (row["tier"], row["hits"], row["uses"], row["users"]) == ("slot", 4, 5, 0)
    assert row["bytes"] == len(b"weights") and row["load_ms"] >= 0 and row["since"] <= row["last_used"] + 0.1


async def test_what_one_tenant_has_resident_is_not_there_for_another(world: World) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    assert await world.ask(engine, adapter_id) == 200
    other = world.registry.create_tenant("other").id
    assert (await world.head(engine, adapter_id, tenant_id=other))["status"] == 404


async def test_requests_for_one_adapter_wait_for_one_load(world: World) -> None:
    engine = world.start(max_loras=2)
    adapter_id = world.publish("a")
    vllm(engine).hold.clear()
    asked = [asyncio.create_task(world.ask(engine, adapter_id)) for _ in range(5)]
    while not vllm(engine).calls:
        await asyncio.sleep(0.01)
    asked[0].cancel()  # whose request began the load
    await asyncio.sleep(0.01)
    vllm(engine).hold.set()
    with pytest.raises(asyncio.CancelledError):
        await asked[0]
    assert await asyncio.gather(*asked[1:]) == [200] * 4
    assert vllm(engine).calls == ["add_lora"]


async def test_loads_come_one_at_a_time(world: World) -> None:
    engine = world.start(max_loras=3)
    adapters = [world.publish(name) for name in "abc"]
    vllm(engine).hold.clear()
    asked = [asyncio.create_task(world.ask(engine, adapter_id)) for adapter_id in adapters]
    async with asyncio.timeout(10):
        while engine._residency.used < 3:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert vllm(engine).calls == ["add_lora"]
    vllm(engine).hold.set()
    assert await asyncio.gather(*asked) == [200] * 3


async def test_random_traffic_never_makes_vllm_choose(world: World) -> None:
    """Ten adapters, two slots, room for four: `ScriptedVllm` asserts that it is never given one too many, and that an
    adapter is there when a request runs."""
    engine = world.start(max_loras=2, max_cpu_loras=4)
    adapters = [world.publish(f"doc{number}") for number in range(10)]
    dice = random.Random(0)

    async def request() -> int:
        await asyncio.sleep(dice.random() * 0.5)
        return await world.ask(engine, dice.choices(adapters, weights=range(1, 11))[0])

    tasks = [asyncio.create_task(request()) for _ in range(300)]
    for task in dice.sample(tasks, 40):
        asyncio.get_running_loop().call_later(dice.random() * 0.6, task.cancel)
    ended = Counter(str(result) for result in await asyncio.gather(*tasks, return_exceptions=True))
    assert set(ended) <= {"200", ""} and ended["200"] >= 260, ended
    await asyncio.sleep(0.05)
    held = {row["adapter_id"] for row in (await rows(engine)).values() if row["tier"] != "disk"}
    assert held == vllm(engine).loaded and len(held) == 4
    assert set(vllm(engine).models.lora_requests) <= held
    slots = {row["adapter_id"] for row in (await rows(engine)).values() if row["tier"] == "slot"}
    assert slots == vllm(engine).worker.in_slots()
    assert (await engine.slots())["evictions"]["cpu"] == vllm(engine).calls.count("remove_lora")


async def test_a_load_that_fails_leaves_nothing_behind(world: World) -> None:
    """vLLM has put the adapter into its lists before the copy into a slot fails."""
    engine = world.start()
    adapter_id = world.publish("a")
    vllm(engine).break_load = True
    assert await world.ask(engine, adapter_id) == 503
    assert vllm(engine).loaded == set() and (await rows(engine))[adapter_id]["tier"] == "disk"
    assert await world.ask(engine, adapter_id) == 200
    assert vllm(engine).calls == ["add_lora", "remove_lora", "add_lora"]


async def test_differences_to_vllm_are_mended(world: World) -> None:
    engine = world.start(max_loras=2)
    lost, kept = world.publish("a"), world.publish("b")
    for adapter_id in (lost, kept):
        await world.ask(engine, adapter_id)
    requests = vllm(engine).models.lora_requests
    vllm(engine).worker.remove_adapter(requests[lost].lora_int_id)
    stranger = type(requests[kept])("stranger", 999, requests[kept].lora_path)
    vllm(engine).worker.add_adapter(stranger)
    await engine._loader.reconcile()
    assert vllm(engine).loaded == {kept}
    assert await world.ask(engine, lost) == 200 and vllm(engine).loaded == {kept, lost}


@pytest.mark.parametrize("damage", ["flip", "remove"])
@pytest.mark.parametrize("restart", [False, True])
async def test_a_damaged_local_copy_is_fetched_again(world: World, damage: str, restart: bool) -> None:
    engine = world.start(max_loras=1, max_cpu_loras=1)
    damaged, other = world.publish("a"), world.publish("b")
    for adapter_id in (damaged, other):
        await world.ask(engine, adapter_id)
    local = world.local(damaged)
    good = local.read_bytes()
    flip(local) if damage == "flip" else shutil.rmtree(local.parent)
    if restart:
        await engine.shutdown()
        engine = world.start()
    assert await world.ask(engine, damaged) == 200
    assert local.read_bytes() == good
    found = damage == "flip" or not restart
    assert ('imprint_adapter_damaged_total{tier="disk"} 1.0' in engine._view.metrics_text()) == found


async def test_files_are_verified_once(world: World) -> None:
    """And neither they nor the registry are read in full when an adapter goes to and fro between disk and memory."""
    engine = world.start(max_loras=1, max_cpu_loras=1)
    adapters = [world.publish(name) for name in "ab"]
    for adapter_id in adapters:
        await world.ask(engine, adapter_id)
    await engine.shutdown()
    engine = world.start()
    for adapter_id in adapters * 3:
        await world.ask(engine, adapter_id)
    assert vllm(engine).calls.count("add_lora") == 6
    text = engine._view.metrics_text()
    assert 'imprint_adapter_load_duration_seconds_count{step="verify"} 2.0' in text
    assert 'imprint_adapter_hits_total{tier="disk"} 6.0' in text
    other = world.registry.create_tenant("other").id
    assert (await world.head(engine, adapters[0], tenant_id=other))["status"] == 404


@pytest.mark.parametrize("damage", ["flip", "remove"])
async def test_a_damaged_blob_is_set_aside_and_its_document_generated_again(world: World, damage: str) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    prefix = f"adapters/{world.tenant_id}/{adapter_id}"
    if damage == "flip":
        flip(world.blob(adapter_id))
    else:
        world.blobs.delete_folder(prefix)
    head = await world.head(engine, adapter_id, on_missing="base")
    assert (head["status"], head["unavailable"]) == (200, True)
    assert engine._residency.used == 0 and engine._residency.idle_s(adapter_id) is not None
    items = [item async for item in world.request(engine, adapter_id)]
    assert items[0]["status"] == 503 and items[1]["error"]["code"] == "adapter_unavailable"
    assert not world.blobs.exists(prefix) and world.on_disk() == set() and vllm(engine).calls == []
    adapter = world.registry.get_adapter(world.tenant_id, adapter_id)
    document = world.registry.get_document(world.tenant_id, "a")
    assert adapter is not None and adapter.state == "stale"
    assert document is not None and document.state == "processing"
    (leased,) = world.registry.lease_jobs("w", 5, 60)
    assert leased.job.id == document.job_id and leased.version.text == "text"
    text = engine._view.metrics_text()
    assert 'imprint_adapter_damaged_total{tier="blobs"} 2.0' in text
    assert 'imprint_adapter_unavailable_total{answer="base"} 1.0' in text


async def test_the_base_answers_only_where_that_is_allowed(world: World) -> None:
    """Any reason for which an adapter cannot be had will do, but not a lack of slots."""
    engine = world.start()
    foreign = world.publish("a")
    engine._cache._base_fingerprint = "another base"
    head = await world.head(engine, foreign, on_missing="base")
    assert (head["status"], head["unavailable"]) == (200, True)
    assert (await world.head(engine, foreign))["status"] == 409
    engine._cache._base_fingerprint = "base"
    busy = world.request(engine, foreign, stream=True)
    assert (await anext(busy))["unavailable"] is False
    engine._residency._wait_s = 0.05
    assert (await world.head(engine, world.publish("b"), on_missing="base"))["status"] == 503
    await busy.aclose()


async def test_the_cache_on_disk_keeps_to_its_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "EVICT_IDLE_S", 0.0)
    engine = world.start(max_loras=1, max_cpu_loras=1)
    adapters = [world.publish(name) for name in "abcd"]
    await world.ask(engine, adapters[0])
    one = engine._cache.size_bytes
    engine._cache._max_bytes = 2 * one
    await world.ask(engine, adapters[1])
    await world.ask(engine, adapters[0])
    await world.ask(engine, adapters[2])
    assert world.on_disk() == {adapters[0], adapters[2]}, "the one used longest ago has gone"
    stream = world.request(engine, adapters[0], stream=True)
    await anext(stream)
    engine._cache._max_bytes = one
    await engine._cache.shrink()
    assert world.on_disk() == {adapters[0]}, "the one in use stays"
    await stream.aclose()
    assert await world.ask(engine, adapters[3]) == 200
    assert world.on_disk() == {adapters[0], adapters[3]}, "vLLM held the first while the other came"
    await engine._cache.shrink()
    assert world.on_disk() == {adapters[3]} and engine._cache.size_bytes == one
    assert (await engine.slots())["evictions"]["disk"] == 3


async def test_a_new_engine_knows_what_is_on_disk(world: World) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    await world.ask(engine, adapter_id)
    size = engine._cache.size_bytes
    await engine.shutdown()
    engine = world.start()
    assert (engine._cache.size_bytes, await rows(engine)) == (size, {adapter_id: (await rows(engine))[adapter_id]})
    assert (await rows(engine))[adapter_id]["tier"] == "disk"
    assert await world.ask(engine, adapter_id) == 200


async def test_new_adapters_are_prefetched_into_free_room(world: World) -> None:
    engine = world.start(max_loras=2, max_cpu_loras=2)
    before = world.publish("a")
    assert await engine._prefetcher.look() == [], "what was there before is not new"
    fresh = [world.publish(name) for name in "bcd"]
    assert sorted(await engine._prefetcher.look()) == sorted(fresh)
    assert world.on_disk() == set(fresh) and len(vllm(engine).loaded) == 2
    assert await engine._prefetcher.look() == []
    assert await world.ask(engine, before) == 200
    loaded = next(iter(vllm(engine).loaded - {before}))
    calls = len(vllm(engine).calls)
    assert await world.ask(engine, loaded) == 200 and len(vllm(engine).calls) == calls
    engine._cache._max_bytes = 0
    world.publish("e")
    assert await engine._prefetcher.look() == [], "a guess pushes out nothing"


async def test_prefetching_waits_while_requests_do(world: World) -> None:
    engine = world.start()
    await engine._prefetcher.look()
    stream = world.request(engine, world.publish("a"), stream=True)
    await anext(stream)
    waiting = asyncio.create_task(world.ask(engine, world.publish("b")))
    while not engine._residency.waiting:
        await asyncio.sleep(0.01)
    looking = asyncio.create_task(engine._prefetcher.look())
    await asyncio.sleep(0.2)
    assert not looking.done()
    vllm(engine).finish.set()
    _ = [piece async for piece in stream]
    assert await waiting == 200
    await looking


async def test_the_cache_may_lie_elsewhere_but_not_in_a_strangers_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.start(cache_dir=str(tmp_path / "shm" / "imprint"))
    await world.ask(engine, world.publish("a"))
    assert len(list((tmp_path / "shm").rglob("*.safetensors"))) == 1
    assert (tmp_path / "shm" / "imprint").stat().st_mode & 0o077 == 0
    if os.getuid() == 0:  # root's folders are everybody's to trust
        os.chown(tmp_path / "shm" / "imprint", 4711, 4711)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="engine.cache_dir"):
        _make_private(tmp_path / "shm" / "imprint" / "adapters")


async def test_metrics_name_no_adapter(world: World) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    for _ in range(2):
        await world.ask(engine, adapter_id)
    text = engine._view.metrics_text()
    assert "adp_" not in text
    for line in (
        'imprint_adapter_hits_total{tier="blobs"} 1.0',
        'imprint_adapter_hits_total{tier="slot"} 1.0',
        'imprint_adapter_loads_total{outcome="loaded",reason="request"} 1.0',
        'imprint_adapter_load_duration_seconds_count{step="fetch"} 1.0',
        'imprint_adapter_load_duration_seconds_count{step="load"} 1.0',
        'imprint_adapters_resident{tier="slot"} 1.0',
        'imprint_adapters_resident{tier="disk"} 0.0',
    ):
        assert line in text, line
