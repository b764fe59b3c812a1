"""Takes adapters into vLLM's memory, one at a time, and out of it when others need the room."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from serve.deployments.engine_context import EngineRefusal
from serve.deployments.engine_metrics import EngineMetrics
from serve.memory_tiers import HeldAdapter, MemoryTiers
from serve.residency import ResidencyTable

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

Purpose = Literal["request", "prefetch"]


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """A PEFT folder on this node, whose files are as they should be. ``id`` names these weights and no others."""

    id: str
    tenant_id: str
    folder: Path
    size_bytes: int


class LoraEngine(Protocol):
    """What of vLLM's `AsyncLLM` the loader needs."""

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter and gives it a slot; raises when that cannot be done."""
        ...

    async def remove_lora(self, lora_id: int) -> bool:
        """Drops an adapter; False when it is not there."""
        ...

    async def list_loras(self) -> set[int]:
        """The numbers of all that it holds."""
        ...


class LoraRuntime(Protocol):
    """What of `engine_vllm.VllmRuntime` the loader needs."""

    @property
    def engine(self) -> LoraEngine:
        """vLLM."""
        ...

    @property
    def dead(self) -> bool:
        """Whether vLLM's processes have ended."""
        ...

    def dead_refusal(self) -> EngineRefusal:
        """What a request is told then."""
        ...


class AdapterLoader:
    """The only one to add adapters to vLLM or remove them. For one event loop.

    Generating with an adapter that fails to load ends vLLM's engine, so each is loaded before its first use. vLLM
    would drop one by itself when given more than `max_cpu_loras`; so the one used longest ago goes before that, never
    one in use. Which adapters are there is therefore known here, and one that is costs no call to vLLM.
    """

    def __init__(
        self,
        runtime: LoraRuntime,
        tiers: MemoryTiers[LoRARequest],
        residency: ResidencyTable,
        metrics: EngineMetrics,
        on_drop: Callable[[str], None],
    ) -> None:
        """``on_drop`` is told the ID of each adapter that vLLM is about to lose."""
        self._runtime = runtime
        self._tiers = tiers
        self._residency = residency
        self._metrics = metrics
        self._on_drop = on_drop
        self._turn = asyncio.Lock()  # wakes those who wait in order
        self._loading: dict[str, asyncio.Task[LoRARequest]] = {}
        # vLLM uses the numbers up to max_loras itself while it warms up. No number is given twice.
        self._numbers = itertools.count(tiers.slots + 1)

    @property
    def busy(self) -> bool:
        """Whether an adapter is being loaded."""
        return bool(self._loading)

    @property
    def has_room(self) -> bool:
        """Whether vLLM can take another adapter in without losing one."""
        return len(self._tiers) + len(self._loading) < self._tiers.capacity

    def holds(self, adapter_id: str) -> bool:
        """Whether vLLM has the adapter or is loading it: its files must stay."""
        return adapter_id in self._tiers or adapter_id in self._loading

    def held(self, tenant_id: str, adapter_id: str) -> LoRARequest | None:
        """The tenant's adapter if vLLM has it."""
        held = self._tiers.get(adapter_id)
        return held.request if held is not None and held.tenant_id == tenant_id else None

    def hit(self, adapter_id: str) -> None:
        """Counts a request that found its adapter in vLLM's memory."""
        held, tier = self._tiers.get(adapter_id), self._tiers.tier(adapter_id)
        if held is not None and tier is not None:
            held.hits += 1
            self._metrics.hits.labels(tier).inc()
            self._tiers.touch(adapter_id)

    def used(self, adapter_id: str) -> None:
        """Notes the end of a request: up to now vLLM has run the adapter."""
        self._tiers.touch(adapter_id)

    async def load(self, local: LocalAdapter, purpose: Purpose = "request") -> LoRARequest:
        """Makes vLLM have the adapter. Whoever asks for one that is being loaded waits for the same load.

        The caller must count as its user, or none may need a place for it. Raises EngineRefusal 503 when vLLM cannot
        load it or has died.
        """
        lora = self.held(local.tenant_id, local.id)
        if lora is not None:
            return lora
        task = self._loading.get(local.id)
        if task is None:
            # A task of its own: it outlives the request that began it.
            task = asyncio.create_task(self._load(local, purpose))
            self._loading[local.id] = task
            task.add_done_callback(lambda done: self._loaded(local.id, done))
        return await asyncio.shield(task)

    async def drop(self, adapter_id: str) -> None:
        """Makes vLLM lose the adapter. Only for one without users."""
        held = self._tiers.remove(adapter_id)
        if held is not None:
            self._on_drop(adapter_id)
            await self._runtime.engine.remove_lora(held.request.lora_int_id)

    async def reconcile(self) -> None:
        """Compares with what vLLM really has, and mends the difference.

        There is one when an adapter was dropped while vLLM was still ending its last request: vLLM then read it from
        disk again.
        """
        async with self._turn:
            listed = set(await self._runtime.engine.list_loras())
            known = {held.request.lora_int_id: held.id for held in self._tiers.rows()}
            for number in listed - known.keys():
                await self._runtime.engine.remove_lora(number)
            for number in known.keys() - listed:
                logger.warning("vLLM has lost adapter %s", known[number])
                self._tiers.remove(known[number])
                self._on_drop(known[number])

    async def _load(self, local: LocalAdapter, purpose: Purpose) -> LoRARequest:
        with self._residency.name(local.id):
            async with self._turn:
                return await self._load_now(local, purpose)

    async def _load_now(self, local: LocalAdapter, purpose: Purpose) -> LoRARequest:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest(local.id, next(self._numbers), str(local.folder))
        try:
            await self._make_room(local.id)
            started = time.perf_counter()
            await self._runtime.engine.add_lora(lora)
        except EngineRefusal:
            raise
        except Exception as error:
            self._metrics.loads.labels(purpose, "failed").inc()
            if self._runtime.dead:
                raise self._runtime.dead_refusal() from error
            # vLLM may have it all the same, half copied into a slot.
            await self._runtime.engine.remove_lora(lora.lora_int_id)
            logger.exception("adapter %s cannot be loaded from %s", local.id, local.folder)
            raise unavailable(f"adapter {local.id} cannot be loaded") from error
        took = time.perf_counter() - started
        self._metrics.loads.labels(purpose, "loaded").inc()
        self._metrics.load_seconds.labels("load").observe(took)
        self._tiers.put(HeldAdapter(local.id, local.tenant_id, lora, local.size_bytes, took, time.time()))
        return lora

    async def _make_room(self, adapter_id: str) -> None:
        while self._tiers.full:
            victim = self._tiers.victim(lambda held: self._residency.users(held) > 0)
            if victim is None:
                # Users hold at most max_loras places, so whoever asked has gone meanwhile.
                raise unavailable(f"there is no room for adapter {adapter_id}")
            self._metrics.evictions.labels("cpu").inc()
            await self.drop(victim)

    def _loaded(self, adapter_id: str, task: asyncio.Task[LoRARequest]) -> None:
        del self._loading[adapter_id]
        if not task.cancelled():
            task.exception()  # seen, also when all who waited have gone


def unavailable(message: str) -> EngineRefusal:
    """The refusal for an adapter that exists but cannot be had now."""
    return EngineRefusal(503, message, "server_error", "adapter_unavailable")
