"""The residency table: never more adapters than slots, nobody starves, nothing leaks."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from serve.residency import ResidencyTable, SlotsBusy


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_admits_as_many_adapters_as_slots() -> None:
    table = ResidencyTable(slots=2)
    await table.acquire("a")
    await table.acquire("b")
    await table.acquire("a")
    third = asyncio.create_task(table.acquire("c"))
    await _settle()
    assert not third.done() and table.waiting == 1
    table.release("a")
    await _settle()
    assert not third.done(), "adapter a still has a user"
    table.release("a")
    await third
    assert (table.users("a"), table.users("b"), table.users("c")) == (0, 1, 1)
    assert [row.adapter_id for row in table.rows()] == ["b", "c", "a"]


async def test_a_waiting_adapter_is_overtaken_only_for_a_while() -> None:
    now = 0.0
    table = ResidencyTable(slots=1, patience_s=1.0, clock=lambda: now)
    await table.acquire("popular")
    rare = asyncio.create_task(table.acquire("rare"))
    await _settle()
    await table.acquire("popular")
    now = 2.0
    late = asyncio.create_task(table.acquire("popular"))
    await _settle()
    assert not late.done()
    table.release("popular")
    table.release("popular")
    await rare
    assert not late.done()
    table.release("rare")
    await late


async def test_gives_up_after_the_waiting_time() -> None:
    table = ResidencyTable(slots=1, wait_s=0.01)
    async with table.hold("a"):
        with pytest.raises(SlotsBusy):
            await table.acquire("b")
        assert table.waiting == 0
    async with table.hold("b"):
        assert table.users("b") == 1


async def test_idle_time_begins_when_no_request_needs_the_adapter() -> None:
    now = 10.0
    table = ResidencyTable(slots=1, clock=lambda: now)
    assert table.idle_s("a") == math.inf
    with table.name("a"), table.name("a"):
        assert table.idle_s("a") is None, "a request that has no slot yet needs it too"
        await table.acquire("a")
    assert table.idle_s("a") is None
    table.release("a")
    now = 13.0
    assert table.idle_s("a") == 3.0
    table.forget("a")
    assert table.idle_s("a") == math.inf


async def test_cancelled_waiters_hold_nothing() -> None:
    table = ResidencyTable(slots=1)
    await table.acquire("a")
    waiter = asyncio.create_task(table.acquire("b"))
    await _settle()
    # Admitted and cancelled in the same turn of the loop.
    table.release("a")
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert table.users("b") == 0
    await asyncio.wait_for(table.acquire("c"), 1)


async def test_random_traffic_keeps_the_bound() -> None:
    table = ResidencyTable(slots=3, patience_s=0.001)
    dice = random.Random(0)
    most = 0

    async def request(adapter_id: str) -> None:
        nonlocal most
        async with table.hold(adapter_id):
            most = max(most, sum(row.users > 0 for row in table.rows()))
            await asyncio.sleep(dice.random() * 0.002)

    tasks = [asyncio.create_task(request(f"adapter{dice.randrange(12)}")) for _ in range(400)]
    for task in dice.sample(tasks, 60):
        asyncio.get_running_loop().call_later(dice.random() * 0.2, task.cancel)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert table.waiting == 0 and all(row.users == 0 for row in table.rows())
