"""The engine deployment: vLLM with LoRA slots, one adapter or none a request. Undecorated; `serve.app` makes it a
Ray deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

from hypernet.fingerprint import fingerprint_folder
from serve.autoscaling import SLOT_DEMAND
from serve.blobs import BlobStore
from serve.cluster import check_registry_fits_cluster
from serve.config import ImprintConfig
from serve.deployments.engine_adapters import AdapterCache
from serve.deployments.engine_compositions import Compositions, folder_for_compositions
from serve.deployments.engine_context import COMPOSITION, ENGINE_DEAD, EngineContext, EngineRefusal
from serve.deployments.engine_loader import AdapterLoader, LocalAdapter
from serve.deployments.engine_metrics import EngineMetrics
from serve.deployments.engine_prefetch import Prefetcher
from serve.deployments.engine_slots import EngineView
from serve.deployments.engine_stream import Pace, coalesce
from serve.deployments.engine_watch import end_with_engine
from serve.deployments.heap import tend_heap
from serve.memory_tiers import MemoryTiers
from serve.metrics import merge_texts
from serve.registry import Registry
from serve.residency import ResidencyTable, SlotsBusy

if TYPE_CHECKING:
    from serve.deployments.engine_vllm import Kind, LoRARequest, VllmRuntime

__all__ = ["EngineContext", "EngineDeployment", "EngineRefusal"]

logger = logging.getLogger(__name__)

FOLLOW_S = 10.0  # between looks for adapters that were deleted or replaced
DROP_IDLE_S = 30.0  # vLLM may still be ending the last request for a while after its client has gone
EVICT_IDLE_S = 5.0  # the same where others need the room
# Refusals for want of an adapter, which the base may make up for.
_MISSING = ("model_not_found", "adapter_mismatch", "adapter_unavailable")


class EngineDeployment:
    """Answers chat and completion requests. The constructor blocks until the engine runs."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        self._runtime: VllmRuntime | None = None
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        check_registry_fits_cluster(config.registry.url)
        # Loaded here, not on import: the process that only describes the deployment does not need vLLM.
        from serve.deployments.engine_vllm import VllmRuntime

        model = config.base_path()
        self.base_fingerprint = fingerprint_folder(config.base_folder())
        self._registry = Registry.open(config.registry.url)
        engine = config.engine
        self._metrics = EngineMetrics()
        self._residency = ResidencyTable(engine.max_loras, tenant_share=engine.tenant_slot_share)
        self._cache = AdapterCache(
            self._registry,
            BlobStore.open(config.blobs.url),
            config.cache_dir / "adapters",
            self.base_fingerprint,
            engine.max_lora_rank,
            engine.cache_bytes,
            self._may_leave_disk,
            self._metrics,
        )
        self._compositions = Compositions(
            self._registry,
            self._cache,
            self._residency,
            self.forget,
            folder_for_compositions(config.cache_dir),
            engine.max_lora_rank,
            engine.composition_bytes,
            self._metrics,
        )
        self._tiers: MemoryTiers[LoRARequest] = MemoryTiers(
            engine.max_loras, engine.max_cpu_loras, self._metrics.evictions.labels("slot").inc
        )
        self._view = EngineView(self._tiers, self._cache, self._residency, self._metrics)
        self._pace = Pace()
        self._verified = False
        self._verifying = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._prefetching: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._runtime = VllmRuntime(model, config.engine)
        self._loader = AdapterLoader(self._runtime, self._tiers, self._residency, self._metrics, self._on_drop)
        self._prefetcher = Prefetcher(self._registry, self._cache, self._loader, self._residency)
        tend_heap()

    async def generate(
        self, kind: Kind, body: dict[str, Any], context: EngineContext
    ) -> AsyncGenerator[tuple[Any, Any] | Any, None]:
        """The items of `respond` as they travel between processes: the first two as a pair, then the others. Each
        message costs both sides, and most requests need only the pair."""
        async with aclosing(self.respond(kind, body, context)) as items:
            head = await anext(items)
            yield head, await anext(items, None)
            async for item in items:
                yield item

    async def slots(self) -> dict[str, Any]:
        """Which adapters are where and who uses them; see `serve.api.slots.EngineSlots`."""
        return self._view.report()

    async def drop_unneeded(self) -> list[str]:
        """Forgets adapters that were deleted or replaced and that no request has needed for a while; gives their IDs.

        A replaced adapter can still be pinned; then it is fetched and loaded again.
        """
        held = (held.id for held in self._tiers.rows())
        unneeded = await self._cache.unneeded(name for name in held if not name.startswith(COMPOSITION))
        dropped = [adapter_id for adapter_id in unneeded if await self.forget(adapter_id, DROP_IDLE_S)]
        return dropped + await self._compositions.drop_unneeded(DROP_IDLE_S)

    async def forget(self, adapter_id: str, idle_s: float = 0.0) -> bool:
        """Drops an adapter from vLLM's memory and this node's disk. False while a request needs it, or when one did
        within the last ``idle_s`` seconds."""
        idle = self._residency.idle_s(adapter_id)
        if idle is None or idle < idle_s:
            return False
        self._residency.forget(adapter_id)
        await self._loader.drop(adapter_id)
        if self._residency.idle_s(adapter_id) is None:  # a request came meanwhile; it loads the adapter anew
            return False
        await self._cache.discard(adapter_id)
        return True

    async def health(self) -> dict[str, Any]:
        """{"status": "ok", "unfinished", "waiting", "base_fingerprint"}. Raises when the engine is dead."""
        runtime = await self._ready()
        await runtime.engine.check_health()
        return {
            "status": "ok",
            "unfinished": runtime.engine.get_num_unfinished_requests(),
            "waiting": self._residency.waiting,
            "base_fingerprint": self.base_fingerprint,
        }

    async def check_health(self) -> None:
        """Ray's question: raises when this replica has to be replaced."""
        await self.health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `serve.autoscaling`: how many times this replica's slots would hold the adapters in use and those that
        requests wait for."""
        in_use = sum(row.users > 0 for row in self._residency.rows())
        return {SLOT_DEMAND: (in_use + self._residency.waiting) / self._residency.slots}

    async def metrics(self) -> str:
        """vLLM's metrics and this replica's own, in Prometheus text format."""
        return merge_texts((await self._ready()).metrics(), self._view.metrics_text())

    async def shutdown(self) -> None:
        """Ends the engine's processes. May be called twice."""
        runtime, self._runtime = self._runtime, None
        for task in (self._follower, self._prefetching):
            if task is not None:
                task.cancel()
        if runtime is not None:
            await asyncio.to_thread(runtime.shutdown)
            self._compositions.close()
            self._cache.close()
            self._registry.close()

    def __del__(self) -> None:
        # Ray calls this when it stops a replica; vLLM's processes would outlive it.
        if self._runtime is not None:
            self._runtime.shutdown()
            self._runtime = None

    async def respond(self, kind: Kind, body: dict[str, Any], context: EngineContext) -> AsyncGenerator[Any, None]:
        """Runs a chat completion, a text completion or a request of OpenAI's Responses API (without its store).

        The first item is {"status", "stream", "headers"}, with "unavailable" true where the base answers because the
        adapter cannot be had. Then follows one OpenAI object (an answer or an error), or for a stream server-sent
        events as text, several joined where they come fast; where the engine dies, an error object ends it. Closing
        the generator aborts the request and gives its slot back.
        """
        headers = {"x-request-id": context.request_id}
        begun = False
        try:
            async with AsyncExitStack() as stack:
                runtime = await self._ready()
                lora = await self._attach_or_base(stack, context)
                result = await runtime.create(kind, body, context, lora)
                unavailable = context.adapter_id is not None and lora is None
                stream = not isinstance(result, dict)
                yield {"status": 200, "stream": stream, "headers": headers, "unavailable": unavailable}
                if isinstance(result, dict):
                    yield result
                    return
                begun = True
                pieces = coalesce(result, self._pace, context.sequences)
                stack.push_async_callback(pieces.aclose)
                async for piece in pieces:
                    if runtime.dead and 'data: {"error"' in piece:
                        raise runtime.dead_refusal()
                    yield piece
        except SlotsBusy as error:
            refusal = EngineRefusal(503, str(error), "server_error", "slots_busy")
            yield {"status": 503, "stream": False, "headers": {**headers, "retry-after": "1"}}
            yield refusal.body()
        except EngineRefusal as refusal:
            if not begun:
                yield {"status": refusal.status, "stream": False, "headers": headers}
            yield refusal.body()

    async def _attach_or_base(self, stack: AsyncExitStack, context: EngineContext) -> LoRARequest | None:
        """As `_attach`; None, for the base, also where the adapter cannot be had and the context allows it."""
        if context.adapter_id is None:
            return None
        try:
            async with AsyncExitStack() as attached:
                lora = await self._attach(attached, context, context.adapter_id)
                stack.push_async_exit(attached.pop_all())
                return lora
        except EngineRefusal as refusal:
            if refusal.code not in _MISSING:
                raise
            by_base = context.on_missing_adapter == "base"
            self._metrics.unavailable.labels("base" if by_base else "refused").inc()
            if not by_base:
                raise
            logger.warning("request %s is answered by the base: %s", context.request_id, refusal.message)
            return None

    async def _attach(self, stack: AsyncExitStack, context: EngineContext, adapter_id: str) -> LoRARequest:
        """Makes the request a user of the adapter in vLLM until ``stack`` is left.

        An adapter that vLLM holds costs no call to it or to the registry. Raises EngineRefusal, SlotsBusy.
        """
        stack.enter_context(self._residency.name(adapter_id))
        held = self._loader.held(context.tenant_id, adapter_id)
        # Fetched before the slot is taken, which others could use meanwhile.
        local = None if held else await self._files(context, adapter_id)
        await stack.enter_async_context(self._residency.hold(adapter_id, context.tenant_id))
        stack.callback(self._loader.used, adapter_id)
        lora = self._loader.held(context.tenant_id, adapter_id)
        if lora is None:
            return await self._loader.load(local or await self._files(context, adapter_id))
        if local is None:  # else it was found elsewhere, and loaded for another request meanwhile
            self._loader.hit(adapter_id)
        return lora

    async def _files(self, context: EngineContext, adapter_id: str) -> LocalAdapter:
        """The tenant's adapter, or composition of adapters, as a folder on this node. Raises EngineRefusal."""
        if context.members:
            return await self._compositions.get(context.tenant_id, context.members)
        return await self._cache.get(context.tenant_id, adapter_id)

    def _may_leave_disk(self, adapter_id: str) -> bool:
        idle = self._residency.idle_s(adapter_id)
        return idle is not None and idle >= EVICT_IDLE_S and not self._loader.holds(adapter_id)

    def _on_drop(self, adapter_id: str) -> None:
        self._cache.touch(adapter_id)
        if self._runtime is not None:
            self._runtime.models.lora_requests.pop(adapter_id, None)

    async def _ready(self) -> VllmRuntime:
        """The running engine, checked once for the LoRA plugin."""
        if self._runtime is None:
            raise EngineRefusal(503, "the engine is shutting down", "server_error", ENGINE_DEAD)
        runtime = self._runtime
        if not self._verified:
            async with self._verifying:
                if not self._verified:
                    await runtime.verify()
                    self._verified = True
                    # Not in the constructor, which need not run on the event loop.
                    self._follower = asyncio.create_task(self._follow())
                    self._prefetching = asyncio.create_task(self._prefetcher.run())
                    self._watcher = asyncio.create_task(
                        end_with_engine(lambda: runtime.dead, lambda: self._runtime is None)
                    )
        return runtime

    async def _follow(self) -> None:
        """Frees what adapters take that nobody needs any more, as long as the engine runs."""
        while self._runtime is not None:
            try:
                dropped = await self.drop_unneeded()
                if dropped:
                    logger.info("dropped adapters that were deleted or replaced: %s", ", ".join(dropped))
                await self._cache.shrink()
                await self._compositions.shrink()
                await self._loader.reconcile()
            except Exception:
                # A registry that fails now may answer again.
                logger.exception("cannot look for adapters that were deleted or replaced")
            await asyncio.sleep(FOLLOW_S)
