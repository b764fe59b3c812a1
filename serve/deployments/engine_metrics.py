"""Prometheus metrics of one engine replica's adapters; vLLM's own are beside them on the same page."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class EngineMetrics:
    """Where adapters are (tiers: `slot`, `cpu`, `disk`, and `blobs` beyond this node), and what moving them costs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.hits = Counter(
            "imprint_adapter_hits_total",
            "Requests with an adapter, by the tier that it was found in.",
            ("tier",),
            registry=self.registry,
        )
        self.loads = Counter(
            "imprint_adapter_loads_total",
            "Adapters taken into vLLM's memory, by what for (request or prefetch) and outcome (loaded or failed).",
            ("reason", "outcome"),
            registry=self.registry,
        )
        self.load_seconds = Histogram(
            "imprint_adapter_load_duration_seconds",
            "Time of each step of bringing an adapter in: fetch from the blob store, verify the files, compose "
            "several, load into vLLM.",
            ("step",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.evictions = Counter(
            "imprint_adapter_evictions_total",
            "Adapters that made room for others, by the tier that they left.",
            ("tier",),
            registry=self.registry,
        )
        self.residents = Gauge(
            "imprint_adapters_resident",
            "Adapters in each tier now, counted in the highest one that they are in.",
            ("tier",),
            registry=self.registry,
        )
        self.cache_bytes = Gauge(
            "imprint_adapter_cache_bytes", "Size of this node's cache of adapter files.", registry=self.registry
        )
        self.waiting = Gauge(
            "imprint_adapter_requests_waiting", "Requests that wait for a slot now.", registry=self.registry
        )
        self.damaged = Counter(
            "imprint_adapter_damaged_total",
            "Adapters whose files were damaged or lost, by where: disk (fetched again) or blobs (generated again).",
            ("tier",),
            registry=self.registry,
        )
        self.unavailable = Counter(
            "imprint_adapter_unavailable_total",
            "Requests whose adapter could not be had, by who answered: the base, or nobody (refused).",
            ("answer",),
            registry=self.registry,
        )

    def text(self) -> str:
        """These metrics as Prometheus text."""
        return generate_latest(self.registry).decode()

    def eviction_counts(self) -> dict[str, int]:
        """Evictions since the start, by tier."""
        name, sample = "imprint_adapter_evictions_total", self.registry.get_sample_value
        return {tier: int(sample(name, {"tier": tier}) or 0) for tier in ("slot", "cpu", "disk")}
