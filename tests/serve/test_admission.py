"""The fair queue before the engine: shares, weights, priorities, refusals, cancellation; and no place is ever lost."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.admission import RETRY_AFTER_MAX_S, Admission, AdmissionRefused

TENANTS = ("a", "b", "c")


@dataclass
class Desk:
    """Requests as tasks that hold their places until told to finish; notes the order in which they got them."""

    admission: Admission
    served: list[tuple[str, int, int]] = field(default_factory=list)  # tenant, label, cost
    running: list[tuple[asyncio.Task[None], asyncio.Event]] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def arrive(self, tenant: str, label: int = 0, priority: int = 0, cost: int = 1) -> asyncio.Task[None]:
        async def request() -> None:
            async with self.admission.slot(tenant, priority, cost):
                done = asyncio.Event()
                entry = (task, done)
                self.served.append((tenant, label, cost))
                self.running.append(entry)
                try:
                    await done.wait()
                finally:
                    self.running.remove(entry)

        task = asyncio.get_running_loop().create_task(request())
        self.tasks.append(task)
        return task

    async def finish_one(self) -> None:
        self.running[0][1].set()
        await settle()

    async def drain(self) -> None:
        """Serve everybody to the end, one at a time."""
        await settle()
        while self.running:
            await self.finish_one()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(8):
        await asyncio.sleep(0)


def admission(limit: int = 1, **changes: Any) -> Admission:
    options = {"max_queued": 10_000, "per_tenant_max_queued": 10_000, "weights": {}, "wait_s": 60.0, **changes}
    return Admission(limit, **options)


async def test_a_thousand_queued_requests_delay_another_tenant_by_its_share_only() -> None:
    desk = Desk(admission(limit=4))
    for label in range(1000):
        desk.arrive("greedy", label)
    await settle()
    for label in range(10):
        desk.arrive("small", label)
    await settle()
    before = len(desk.served)
    for _ in range(24):
        await desk.finish_one()
    since = Counter(tenant for tenant, *_ in desk.served[before:])
    assert since["small"] == 10 and since["greedy"] == 14
    # Its first request was the next but one at the latest.
    assert "small" in {tenant for tenant, *_ in desk.served[before : before + 2]}
    await desk.drain()
    assert len(desk.served) == 1010 and desk.admission.running == desk.admission.queued == 0


@settings(max_examples=60, deadline=None)
@given(
    weights=st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for name in TENANTS}),
    costs=st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 4)), min_size=30, max_size=90),
    limit=st.integers(4, 8),
)
def test_service_follows_the_weights(weights: dict[str, float], costs: list[tuple[str, int]], limit: int) -> None:
    """The bound of start-time fair queueing: while two tenants both wait, what they get by weight differs by at most
    their largest requests by weight."""

    async def scenario() -> None:
        desk = Desk(admission(limit, weights=weights))
        blocker = desk.arrive("blocker", cost=limit)
        await settle()
        for label, (tenant, cost) in enumerate(costs):
            desk.arrive(tenant, label, cost=cost)
        await settle()
        blocker.cancel()
        await desk.drain()
        served = desk.served[1:]
        assert len(served) == len(costs)
        left = Counter(tenant for tenant, _ in costs)
        work = dict.fromkeys(TENANTS, 0.0)
        for tenant, _, cost in served:
            work[tenant] += cost / weights[tenant]
            for one, other in itertools.combinations(TENANTS, 2):
                if left[one] and left[other]:
                    assert abs(work[one] - work[other]) <= 4 / weights[one] + 4 / weights[other] + 1e-9
            left[tenant] -= 1

    asyncio.run(scenario())


async def test_past_use_without_competition_is_not_charged() -> None:
    desk = Desk(admission())
    for label in range(50):
        desk.arrive("early", label)
    await settle()
    for _ in range(40):
        await desk.finish_one()
    for label in range(5):
        desk.arrive("late", label)
    await desk.drain()
    assert [tenant for tenant, *_ in desk.served[41:49]].count("early") == 4


async def test_priority_then_arrival_within_a_tenant_only() -> None:
    desk = Desk(admission())
    desk.arrive("x")
    await settle()
    for label, priority in enumerate([1, 0, 1, -1, 0]):
        desk.arrive("a", label, priority)
    for label in range(5):
        desk.arrive("b", label, priority=1)
    await desk.drain()
    assert [label for tenant, label, _ in desk.served if tenant == "a"] == [3, 1, 4, 0, 2]
    # A tenant's priorities order its own requests; they take nothing from others.
    assert [tenant for tenant, *_ in desk.served[1:]] == ["a", "b"] * 5


async def test_a_large_request_is_not_overtaken_by_small_ones_for_ever() -> None:
    desk = Desk(admission(limit=4))
    for label in range(4):
        desk.arrive("small", label)
    await settle()
    desk.arrive("large", cost=99)  # counts as 4
    for label in range(20):
        desk.arrive("small", label)
    await desk.drain()
    place = [tenant for tenant, *_ in desk.served].index("large")
    assert place <= 9 and len(desk.served) == 25


async def test_full_queues_refuse_and_say_when_to_come_back() -> None:
    now = 0.0
    desk = Desk(admission(max_queued=6, per_tenant_max_queued=4, clock=lambda: now))
    for label in range(12):  # two seconds for each
        desk.arrive("a", label)
        await settle()
        now += 2
        await desk.finish_one()
    for label in range(5):
        desk.arrive("a", label)
    await settle()
    with pytest.raises(AdmissionRefused) as refused:
        await desk.arrive("a")
    assert refused.value.reason == "tenant_queue_full"
    assert 6 <= refused.value.retry_after_s <= 10  # four wait
    for label in range(2):
        desk.arrive("b", label)
    await settle()
    assert desk.admission.queued == 6
    # Full: a tenant with little in the queue takes the place of the last of the longest queue.
    last_of_a = desk.tasks[16]
    newcomer = desk.arrive("c")
    with pytest.raises(AdmissionRefused) as pushed_out:
        await last_of_a
    assert pushed_out.value.reason == "queue_full"
    assert desk.admission.queued == 6 and not newcomer.done()
    # Where no queue is longer than its own would be, it is refused itself.
    for tenant in ("b", "c"):
        desk.arrive(tenant)
        await settle()
    with pytest.raises(AdmissionRefused) as refused:
        await desk.arrive("b")
    assert refused.value.reason == "queue_full"
    assert 1 <= refused.value.retry_after_s <= RETRY_AFTER_MAX_S
    await desk.drain()
    assert newcomer.exception() is None and desk.admission.running == desk.admission.queued == 0


async def test_waiting_ends() -> None:
    desk = Desk(admission(wait_s=0.02))
    desk.arrive("a")
    await settle()
    with pytest.raises(AdmissionRefused) as refused:
        await desk.arrive("a")
    assert refused.value.reason == "waited_too_long" and desk.admission.queued == 0
    await desk.drain()


async def test_a_turn_given_to_a_request_that_is_being_cancelled_goes_on() -> None:
    desk = Desk(admission())
    desk.arrive("a")
    await settle()
    second, third = desk.arrive("a", 1), desk.arrive("a", 2)
    await settle()
    # Both in one step of the loop: the turn is given, then the task is cancelled; and the other way round.
    desk.running[0][1].set()
    await asyncio.sleep(0)
    second.cancel()
    await settle()
    assert [label for _, label, _ in desk.served] in ([0, 2], [0, 1, 2])
    fourth, fifth = desk.arrive("a", 4), desk.arrive("a", 5)
    await settle()
    fourth.cancel()
    desk.running[0][1].set()
    await settle()
    assert desk.served[-1][1] == 5 and fourth.cancelled() and third.done()
    await desk.drain()
    assert fifth.exception() is None and desk.admission.running == desk.admission.queued == 0


class AdmissionMachine(RuleBasedStateMachine):
    """Random arrivals, ends and cancellations, several between two steps of the event loop."""

    LIMIT, QUEUED, PER_TENANT = 5, 8, 5

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.desk = Desk(admission(self.LIMIT, max_queued=self.QUEUED, per_tenant_max_queued=self.PER_TENANT))
        self.costs: dict[asyncio.Task[None], int] = {}

    def do(self, act: Callable[[], Any]) -> None:
        async def step() -> None:
            act()

        self.run(step())

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(coroutine)

    @rule(tenant=st.sampled_from(TENANTS), priority=st.integers(-1, 1), cost=st.integers(1, 6))
    def arrive(self, tenant: str, priority: int, cost: int) -> None:
        def act() -> None:
            self.costs[self.desk.arrive(tenant, 0, priority, cost)] = min(cost, self.LIMIT)

        self.do(act)

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        if self.desk.tasks:
            self.do(self.desk.tasks[which % len(self.desk.tasks)].cancel)

    @precondition(lambda self: self.desk.running)
    @rule(which=st.integers(0, 30))
    def finish(self, which: int) -> None:
        self.do(self.desk.running[which % len(self.desk.running)][1].set)

    @rule()
    def settle(self) -> None:
        self.run(settle())
        admission = self.desk.admission
        held = sum(self.costs[task] for task, _ in self.desk.running)
        waiting = [task for task in self.desk.tasks if not task.done() and task not in dict(self.desk.running)]
        assert admission.running == held
        assert admission.queued == len(waiting)
        # Nobody waits although everybody who waits would fit.
        if waiting:
            assert held + max(self.costs[task] for task in waiting) > self.LIMIT

    @invariant()
    def within_bounds(self) -> None:
        assert 0 <= self.desk.admission.running <= self.LIMIT
        assert 0 <= self.desk.admission.queued <= self.QUEUED

    def teardown(self) -> None:
        self.run(self.desk.drain())
        for task in self.desk.tasks:
            assert task.cancelled() or isinstance(task.exception(), AdmissionRefused | None)
        assert self.desk.admission.running == self.desk.admission.queued == 0
        self.loop.close()


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
