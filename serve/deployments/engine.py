"""The engine deployment: vLLM with LoRA slots, one adapter or none a request. Undecorated; `serve.app` makes it a
Ray deployment."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypernet.fingerprint import fingerprint_folder
from serve.blobs import BlobStore
from serve.cluster import check_registry_fits_cluster
from serve.config import ImprintConfig
from serve.deployments.engine_adapters import AdapterCache, LocalAdapter
from serve.deployments.engine_context import EngineContext, EngineRefusal
from serve.deployments.engine_stream import coalesce
from serve.registry import Registry
from serve.residency import ResidencyTable, SlotsBusy

if TYPE_CHECKING:
    from serve.deployments.engine_vllm import Kind, LoRARequest, VllmRuntime

__all__ = ["EngineContext", "EngineDeployment", "EngineRefusal"]

logger = logging.getLogger(__name__)

STREAM_WINDOW_S = 0.025
FOLLOW_S = 10.0  # between looks for adapters that were deleted or replaced
DROP_IDLE_S = 30.0  # vLLM may still be ending the last request for a while after its client has gone


class EngineDeployment:
    """Answers chat and completion requests. The constructor blocks until the engine runs."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        self._runtime: VllmRuntime | None = None
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        check_registry_fits_cluster(config.registry.url)
        # Loaded here, not on import: the process that only describes the deployment does not need vLLM.
        from serve.deployments.engine_vllm import VllmRuntime

        model = config.base_path()
        self.base_fingerprint = fingerprint_folder(_model_folder(model))
        self._registry = Registry.open(config.registry.url)
        self._cache = AdapterCache(
            self._registry,
            BlobStore.open(config.blobs.url),
            config.cache_dir / "adapters",
            self.base_fingerprint,
            config.engine.max_lora_rank,
        )
        self._residency = ResidencyTable(config.engine.max_loras)
        # vLLM uses the numbers up to max_loras itself while it warms up. A number is never given to a second adapter.
        self._numbers = itertools.count(config.engine.max_loras + 1)
        self._loras: dict[str, LoRARequest] = {}
        self._verified = False
        self._verifying = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._runtime = VllmRuntime(model, config.engine)

    async def chat(self, body: dict[str, Any], context: EngineContext) -> AsyncGenerator[Any, None]:
        """Runs an OpenAI chat completion.

        The first item is {"status", "stream", "headers"}. Then follows one OpenAI object (an answer or an error), or
        for a stream server-sent events as text, several joined where they come fast. Closing the generator aborts the
        request and gives its slot back.
        """
        async with aclosing(self._respond("chat", body, context)) as items:
            async for item in items:
                yield item

    async def completion(self, body: dict[str, Any], context: EngineContext) -> AsyncGenerator[Any, None]:
        """Runs an OpenAI text completion; items as for `chat`."""
        async with aclosing(self._respond("completion", body, context)) as items:
            async for item in items:
                yield item

    async def slots(self) -> dict[str, Any]:
        """Who uses which adapter: {"slots", "waiting", "adapters": [{adapter_id, users, uses, last_used_s, cached}]}.

        ``cached``: vLLM holds the weights in memory. ``last_used_s``: seconds since.
        """
        runtime = await self._ready()
        cached = set(await runtime.engine.list_loras())
        now = asyncio.get_running_loop().time()
        rows = []
        for row in self._residency.rows():
            lora = self._loras.get(row.adapter_id)
            rows.append(
                {
                    "adapter_id": row.adapter_id,
                    "users": row.users,
                    "uses": row.uses,
                    "last_used_s": round(max(0.0, now - row.last_used), 3),
                    "cached": lora is not None and lora.lora_int_id in cached,
                }
            )
        return {"slots": self._residency.slots, "waiting": self._residency.waiting, "adapters": rows}

    async def drop_unneeded(self) -> list[str]:
        """Forgets adapters that were deleted or replaced and that no request has needed for a while; gives their IDs.

        A replaced adapter can still be pinned; then it is fetched and loaded again.
        """
        unneeded = await self._cache.unneeded(self._loras)
        return [adapter_id for adapter_id in unneeded if await self.forget(adapter_id, DROP_IDLE_S)]

    async def forget(self, adapter_id: str, idle_s: float = 0.0) -> bool:
        """Drops an adapter from vLLM's memory and this node's disk. False while a request needs it, or when one did
        within the last ``idle_s`` seconds."""
        runtime = await self._ready()
        # Up to the rename in `discard` nothing may await: a request that begins then finds no trace of the adapter.
        idle = self._residency.idle_s(adapter_id)
        if idle is None or idle < idle_s:
            return False
        runtime.models.lora_requests.pop(adapter_id, None)
        lora = self._loras.pop(adapter_id, None)
        self._residency.forget(adapter_id)
        await self._cache.discard(adapter_id)
        if lora is not None:
            await runtime.engine.remove_lora(lora.lora_int_id)
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

    async def metrics(self) -> str:
        """vLLM's metrics in Prometheus text format."""
        return (await self._ready()).metrics()

    async def shutdown(self) -> None:
        """Ends the engine's processes. May be called twice."""
        runtime, self._runtime = self._runtime, None
        if self._follower is not None:
            self._follower.cancel()
        if runtime is not None:
            await asyncio.to_thread(runtime.shutdown)
            self._cache.close()
            self._registry.close()

    def __del__(self) -> None:
        # Ray calls this when it stops a replica; vLLM's processes would outlive it.
        if self._runtime is not None:
            self._runtime.shutdown()
            self._runtime = None

    async def _respond(self, kind: Kind, body: dict[str, Any], context: EngineContext) -> AsyncGenerator[Any, None]:
        headers = {"x-request-id": context.request_id}
        try:
            async with AsyncExitStack() as stack:
                runtime = await self._ready()
                lora = None
                if context.adapter_id is not None:
                    stack.enter_context(self._residency.name(context.adapter_id))
                    local = await self._cache.get(context.tenant_id, context.adapter_id)
                    await stack.enter_async_context(self._residency.hold(context.adapter_id))
                    lora = await self._load(runtime, local)
                result = await runtime.create(kind, body, context, lora)
                yield {"status": 200, "stream": not isinstance(result, dict), "headers": headers}
                if isinstance(result, dict):
                    yield result
                    return
                pieces = coalesce(result, STREAM_WINDOW_S)
                stack.push_async_callback(pieces.aclose)
                async for piece in pieces:
                    yield piece
        except SlotsBusy as error:
            refusal = EngineRefusal(503, str(error), "server_error", "slots_busy")
            yield {"status": 503, "stream": False, "headers": {**headers, "retry-after": "1"}}
            yield refusal.body()
        except EngineRefusal as refusal:
            yield {"status": refusal.status, "stream": False, "headers": headers}
            yield refusal.body()

    async def _load(self, runtime: VllmRuntime, local: LocalAdapter) -> LoRARequest:
        """Makes vLLM hold the adapter. Before every use: generating with one that fails to load ends the engine."""
        from vllm.lora.request import LoRARequest

        adapter_id = local.adapter.id
        lora = self._loras.get(adapter_id)
        if lora is None:
            lora = LoRARequest(adapter_id, next(self._numbers), str(local.folder))
            self._loras[adapter_id] = lora
        try:
            await runtime.engine.add_lora(lora)
        except Exception as error:
            await runtime.engine.check_health()
            logger.exception("adapter %s cannot be loaded from %s", adapter_id, local.folder)
            message = f"adapter {adapter_id} cannot be loaded"
            raise EngineRefusal(503, message, "server_error", "adapter_unavailable") from error
        return lora

    async def _ready(self) -> VllmRuntime:
        """The running engine, checked once for the LoRA plugin."""
        if self._runtime is None:
            raise EngineRefusal(503, "the engine is shutting down", "server_error")
        if not self._verified:
            async with self._verifying:
                if not self._verified:
                    await self._runtime.verify()
                    self._verified = True
                    # Not in the constructor, which need not run on the event loop.
                    self._follower = asyncio.create_task(self._follow())
        return self._runtime

    async def _follow(self) -> None:
        """Frees what adapters take that nobody needs any more, as long as the engine runs."""
        while self._runtime is not None:
            try:
                dropped = await self.drop_unneeded()
                if dropped:
                    logger.info("dropped adapters that were deleted or replaced: %s", ", ".join(dropped))
            except Exception:
                # A registry that fails now may answer again.
                logger.exception("cannot look for adapters that were deleted or replaced")
            await asyncio.sleep(FOLLOW_S)


def _model_folder(model: str) -> Path:
    """The folder of a model given as a folder or as a Hugging Face name (which is fetched if need be)."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))
