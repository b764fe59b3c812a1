"""Adapters that were deleted or replaced leave memory and disk, and never under a request that needs them.

The engine deployment over a real registry, blob store and node cache; vLLM is scripted. With the real one:
test_engine.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serve.deployments import engine as engine_module
from tests.serve.engine_helpers import World, vllm, world

__all__ = ["world"]


async def test_a_deleted_adapter_leaves_memory_and_disk(world: World) -> None:
    engine = world.start()
    kept, gone = world.publish("a"), world.publish("b")
    assert [await world.ask(engine, adapter_id) for adapter_id in (kept, gone)] == [200, 200]
    assert await engine.drop_unneeded() == []
    world.registry.delete_document(world.tenant_id, "b")
    assert world.on_disk() == {kept, gone}
    assert await engine.drop_unneeded() == [gone]
    assert vllm(engine).loaded == set(vllm(engine).models.lora_requests) == {kept}
    assert world.on_disk() == {kept}
    assert {row["adapter_id"] for row in (await engine.slots())["adapters"]} == {kept}
    assert await world.ask(engine, gone) == 404 and await world.ask(engine, kept) == 200
    assert await engine.drop_unneeded() == []


async def test_a_replaced_adapter_leaves_and_can_still_be_pinned(world: World) -> None:
    engine = world.start()
    old = world.publish("a")
    await world.ask(engine, old)
    new = world.publish("a", "new text")
    await world.ask(engine, new)
    assert await engine.drop_unneeded() == [old]
    assert world.on_disk() == {new} and vllm(engine).loaded == {new}
    assert await world.ask(engine, old) == 200
    numbers = vllm(engine).numbers
    assert len(set(numbers)) == len(numbers) == 3, "vLLM never sees a number twice"


async def test_nothing_is_taken_from_under_a_request(world: World) -> None:
    engine = world.start()
    using, waiting = world.publish("a"), world.publish("b")
    stream = world.request(engine, using, stream=True)
    assert (await anext(stream))["status"] == 200
    # The one slot is taken, so this request has its files but does not count as a user yet.
    queued = asyncio.create_task(world.ask(engine, waiting))
    while not (await engine.slots())["waiting"]:
        await asyncio.sleep(0.01)
    for external_id in ("a", "b"):
        world.registry.delete_document(world.tenant_id, external_id)
    assert await engine.drop_unneeded() == []
    assert not await engine.forget(using) and not await engine.forget(waiting)
    assert world.on_disk() == {using, waiting} and vllm(engine).loaded == {using}
    vllm(engine).finish.set()
    assert "[DONE]" in "".join([piece async for piece in stream])
    assert await queued == 200
    assert await engine.drop_unneeded() == sorted([using, waiting])
    assert world.on_disk() == set() and vllm(engine).loaded == set()


async def test_what_was_used_just_now_stays_for_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = world.start()
    adapter_id = world.publish("a")
    await world.ask(engine, adapter_id)
    world.registry.delete_document(world.tenant_id, "a")
    monkeypatch.setattr(engine_module, "DROP_IDLE_S", 3600.0)
    assert await engine.drop_unneeded() == [] and world.on_disk() == {adapter_id}


async def test_a_running_engine_follows_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FOLLOW_S", 0.01)
    engine = world.start()
    adapter_id = world.publish("a")
    await world.ask(engine, adapter_id)
    failures = iter([OSError("the registry is away")] * 2)
    look = engine._cache.unneeded

    async def unneeded(adapter_ids: Any) -> list[str]:
        for failure in failures:
            raise failure
        return await look(adapter_ids)

    monkeypatch.setattr(engine._cache, "unneeded", unneeded)
    world.registry.delete_document(world.tenant_id, "a")
    async with asyncio.timeout(10):
        while world.on_disk() or vllm(engine).loaded:
            await asyncio.sleep(0.01)
    await engine.shutdown()
    await asyncio.sleep(0)
    assert engine._follower is not None and engine._follower.done()


async def test_a_new_engine_drops_what_was_deleted_while_none_ran(world: World) -> None:
    engine = world.start()
    kept, gone = world.publish("a"), world.publish("b")
    for adapter_id in (kept, gone):
        await world.ask(engine, adapter_id)
    await engine.shutdown()
    world.registry.delete_document(world.tenant_id, "b")
    cut_short = world.config.cache_dir / "adapters" / "0" / f".{kept}.0123.part"
    cut_short.mkdir()
    engine = world.start()
    assert not cut_short.exists()
    assert await engine.drop_unneeded() == [gone] and world.on_disk() == {kept}


async def test_engines_on_one_machine_have_caches_of_their_own(world: World) -> None:
    first, second = world.start(), world.start()
    adapter_id = world.publish("a")
    for engine in (first, second):
        assert await world.ask(engine, adapter_id) == 200
    world.registry.delete_document(world.tenant_id, "a")
    assert await first.drop_unneeded() == [adapter_id]
    assert world.on_disk() == {adapter_id}, "the other engine may be reading its copy"
    assert await second.drop_unneeded() == [adapter_id] and world.on_disk() == set()


async def test_folders_of_engines_that_ended_are_taken_over_or_emptied(world: World) -> None:
    parent = world.config.cache_dir / "adapters"
    first, second, third = (world.cache(parent) for _ in range(3))
    assert [cache._folder.name for cache in (first, second, third)] == ["0", "1", "2"]
    adapter_id = world.publish("a")
    for cache in (first, second, third):
        await cache.get(world.tenant_id, adapter_id)
        if cache is not second:
            cache.close()
    fourth = world.cache(parent)
    left = {path.parent.parent.name for path in parent.rglob("*.safetensors")}
    assert fourth._folder.name == "0" and left == {"0", "1"}
    fourth.close()
    second.close()
