"""The residency table: never more adapters than slots, nobody starves, nothing leaks."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import pytest

from serve.residency import ResidencyTable, SlotsBusy


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_admits_as_many_adapters_as_slots() -> None:
    table = ResidencyTable(slots=2)
    await table.acquire("a", "ten_1")
    await table.acquire("b", "ten_1")
    await table.acquire("a", "ten_1")
    third = asyncio.create_task(table.acquire("c", "ten_1"))
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
    await table.acquire("popular", "ten_1")
    rare = asyncio.create_task(table.acquire("rare", "ten_1"))
    await _settle()
    await table.acquire("popular", "ten_1")
    now = 2.0
    late = asyncio.create_task(table.acquire("popular", "ten_1"))
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
    async with table.hold("a", "ten_1"):
        with pytest.raises(SlotsBusy):
            await table.acquire("b", "ten_1")
        assert table.waiting == 0
    async with table.hold("b", "ten_1"):
        assert table.users("b") == 1


async def test_idle_time_begins_when_no_request_needs_the_adapter() -> None:
    now = 10.0
    table = ResidencyTable(slots=1, clock=lambda: now)
    assert table.idle_s("a") == math.inf
    with table.name("a"), table.name("a"):
        assert table.idle_s("a") is None, "a request that has no slot yet needs it too"
        await table.acquire("a", "ten_1")
    assert table.idle_s("a") is None
    table.release("a")
    now = 13.0
    assert table.idle_s("a") == 3.0
    table.forget("a")
    assert table.idle_s("a") == math.inf


async def test_cancelled_waiters_hold_nothing() -> None:
    table = ResidencyTable(slots=1)
    await table.acquire("a", "ten_1")
    waiter = asyncio.create_task(table.acquire("b", "ten_1"))
    await _settle()
    # Admitted and cancelled in the same turn of the loop.
    table.release("a")
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert table.users("b") == 0
    await asyncio.wait_for(table.acquire("c", "ten_1"), 1)


async def test_random_traffic_keeps_the_bound() -> None:
    table = ResidencyTable(slots=3, patience_s=0.001)
    dice = random.Random(0)
    most = 0

    async def request(adapter_id: str) -> None:
        nonlocal most
        async with table.hold(adapter_id, "ten_1"):
            most = max(most, sum(row.users > 0 for row in table.rows()))
            await asyncio.sleep(dice.random() * 0.002)

    tasks = [asyncio.create_task(request(f"adapter{dice.randrange(12)}")) for _ in range(400)]
    for task in dice.sample(tasks, 60):
        asyncio.get_running_loop().call_later(dice.random() * 0.2, task.cancel)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert table.waiting == 0 and all(row.users == 0 for row in table.rows())


async def test_a_tenant_keeps_to_its_share_while_others_wait() -> None:
    table = ResidencyTable(slots=4, tenant_share=0.5)
    assert table.tenant_slots == 2
    for adapter_id in ("a1", "a2", "a3", "a4"):
        await table.acquire(adapter_id, "ten_a")
    more = asyncio.create_task(table.acquire("a5", "ten_a"))
    other = asyncio.create_task(table.acquire("b1", "ten_b"))
    await _settle()
    assert not more.done() and not other.done()
    table.release("a1")
    await other
    await _settle()
    assert not more.done(), "the slot went to the other tenant, which came later and has none"
    table.release("a2")
    await more
    assert table.used == 4, "nobody else waits, so the tenant may go beyond its share"


async def test_no_slot_stays_empty_for_the_sake_of_shares() -> None:
    """Two tenants at their share both wait: neither may hold the other back."""
    table = ResidencyTable(slots=3, tenant_share=0.1)
    for adapter_id, tenant_id in (("a1", "ten_a"), ("b1", "ten_b"), ("c1", "ten_c")):
        await table.acquire(adapter_id, tenant_id)
    waiting = [asyncio.create_task(table.acquire(name, tenant)) for name, tenant in (("a2", "ten_a"), ("b2", "ten_b"))]
    await _settle()
    table.release("c1")
    await _settle()
    assert [task.done() for task in waiting] == [True, False] and table.used == 3
    table.release("a1")
    await asyncio.gather(*waiting)


class Traffic:
    """Requests, releases, cancellations and pauses in any order, and what the table promises at every moment."""

    def __init__(self, slots: int, share: float) -> None:
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.table = ResidencyTable(slots, tenant_share=share, clock=lambda: self.now)
        self.holding: list[str] = []
        self.waiting: list[tuple[str, asyncio.Task[None]]] = []

    def step(self, dice: random.Random) -> None:
        what = dice.random()
        if what < 0.4:
            for _ in range(dice.randint(1, 5)):
                tenant = dice.randint(0, 2)
                name = f"{tenant}.{dice.randint(0, 2)}"
                self.waiting.append((name, self.loop.create_task(self.table.acquire(name, f"ten_{tenant}"))))
        elif what < 0.7 and self.holding:
            self.loop.call_soon(self.table.release, self.holding.pop(dice.randrange(len(self.holding))))
        elif what < 0.8 and self.waiting:
            self.waiting.pop(dice.randrange(len(self.waiting)))[1].cancel()
        else:
            self.now += 2 * dice.random()
        self.loop.run_until_complete(_settle())
        self.holding += [name for name, task in self.waiting if task.done()]
        self.waiting = [(name, task) for name, task in self.waiting if not task.done()]

    def check(self) -> None:
        table = self.table
        assert {row.adapter_id: row.users for row in table.rows() if row.users} == Counter(self.holding)
        assert table.used == len(set(self.holding)) <= table.slots
        assert table.waiting == len(self.waiting)
        if self.waiting:
            assert table.used == table.slots, "a slot is empty although a request waits"

    def close(self) -> None:
        for _, task in self.waiting:
            task.cancel()
        self.loop.run_until_complete(_settle())
        self.loop.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_any_order_of_events_keeps_the_promises(slots: int, share: float) -> None:
    for seed in range(50):
        dice = random.Random(seed)
        traffic = Traffic(slots, share)
        try:
            for _ in range(40):
                traffic.step(dice)
                traffic.check()
        finally:
            traffic.close()
        assert traffic.table.waiting == 0
