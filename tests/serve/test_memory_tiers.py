"""The table of what vLLM holds, against vLLM's own lists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm.lora.request import LoRARequest

from serve.memory_tiers import HeldAdapter, MemoryTiers
from tests.serve.engine_helpers import ModellessWorker

NAMES = st.sampled_from([f"adp_{number}" for number in range(9)])


class TiersAsVllm(RuleBasedStateMachine):
    """Loads, removals and steps in any order: the table always says what vLLM's own classes hold."""

    @initialize(slots=st.integers(1, 3), more=st.integers(0, 3))
    def start(self, slots: int, more: int) -> None:
        self.tiers: MemoryTiers[LoRARequest] = MemoryTiers(slots, slots + more)
        self.worker = ModellessWorker(slots, slots + more, look=False)
        self.numbers = itertools.count(slots + 1)

    @rule(name=NAMES, data=st.data())
    def load(self, name: str, data: st.DataObject) -> None:
        """As `AdapterLoader` does: first the victim goes, then the new one comes."""
        if name in self.tiers:
            return
        if self.tiers.full:
            in_use = data.draw(st.sets(NAMES, max_size=self.tiers.slots - 1))
            victim = self.tiers.victim(in_use.__contains__)
            assert victim is not None and victim not in in_use
            self.remove(victim)
        request = LoRARequest(name, next(self.numbers), "/adapters/" + name)
        self.worker.add_adapter(request)
        self.tiers.put(HeldAdapter(name, "ten_1", request, 1, 0.0, 0.0))

    @rule(names=st.lists(NAMES, min_size=1, max_size=3, unique=True))
    def step(self, names: list[str]) -> None:
        held = [found for name in names if (found := self.tiers.get(name)) is not None][: self.tiers.slots]
        self.worker.step([one.request for one in held])
        for one in held:
            self.tiers.touch(one.id)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        held = self.tiers.remove(name)
        if held is not None:
            assert self.worker.remove_adapter(held.request.lora_int_id)

    @rule(name=NAMES)
    def touch_a_stranger(self, name: str) -> None:
        if name not in self.tiers:
            self.tiers.touch(name)

    @invariant()
    def says_what_vllm_holds(self) -> None:
        if not hasattr(self, "tiers"):
            return
        assert {held.id for held in self.tiers.rows()} == self.worker.held()
        assert {held.id for held in self.tiers.rows() if self.tiers.tier(held.id) == "slot"} == self.worker.in_slots()
        assert len(self.tiers) <= self.tiers.capacity and self.tiers.in_slot <= self.tiers.slots


TestTiersAsVllm = TiersAsVllm.TestCase
TestTiersAsVllm.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_times_and_evictions() -> None:
    now = 10.0
    evicted = 0

    def on_slot_evicted() -> None:
        nonlocal evicted
        evicted += 1

    tiers: MemoryTiers[str] = MemoryTiers(1, 2, on_slot_evicted, clock=lambda: now)
    tiers.put(HeldAdapter("a", "ten_1", "request a", 1, 0.01, 0.0))
    now = 20.0
    tiers.put(HeldAdapter("b", "ten_1", "request b", 1, 0.01, 0.0))
    assert [(held.id, tiers.tier(held.id), held.since) for held in tiers.rows()] == [
        ("b", "slot", 20.0),
        ("a", "cpu", 20.0),
    ]
    now = 30.0
    tiers.touch("b")
    held = tiers.get("b")
    assert held is not None and held.since == 20.0 and evicted == 1, "it was in a slot already"
    tiers.touch("a")
    assert evicted == 2 and tiers.tier("b") == "cpu"
    assert tiers.victim(lambda _: False) == "b" and tiers.victim(lambda _: True) is None
    with pytest.raises(ValueError, match="2 of 2"):
        tiers.put(HeldAdapter("c", "ten_1", "request c", 1, 0.01, 0.0))
    tiers.remove("b")
    with pytest.raises(ValueError, match="1 of 2"):
        tiers.put(HeldAdapter("a", "ten_1", "request a", 1, 0.01, 0.0))
