"""What an engine replica says about its adapters: `GET /v1/slots`, and the gauges in its metrics."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from serve.deployments.engine_adapters import AdapterCache
from serve.deployments.engine_metrics import EngineMetrics
from serve.memory_tiers import MemoryTiers
from serve.residency import ResidencyTable, Resident

MAX_ON_DISK = 1000  # of those that are on disk only, the last used are listed


class EngineView:
    """Reads the tables of one engine replica."""

    def __init__(
        self, tiers: MemoryTiers[Any], cache: AdapterCache, residency: ResidencyTable, metrics: EngineMetrics
    ) -> None:
        self._tiers = tiers
        self._cache = cache
        self._residency = residency
        self._metrics = metrics

    def report(self) -> dict[str, Any]:
        """The object of `serve.api.slots.EngineSlots`. Adapters are in order of tier, in each last used first."""
        used = {row.adapter_id: row for row in self._residency.rows()}
        adapters = [
            self._row(
                held.id, self._tiers.tier(held.id), used.get(held.id), held.size_bytes,
                since=held.since, hits=held.hits, load_ms=round(1000 * held.load_s, 3),
            )
            for held in self._tiers.rows()
        ]  # fmt: skip
        adapters.sort(key=lambda row: row["tier"] != "slot")
        on_disk = [item for item in self._cache.sizes().items() if item[0] not in self._tiers]
        adapters += [self._row(name, "disk", used.get(name), size) for name, size in on_disk[:MAX_ON_DISK]]
        return {
            "replica": f"{socket.gethostname()}:{os.getpid()}",
            "slots": self._tiers.slots,
            "max_cpu_loras": self._tiers.capacity,
            "in_slots": self._tiers.in_slot,
            "in_cpu": len(self._tiers),
            "on_disk": len(self._cache),
            "cache_bytes": self._cache.size_bytes,
            "waiting": self._residency.waiting,
            "evictions": self._metrics.eviction_counts(),
            "adapters": adapters,
        }

    def metrics_text(self) -> str:
        """The replica's own metrics with gauges of this moment."""
        residents = self._metrics.residents
        residents.labels("slot").set(self._tiers.in_slot)
        residents.labels("cpu").set(len(self._tiers) - self._tiers.in_slot)
        residents.labels("disk").set(sum(name not in self._tiers for name in self._cache.sizes()))
        self._metrics.cache_bytes.set(self._cache.size_bytes)
        self._metrics.waiting.set(self._residency.waiting)
        return self._metrics.text()

    def _row(
        self, adapter_id: str, tier: str | None, used: Resident | None, size_bytes: int, **of_memory: Any
    ) -> dict[str, Any]:
        return {
            "adapter_id": adapter_id,
            "tier": tier,
            "users": used.users if used else 0,
            "uses": used.uses if used else 0,
            "last_used": None if used is None else round(time.time() - (time.monotonic() - used.last_used), 3),
            "bytes": size_bytes,
            "since": None,
            "hits": 0,
            "load_ms": None,
            **of_memory,
        }
