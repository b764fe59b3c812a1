"""Where a request's time goes: CPU milliseconds a request in each process of the server, and its first token's time.

CPU time says what a request costs even where other things run beside it, and on a machine with few cores it bounds
the throughput: cores divided by the sum. A request at concurrency 1 also pays for idle turns of vLLM's loop.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.server import Tenant, machine
from benchmarks.serving.client import ChatRequest, closed_loop, percentiles_ms
from benchmarks.serving.questions import numbered_questions
from hypernet.training.corpus.documents import Split, sample_document
from tests.server import Server

ADAPTERS, FACTS, SEED = 4, 4, 99
MAX_TOKENS = 16
CONCURRENCY = (1, 8, 32)
# By what the command lines of processes hold; everything else is "other".
PROCESSES = {"imprint:ingress": "ingress", "imprint:router": "router", "imprint:engine": "engine (front)",
             "VLLM::": "engine (vLLM)", "imprint:generator": "generator", "ProxyActor": "Ray's proxy",
             "ServeController": "Ray's controller"}


def cpu_seconds(pid: int) -> dict[str, float]:
    """Seconds of CPU time of the server's processes so far, by hop."""
    found: dict[str, float] = defaultdict(float)
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        hop = next((hop for text, hop in PROCESSES.items() if text in command), "other")
        found[hop] += times.user + times.system
    return found


async def measure(folder: Path, seconds: float = 8.0) -> dict[str, Any]:
    """Base, pinned and routed requests at each concurrency on a server with the shipped configuration."""
    rng = Random(SEED)
    documents = [sample_document(rng, FACTS, Split.HELD_OUT) for _ in range(ADAPTERS)]
    server = Server(folder / "server")
    server.start()
    try:
        key = server.create_key("bench")
        tenant = Tenant(server.url, key)
        adapters = [(await tenant.post("", document.text))["adapter_ids"][0] for document in documents]
        await tenant.client.aclose()
        questions = numbered_questions(documents, rng)
        models = {"base": ["base"], "pinned": adapters, "routed": ["imprint"]}
        rows = []
        for concurrency in CONCURRENCY:
            for kind, names in models.items():
                requests = (ChatRequest(names[number % len(names)], question, MAX_TOKENS)
                            for number, question in enumerate(questions))
                await closed_loop(server.url, key, requests, concurrency, seconds / 4)
                before = cpu_seconds(server.pid)
                load = await closed_loop(server.url, key, requests, concurrency, seconds)
                after = cpu_seconds(server.pid)
                done = len(load.samples)
                rows.append({
                    "kind": kind, "concurrency": concurrency, "requests": done,
                    "requests_per_s": done / (max(one.ended for one in load.samples) - load.started),
                    "ttft_ms": percentiles_ms([one.ttft_s for one in load.samples if one.arrivals]),
                    "cpu_ms": {hop: 1000 * (after[hop] - before.get(hop, 0.0)) / done for hop in after},
                })
    finally:
        server.stop()
    return {"machine": machine(), "max_tokens": MAX_TOKENS, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """One row a kind of request and concurrency."""
    hops = [*PROCESSES.values(), "other"]
    lines = [f"Machine: {result['machine']}. Model: nano, float32, {ADAPTERS} adapters, {result['max_tokens']} output "
             "tokens, streamed. CPU milliseconds a request by process.", "",
             f"| request | concurrency | requests/s | TTFT p50 / p95 ms | {' | '.join(hops)} | sum |",
             "|---" * (len(hops) + 5) + "|"]
    for row in result["rows"]:
        spent = [row["cpu_ms"].get(hop, 0.0) for hop in hops]
        lines.append(f"| {row['kind']} | {row['concurrency']} | {row['requests_per_s']:.1f} | "
                     f"{row['ttft_ms']['p50']:.1f} / {row['ttft_ms']['p95']:.1f} | "
                     + " | ".join(f"{one:.1f}" for one in [*spent, sum(spent)]) + " |")
    return "\n".join(lines) + "\n"
