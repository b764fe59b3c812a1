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
from dataclasses import dataclass, replace


class SlotsBusy(Exception):
    """No slot became free within the time a request may wait."""


@dataclass(slots=True)
class Resident:
    """An adapter that has users now or had some. Times are seconds of the table's clock."""

    adapter_id: str
    tenant_id: str
    users: int = 0
    uses: int = 0
    last_used: float = 0.0


@dataclass(slots=True, eq=False)
class _Waiter:
    adapter_id: str
    tenant_id: str
    since: float
    admitted: asyncio.Future[None]


class ResidencyTable:
    """Use counts by adapter, and a fair queue for the slots. For one event loop; not thread-safe.

    Requests are admitted in order, except that one for an adapter already in use may overtake, since it costs no
    slot. Once the first in the queue has waited ``patience_s`` nothing overtakes it, so that popular adapters cannot
    starve others. A tenant that has its share of the slots gets no further one while a tenant below its
    own waits, and then holds up nobody; no slot stays empty while anybody waits.
    """

    def __init__(
        self,
        slots: int,
        patience_s: float = 1.0,
        wait_s: float = 60.0,
        remember: int = 1024,
        tenant_share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``slots``: different adapters in use at once; ``wait_s``: after it `SlotsBusy` is raised;
        ``remember``: how many idle adapters `rows` still lists; ``tenant_share``: of the slots, rounded up, that one
        tenant may use while others wait (0 < share <= 1)."""
        self.slots = slots
        self.tenant_slots = math.ceil(tenant_share * slots)
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._remember = remember
        self._clock = clock
        self._in_use: dict[str, Resident] = {}
        self._idle: dict[str, Resident] = {}
        self._used_by: Counter[str] = Counter()  # slots in use, by tenant
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
    async def hold(self, adapter_id: str, tenant_id: str) -> AsyncIterator[None]:
        """Counts the caller as a user of the tenant's adapter for the length of the block. Raises SlotsBusy."""
        await self.acquire(adapter_id, tenant_id)
        try:
            yield
        finally:
            self.release(adapter_id)

    async def acquire(self, adapter_id: str, tenant_id: str) -> None:
        """Waits for a slot; each call needs one `release`. Raises SlotsBusy after the table's waiting time."""
        waiter = _Waiter(adapter_id, tenant_id, self._clock(), asyncio.get_running_loop().create_future())
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
            self._used_by[resident.tenant_id] -= 1
            if not self._used_by[resident.tenant_id]:
                del self._used_by[resident.tenant_id]
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
    def used(self) -> int:
        """Slots with users."""
        return len(self._in_use)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    def rows(self) -> list[Resident]:
        """Copies of the entries: those in use first, then idle ones, last used first."""
        idle = sorted(self._idle.values(), key=lambda resident: -resident.last_used)
        return [replace(one) for one in [*self._in_use.values(), *idle]]

    def _admit(self) -> None:
        # Whoever is admitted may have been the last for whose sake another tenant was held back.
        while self._admit_once():
            pass

    def _admit_once(self) -> bool:
        """Goes through the queue; whether somebody was admitted."""
        first_blocked: _Waiter | None = None
        kept: deque[_Waiter] = deque()
        admitted = False
        now = self._clock()
        queue = [waiter for waiter in self._queue if not waiter.admitted.cancelled()]
        without_slot = Counter(waiter.tenant_id for waiter in queue if waiter.adapter_id not in self._in_use)
        for waiter in queue:
            if waiter.adapter_id not in self._in_use and self._over_share(waiter.tenant_id, without_slot):
                kept.append(waiter)
                continue
            patient = first_blocked is None or now - first_blocked.since < self._patience_s
            fits = waiter.adapter_id in self._in_use if first_blocked else self._fits(waiter.adapter_id)
            if patient and fits:
                if waiter.adapter_id not in self._in_use:
                    without_slot[waiter.tenant_id] -= 1
                self._count(waiter)
                admitted = True
            else:
                first_blocked = first_blocked or waiter
                kept.append(waiter)
        self._queue = kept
        return admitted

    def _over_share(self, tenant_id: str, without_slot: Counter[str]) -> bool:
        """Whether the tenant has its share of the slots while one that has not yet waits."""
        if self._used_by[tenant_id] < self.tenant_slots:
            return False
        return any(count and self._used_by[other] < self.tenant_slots for other, count in without_slot.items())

    def _fits(self, adapter_id: str) -> bool:
        return adapter_id in self._in_use or len(self._in_use) < self.slots

    def _count(self, waiter: _Waiter) -> None:
        resident = self._in_use.get(waiter.adapter_id)
        if resident is None:
            resident = self._idle.pop(waiter.adapter_id, None) or Resident(waiter.adapter_id, waiter.tenant_id)
            self._in_use[waiter.adapter_id] = resident
            self._used_by[waiter.tenant_id] += 1
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
