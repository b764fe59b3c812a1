"""Who may enter the engine next: a weighted fair queue over tenants. Pure asyncio, without Ray, HTTP or vLLM.

At most `limit` sequences are in the engine at a time, so that its batch is full and its own queue, which knows no
tenants, stays short. What comes beyond that waits here.

Between tenants the order is that of start-time fair queueing with several requests in service, SFQ(D): a request gets
the start tag max(virtual time, its tenant's last finish tag), its finish tag is start + cost / weight, the smallest
start tag goes first, and virtual time is the start tag of the last request that went. While two tenants both wait,
what they were given, divided by their weights, differs by at most one request of each; nobody is charged for what it
used while nobody else waited. Sources: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queueing", SIGCOMM 1996;
W. Jin, J. S. Chase, J. Kaur, "Interposed Proportional Sharing for a Storage Service Utility", SIGMETRICS 2004.
Within a tenant the lowest priority number goes first, then the earliest.

A full queue takes from the tenant that holds most of it by weight ("longest queue drop", B. Suter et al., "Design
Considerations for Supporting TCP with Per-flow Queueing", INFOCOM 1998), so that nobody is refused a place because
of others who fill it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import operator
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["queue_full", "tenant_queue_full", "waited_too_long"]

RETRY_AFTER_MAX_S = 60
_BY_TAG = operator.attrgetter("start", "order")
_RATE_WINDOW = 64  # releases from which the service rate is estimated


class AdmissionRefused(Exception):
    """No place for a request. `retry_after_s`: whole seconds after which a new attempt makes sense."""

    def __init__(self, reason: Reason, retry_after_s: int) -> None:
        super().__init__(reason)
        self.reason: Reason = reason
        self.retry_after_s = retry_after_s


@dataclass(eq=False, slots=True)
class _Waiter:
    number: int  # order of arrival
    priority: int
    cost: int
    turn: asyncio.Future[None]  # cancelled as soon as its task is, which notices later
    queued: bool = False


@dataclass(eq=False, slots=True)
class _Tenant:
    """One tenant's waiters by priority and arrival, and its tags; `start` is the next waiter's start tag, and `order`
    decides between equal ones."""

    name: str
    weight: float
    start: float = 0.0
    order: int = 0
    finish: float = 0.0
    queued: int = 0
    waiting: dict[int, OrderedDict[int, _Waiter]] = field(default_factory=dict)

    def add(self, waiter: _Waiter) -> None:
        self.waiting.setdefault(waiter.priority, OrderedDict())[waiter.number] = waiter
        self.queued += 1
        waiter.queued = True

    def remove(self, waiter: _Waiter) -> None:
        queue = self.waiting[waiter.priority]
        del queue[waiter.number]
        if not queue:
            del self.waiting[waiter.priority]
        self.queued -= 1
        waiter.queued = False

    def first(self) -> _Waiter:
        return next(iter(self.waiting[min(self.waiting)].values()))

    def last(self) -> _Waiter:
        return next(reversed(self.waiting[max(self.waiting)].values()))


class Admission:
    """Places in the engine, shared fairly among tenants. For one event loop."""

    def __init__(
        self,
        limit: int,
        max_queued: int,
        per_tenant_max_queued: int,
        weights: Mapping[str, float],
        wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: sequences in the engine; `max_queued`, `per_tenant_max_queued`: waiting requests; `weights`: share
        by tenant, 1 for those not named; `wait_s`: after which a waiting request is refused."""
        self.limit = limit
        self.running = 0  # sequences
        self.queued = 0  # requests
        self._max_queued = max_queued
        self._per_tenant_max_queued = per_tenant_max_queued
        self._weights = weights
        self._wait_s = wait_s
        self._clock = clock
        self._numbers = itertools.count()
        self._virtual_time = 0.0
        self._tenants: dict[str, _Tenant] = {}
        self._backlogged: dict[str, _Tenant] = {}
        self._releases: deque[float] = deque(maxlen=_RATE_WINDOW)

    @asynccontextmanager
    async def slot(self, tenant: str, priority: int = 0, cost: int = 1) -> AsyncGenerator[float, None]:
        """Hold `cost` of the engine's places; gives the seconds waited for them. A lower `priority` is earlier.

        A cost beyond the limit counts as the limit. Raises AdmissionRefused. A cancelled waiter leaves the queue.
        """
        arrived = self._clock()
        waiter = _Waiter(
            next(self._numbers), priority, min(cost, self.limit), asyncio.get_running_loop().create_future()
        )
        self._join(tenant, waiter)
        if not waiter.turn.done():
            try:
                async with asyncio.timeout(self._wait_s):
                    await waiter.turn
            except TimeoutError:
                self._leave(tenant, waiter)
                raise AdmissionRefused("waited_too_long", self._retry_after(tenant)) from None
            except BaseException:
                self._leave(tenant, waiter)
                raise
        try:
            yield self._clock() - arrived
        finally:
            self._release(waiter.cost)

    def _join(self, name: str, waiter: _Waiter) -> None:
        tenant = self._tenant(name)
        if not tenant.queued:
            tenant.start = max(self._virtual_time, tenant.finish)
            tenant.order = waiter.number
        if not self._backlogged and self.running + waiter.cost <= self.limit:
            self._give(tenant, waiter)
            return
        if tenant.queued >= self._per_tenant_max_queued:
            raise AdmissionRefused("tenant_queue_full", self._retry_after(name))
        if self.queued >= self._max_queued:
            self._make_room(name)
        self._backlogged[name] = tenant
        tenant.add(waiter)
        self.queued += 1
        self._dispatch()

    def _make_room(self, name: str) -> None:
        """Refuse the last waiter of the longest queue by weight. Raises AdmissionRefused where that is `name`'s own."""
        lengths = {other: tenant.queued / tenant.weight for other, tenant in self._backlogged.items()}
        tenant = self._tenant(name)
        longest = max(lengths, key=lengths.__getitem__, default=name)
        if longest == name or lengths[longest] <= (tenant.queued + 1) / tenant.weight:
            raise AdmissionRefused("queue_full", self._retry_after(name))
        waiter = self._backlogged[longest].last()
        refusal = AdmissionRefused("queue_full", self._retry_after(longest))
        self._remove(longest, waiter)
        if not waiter.turn.done():
            waiter.turn.set_exception(refusal)

    def _dispatch(self) -> None:
        """Give turns as long as the next in line fits; nothing overtakes it, so that a large one is not starved."""
        while self._backlogged:
            tenant = min(self._backlogged.values(), key=_BY_TAG)
            waiter = tenant.first()
            if waiter.turn.done():  # cancelled
                self._remove(tenant.name, waiter)
                continue
            if self.running + waiter.cost > self.limit:
                return
            self._remove(tenant.name, waiter)
            self._give(tenant, waiter)

    def _give(self, tenant: _Tenant, waiter: _Waiter) -> None:
        self._virtual_time = tenant.start
        tenant.start = tenant.finish = tenant.start + waiter.cost / tenant.weight
        tenant.order = next(self._numbers)
        self.running += waiter.cost
        waiter.turn.set_result(None)

    def _leave(self, name: str, waiter: _Waiter) -> None:
        """A waiter gives up, which may be after it got its turn, or was refused, but before it noticed."""
        if waiter.queued:
            self._remove(name, waiter)
            self._dispatch()  # a smaller one may fit
        elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._release(waiter.cost)

    def _remove(self, name: str, waiter: _Waiter) -> None:
        tenant = self._backlogged[name]
        tenant.remove(waiter)
        self.queued -= 1
        if not tenant.queued:
            del self._backlogged[name]

    def _release(self, cost: int) -> None:
        self.running -= cost
        self._releases.append(self._clock())
        self._dispatch()
        if not self.running:  # then nobody waits either: a new busy period begins
            self._tenants.clear()
            self._virtual_time = 0.0

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, self._weights.get(name, 1.0))
        return tenant

    def _retry_after(self, name: str) -> int:
        """Seconds in which the tenant's present queue is served at its share of the recent rate of service."""
        if len(self._releases) < 2:
            return 1
        interval = (self._clock() - self._releases[0]) / len(self._releases)
        tenant = self._tenant(name)
        others = sum(other.weight for key, other in self._backlogged.items() if key != name)
        seconds = max(1, tenant.queued) * interval * (tenant.weight + others) / tenant.weight
        return min(max(1, math.ceil(seconds)), RETRY_AFTER_MAX_S)
