"""Table 3: how throughput holds with ever more registered adapters (`measure`, `report`).

All counts share one registry; smaller ones draw from its beginning. Traffic names adapters, with Zipf's law (s = 1)
over those of its count. The server starts once for each number of slots. The measure of a count is its throughput
beside that of `BASELINE` adapters on the same server, which is taken before and after all the others. A run begins
with a warm-up in which the memory tiers fill.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import machine
from benchmarks.serving.client import ChatRequest, closed_loop, errors_cell, percentiles_ms, session, summary
from benchmarks.serving.registered import Registered, RegisteredAdapter, register
from tests.server import Server

BASELINE = 5
COUNTS, SLOTS = (10, 100, 1_000, 10_000), (4, 16, 64)
CONCURRENCY, MAX_TOKENS = 32, 32
CPU_LORAS = 256
TENANTS = 100
TIERS = ("slot", "cpu", "disk", "blobs")
GOAL_COUNT, GOAL = 1_000, 0.9

Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by the sample's name and labels."""


async def measure(
    folder: Path,
    counts: Sequence[int] = COUNTS,
    slots: Sequence[int] = SLOTS,
    seconds: float = 60.0,
    warm_up_s: float = 20.0,
    concurrency: int = CONCURRENCY,
    max_tokens: int = MAX_TOKENS,
    cpu_loras: int = CPU_LORAS,
    seed: int = 11,
) -> dict[str, Any]:
    """Rows for each number of slots and adapters. Starts servers of its own in `folder`."""
    registered = register(folder / "data", max(BASELINE, *counts), TENANTS)
    rows = []
    for number in slots:
        server = Server(folder)
        server.start(ENGINE__MAX_LORAS=str(number), ENGINE__MAX_CPU_LORAS=str(max(cpu_loras, number)))
        try:
            server.admin_key = registered.admin_key
            several = [
                await _row(server, registered, count, seconds, warm_up_s, concurrency, max_tokens, seed + i)
                for i, count in enumerate((BASELINE, *counts, BASELINE))
            ]
        finally:
            server.stop()
        base = (several[0]["requests_per_s"] + several[-1]["requests_per_s"]) / 2
        rows += [{"slots": number, **row, "ratio": round(row["requests_per_s"] / base, 3) if base else None}
                 for row in several]
    return {"machine": machine(), "concurrency": concurrency, "max_tokens": max_tokens, "cpu_loras": cpu_loras,
            "tenants": TENANTS, "seconds": seconds, "warm_up_s": warm_up_s, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = result["rows"]
    lines = [
        f"Machine: {result['machine']}. Model: nano, float32. Traffic is pinned to adapters by Zipf's law (s = 1): "
        f"{result['concurrency']} clients, {result['max_tokens']} tokens each, {result['seconds']:g} s a row after "
        f"{result['warm_up_s']:g} s of warm-up. {result['tenants']} tenants under one service key. vLLM's memory holds "
        f"{result['cpu_loras']} adapters, or as many as there are slots.",
        "",
        "At once: how many different adapters as many requests as there are clients name on average; those beyond the "
        "slots wait, whatever loading costs. Hits: share of requests that found their adapter in that tier. Loads into "
        "vLLM: milliseconds, of the adapters that it held at the end. Fetches from the blob store: mean. Thrash: "
        "adapters that left the tier for another one, per request. Ratio: requests/s to the mean of the rows with "
        f"{BASELINE} adapters, before and after the others, on the same server.",
        "",
        "| slots | adapters | at once | requests/s | ratio | TTFT p50 / p95 ms | "
        + " | ".join(f"hits {tier}" for tier in TIERS)
        + " | load p50 / p99 ms | fetch ms | thrash slot | thrash memory | errors |",
        "|---" * (11 + len(TIERS)) + "|",
    ]
    for row in rows:
        cells = [row["slots"], row["registered"], row["at_once"], f"{row['requests_per_s']:.2f}",
                 _number(row["ratio"], 2), _pair(row["ttft_ms"], "p50", "p95"),
                 *(_number(row["hits"][tier], 3) for tier in TIERS),
                 _pair(row["load_ms"], "p50", "p99"), _number(row["fetch_ms"], 1), _number(row["thrash"]["slot"], 2),
                 _number(row["thrash"]["cpu"], 2), errors_cell(row["errors"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    aimed = [f"{row['slots']} slots {row['ratio']:.2f}" for row in rows if row["registered"] == GOAL_COUNT]
    if aimed:
        lines += ["", f"{GOAL_COUNT:,} adapters to {BASELINE} (goal: at least {GOAL}): {', '.join(aimed)}."]
    return "\n".join(lines) + "\n"


async def _row(
    server: Server, registered: Registered, count: int, seconds: float, warm_up_s: float, concurrency: int,
    max_tokens: int, seed: int,
) -> dict[str, Any]:
    requests = zipf_requests(registered.adapters[:count], max_tokens, seed)
    if warm_up_s:
        await closed_loop(server.url, registered.service_key, requests, concurrency, warm_up_s)
    async with session(registered.admin_key) as admin:
        before = await metrics(admin, server.url)
        load = await closed_loop(server.url, registered.service_key, requests, concurrency, seconds)
        spent = difference(before, await metrics(admin, server.url))
        held = await _held_load_ms(admin, server.url)
    sent = len(load.samples)
    hits = {tier: value(spent, "imprint_adapter_hits_total", tier=tier) for tier in TIERS}
    fetches = value(spent, "imprint_adapter_load_duration_seconds_count", step="fetch")
    fetch_s = value(spent, "imprint_adapter_load_duration_seconds_sum", step="fetch")
    thrash = {tier: value(spent, "imprint_adapter_evictions_total", tier=tier) / sent for tier in ("slot", "cpu")}
    return {
        "registered": count,
        "at_once": round(expected_distinct(count, concurrency), 1),
        **summary(load),
        "hits": {tier: number / sum(hits.values()) if any(hits.values()) else None for tier, number in hits.items()},
        "load_ms": percentiles_ms([ms / 1000 for ms in held], (50, 99)),
        "loads_per_request": value(spent, "imprint_adapter_loads_total", reason="request", outcome="loaded") / sent,
        "fetch_ms": 1000 * fetch_s / fetches if fetches else None,
        "thrash": thrash,
    }


def zipf_requests(adapters: Sequence[RegisteredAdapter], max_tokens: int, seed: int) -> Iterator[ChatRequest]:
    """Requests without end, the k-th adapter in proportion to 1/k. No two prompts are the same."""
    rng = Random(seed)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(adapters) + 1)))
    while True:
        (adapter,) = rng.choices(adapters, cum_weights=weights)
        prompt = f"{rng.randrange(10**9)}: how many crates does the depot keep, and who is its warden?"
        yield ChatRequest(adapter.id, prompt, max_tokens, adapter.headers)


def expected_distinct(count: int, drawn: int) -> float:
    """How many different ones `drawn` requests of `zipf_requests` over `count` adapters name, on average."""
    shares = 1 / np.arange(1, count + 1)
    return float((1 - (1 - shares / shares.sum()) ** drawn).sum())


async def metrics(admin: aiohttp.ClientSession, url: str) -> Metrics:
    """The server's metrics now."""
    async with admin.get(f"{url}/metrics") as response:
        response.raise_for_status()
        text = await response.text()
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def difference(before: Metrics, after: Metrics) -> Metrics:
    """How far each sample has risen; those that were not there before from zero."""
    return {name: number - before.get(name, 0.0) for name, number in after.items()}


def value(found: Metrics, name: str, **labels: str) -> float:
    """The sum over the samples of this name that have these labels; 0 where there are none."""
    wanted = set(labels.items())
    return sum(number for (known, said), number in found.items() if known == name and wanted <= set(said))


async def _held_load_ms(admin: aiohttp.ClientSession, url: str) -> list[float]:
    """How long vLLM took to load each adapter that it holds."""
    async with admin.get(f"{url}/v1/slots") as response:
        response.raise_for_status()
        replicas = (await response.json())["data"]
    return [row["load_ms"] for replica in replicas for row in replica["adapters"] if row["load_ms"] is not None]


def _number(number: float | None, digits: int) -> str:
    return "-" if number is None or not np.isfinite(number) else f"{number:.{digits}f}"


def _pair(found: dict[str, float | None], low: str, high: str) -> str:
    return f"{_number(found[low], 1)} / {_number(found[high], 1)}"

