"""Which adapters may be in the engine's LoRA slots, who waits for one, and which ones nobody needs.

vLLM's own pins cannot be undone, and its cache raises when all slots are pinned. So this table counts the users of each
adapter before the engine hears of it, and lets at most as many different adapters in at a time as there are slots.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass


class SlotsBusy(Exception):
    """No slot became free within the time a request may wait."""


@dataclass(slots=True)
class Resident:
    """An adapter that has users now or had some. Times are seconds of the table's clock."""

    adapter_id: str
    users: int = 0
    uses: int = 0
    last_used: float = 0.0


@dataclass(slots=True, eq=False)
class _Waiter:
    adapter_id: str
    since: float
    admitted: asyncio.Future[None]


class ResidencyTable:
    """Use counts by adapter, and a fair queue for the slots. For one event loop; not thread-safe.

    Requests are admitted in order, except that one for an adapter already in use may overtake, since it costs no
    slot. Once the first in the queue has waited ``patience_s`` nothing overtakes it, so that popular adapters cannot
    starve others.
    """

    def __init__(
        self,
        slots: int,
        patience_s: float = 1.0,
        wait_s: float = 60.0,
        remember: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``slots``: different adapters in use at once; ``wait_s``: after it `SlotsBusy` is raised;
        ``remember``: how many idle adapters `rows` still lists."""
        self.slots = slots
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._remember = remember
        self._clock = clock
        self._in_use: dict[str, Resident] = {}
        self._idle: dict[str, Resident] = {}
        self._named: Counter[str] = Counter()
        self._queue: deque[_Waiter] = deque()

    @contextmanager
    def name(self, adapter_id: str) -> Iterator[None]:
        """Marks the adapter as needed for the length of the block: from before a request looks for its files, so also
        while it waits for a slot, until the request is over."""
        self._named[adapter_id] += 1
        try:
            yield
        finally:
            self._named[adapter_id] -= 1
            if not self._named[adapter_id]:
                del self._named[adapter_id]

    def idle_s(self, adapter_id: str) -> float | None:
        """For how many seconds no request has needed the adapter: None while one does, infinite if none is known."""
        if adapter_id in self._named or adapter_id in self._in_use:
            return None
        resident = self._idle.get(adapter_id)
        return math.inf if resident is None else self._clock() - resident.last_used

    @asynccontextmanager
    async def hold(self, adapter_id: str) -> AsyncIterator[None]:
        """Counts the caller as a user of the adapter for the length of the block. Raises SlotsBusy."""
        await self.acquire(adapter_id)
        try:
            yield
        finally:
            self.release(adapter_id)

    async def acquire(self, adapter_id: str) -> None:
        """Waits for a slot; each call needs one `release`. Raises SlotsBusy after the table's waiting time."""
        waiter = _Waiter(adapter_id, self._clock(), asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self._admit()
        try:
            async with asyncio.timeout(self._wait_s):
                await waiter.admitted
        except BaseException as error:
            self._withdraw(waiter)
            if isinstance(error, TimeoutError):
                raise SlotsBusy(f"all {self.slots} adapter slots stayed busy for {self._wait_s:g} s") from error
            raise

    def release(self, adapter_id: str) -> None:
        """Gives back one use."""
        resident = self._in_use[adapter_id]
        resident.users -= 1
        resident.last_used = self._clock()
        if resident.users == 0:
            del self._in_use[adapter_id]
            self._idle[adapter_id] = resident
            while len(self._idle) > self._remember:
                self._idle.pop(next(iter(self._idle)))
        self._admit()

    def users(self, adapter_id: str) -> int:
        """How many requests use the adapter now."""
        resident = self._in_use.get(adapter_id)
        return resident.users if resident else 0

    def forget(self, adapter_id: str) -> None:
        """Drops an idle adapter from `rows`."""
        self._idle.pop(adapter_id, None)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    def rows(self) -> list[Resident]:
        """Copies of the entries: those in use first, then idle ones, last used first."""
        idle = sorted(self._idle.values(), key=lambda resident: -resident.last_used)
        return [Resident(one.adapter_id, one.users, one.uses, one.last_used) for one in [*self._in_use.values(), *idle]]

    def _admit(self) -> None:
        first_blocked: _Waiter | None = None
        kept: deque[_Waiter] = deque()
        now = self._clock()
        for waiter in self._queue:
            if waiter.admitted.cancelled():
                continue
            patient = first_blocked is None or now - first_blocked.since < self._patience_s
            fits = waiter.adapter_id in self._in_use if first_blocked else self._fits(waiter.adapter_id)
            if patient and fits:
                self._count(waiter)
            else:
                first_blocked = first_blocked or waiter
                kept.append(waiter)
        self._queue = kept

    def _fits(self, adapter_id: str) -> bool:
        return adapter_id in self._in_use or len(self._in_use) < self.slots

    def _count(self, waiter: _Waiter) -> None:
        resident = self._in_use.get(waiter.adapter_id)
        if resident is None:
            resident = self._idle.pop(waiter.adapter_id, None) or Resident(waiter.adapter_id)
            self._in_use[waiter.adapter_id] = resident
        resident.users += 1
        resident.uses += 1
        resident.last_used = self._clock()
        waiter.admitted.set_result(None)

    def _withdraw(self, waiter: _Waiter) -> None:
        """Takes back a request that gave up, whether it still waits or was admitted in the same moment."""
        if waiter in self._queue:
            self._queue.remove(waiter)
            self._admit()
        elif waiter.admitted.done() and not waiter.admitted.cancelled():
            self.release(waiter.adapter_id)
