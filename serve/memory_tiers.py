"""Which adapters vLLM holds: its CPU cache and, of that, the slots, as vLLM's own rules fill them.

vLLM keeps adapters in two least-recently-used lists (`vllm/lora/model_manager.py`): `max_cpu_loras` in memory, and of
those `max_loras` in slots. Taking an adapter in gives it a slot, and so does each step that runs it, in place of the
one that ran longest ago. `AdapterLoader` alone takes adapters in and out and never more than fit, so vLLM has no
reason to drop one by itself, and this table knows without asking what is there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
MemoryTier = Literal["slot", "cpu"]


@dataclass(slots=True)
class HeldAdapter(Generic[T]):
    """An adapter in vLLM's memory. `request` is what vLLM knows it by, `since` seconds of the table's clock since when
    it has been in its present tier, `load_s` the seconds that vLLM took to load it."""

    id: str
    tenant_id: str
    request: T
    size_bytes: int
    load_s: float
    since: float
    hits: int = 0


class MemoryTiers(Generic[T]):
    """vLLM's two tiers. Not thread-safe."""

    def __init__(
        self,
        slots: int,
        capacity: int,
        on_slot_evicted: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``slots``: max_loras; ``capacity``: max_cpu_loras, at least as many."""
        self.slots = slots
        self.capacity = capacity
        self._on_slot_evicted = on_slot_evicted
        self._clock = clock
        # Both in order of use, last used last; whatever is in a slot is in `_held` too.
        self._held: OrderedDict[str, HeldAdapter[T]] = OrderedDict()
        self._in_slot: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, adapter_id: object) -> bool:
        return adapter_id in self._held

    @property
    def full(self) -> bool:
        """Whether vLLM would drop an adapter of its own choice if it were given another one."""
        return len(self._held) >= self.capacity

    @property
    def in_slot(self) -> int:
        """How many are in a slot."""
        return len(self._in_slot)

    def get(self, adapter_id: str) -> HeldAdapter[T] | None:
        """The adapter, if vLLM holds it."""
        return self._held.get(adapter_id)

    def tier(self, adapter_id: str) -> MemoryTier | None:
        """Where it is; None for neither."""
        if adapter_id in self._in_slot:
            return "slot"
        return "cpu" if adapter_id in self._held else None

    def put(self, adapter: HeldAdapter[T]) -> None:
        """Notes that vLLM has taken the adapter in. Raises ValueError when it is there already or there is no room."""
        if adapter.id in self._held or self.full:
            raise ValueError(f"{adapter.id} cannot be taken in: {len(self._held)} of {self.capacity} places are taken")
        self._held[adapter.id] = adapter
        self.touch(adapter.id)

    def touch(self, adapter_id: str) -> None:
        """Notes that vLLM runs the adapter, which gives it a slot; nothing happens if vLLM does not hold it."""
        if adapter_id not in self._held:
            return
        self._held.move_to_end(adapter_id)
        if adapter_id not in self._in_slot:
            now = self._clock()
            if len(self._in_slot) >= self.slots:
                evicted, _ = self._in_slot.popitem(last=False)
                self._held[evicted].since = now
                self._on_slot_evicted()
            self._held[adapter_id].since = now
        self._in_slot[adapter_id] = None
        self._in_slot.move_to_end(adapter_id)

    def remove(self, adapter_id: str) -> HeldAdapter[T] | None:
        """Notes that vLLM has dropped the adapter, or is about to; gives what it was."""
        self._in_slot.pop(adapter_id, None)
        return self._held.pop(adapter_id, None)

    def victim(self, in_use: Callable[[str], bool]) -> str | None:
        """The adapter to drop for another one: the one used longest ago that nobody uses; None when all are in use."""
        return next((adapter_id for adapter_id in self._held if not in_use(adapter_id)), None)

    def rows(self) -> list[HeldAdapter[T]]:
        """All of them, last used first."""
        return list(reversed(self._held.values()))
