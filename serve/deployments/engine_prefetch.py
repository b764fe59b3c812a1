"""Brings adapters onto the node as soon as they are published, before anybody asks for them."""

from __future__ import annotations

import asyncio
import logging

from anyio import to_thread

from serve.deployments.engine_adapters import AdapterCache
from serve.deployments.engine_context import EngineRefusal
from serve.deployments.engine_loader import AdapterLoader
from serve.registry import Registry
from serve.registry.records import Adapter
from serve.residency import ResidencyTable

logger = logging.getLogger(__name__)

POLL_S = 1.0
AT_ONCE = 32  # published between two looks and still prefetched
PAUSE_S = 0.05


class Prefetcher:
    """Follows publications in the registry. A guess never takes a place from what was asked for: it fills free room in
    the node's cache and in vLLM's memory, and only while no request waits for a slot or a load."""

    def __init__(
        self, registry: Registry, cache: AdapterCache, loader: AdapterLoader, residency: ResidencyTable
    ) -> None:
        self._registry = registry
        self._cache = cache
        self._loader = loader
        self._residency = residency
        self._seen: set[str] | None = None  # None before the first look; what was there before is not new

    async def run(self) -> None:
        """Looks every `POLL_S` seconds until it is cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                # A hint only; a registry that fails now may answer again.
                logger.exception("cannot prefetch new adapters")
            await asyncio.sleep(POLL_S)

    async def look(self) -> list[str]:
        """Prefetches what was published since the last look; gives the IDs of what is on this node by now."""
        newest = await to_thread.run_sync(self._registry.newest_adapters, AT_ONCE)
        seen, self._seen = self._seen, {adapter.id for adapter in newest}
        fresh = [] if seen is None else [adapter for adapter in newest if adapter.id not in seen]
        return [adapter.id for adapter in fresh if await self._prefetch(adapter)]

    async def _prefetch(self, adapter: Adapter) -> bool:
        while self._loader.busy or self._residency.waiting:
            await asyncio.sleep(PAUSE_S)
        if self._loader.holds(adapter.id) or adapter.state != "ready" or not self._cache.fits(adapter.size_bytes):
            return False
        with self._residency.name(adapter.id):
            try:
                self._cache.check(adapter)
                local = await self._cache.prepare(adapter)
                free_slot = self._residency.used < self._residency.slots
                if self._loader.has_room and free_slot and not (self._loader.busy or self._residency.waiting):
                    await self._loader.load(local, "prefetch")
            except EngineRefusal as refusal:
                logger.info("adapter %s was not prefetched: %s", adapter.id, refusal.message)
                return False
        return True
