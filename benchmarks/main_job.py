"""The main job on this machine: post, ready, first token, throughput, memory; beside vLLM's own server.

    python -m benchmarks.main_job

Starts an Imprint server with the shipped nano models and a fresh data folder, posts documents, and then vLLM's own
OpenAI server (without Imprint's plugin) with the very same adapter folders. Both stay up; the load goes to one at a
time, alternating, and ratios are of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from benchmarks.server import Tenant, machine
from benchmarks.vllm_server import VllmServer
from hypernet.training.corpus.documents import SampledDocument, Split, ask, sample_document
from tests.server import Server

ADAPTERS, DOCUMENTS, FACTS, SEED = 4, 40, 4, 99
CONCURRENCY, ROUNDS, SECONDS_A_ROUND = (1, 8, 32), 3, 6.0
MAX_TOKENS = 16


@dataclass
class Timings:
    """Seconds, one sample a measurement."""

    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """One more sample."""
        self.samples.setdefault(name, []).append(seconds)


async def _first_token(client: httpx.AsyncClient, model: str, question: str) -> float:
    """Seconds from sending a streaming chat request to its first piece of content."""
    begun = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=_body(model, question, stream=True)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    return time.perf_counter() - begun
    return time.perf_counter() - begun


def _body(model: str, question: str, stream: bool = False) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": MAX_TOKENS, "stream": stream}


async def _throughput(client: httpx.AsyncClient, work: Sequence[tuple[str, str]], concurrency: int) -> float:
    """Requests a second over `SECONDS_A_ROUND` of closed-loop load."""
    done, end = 0, time.perf_counter() + SECONDS_A_ROUND
    begun = time.perf_counter()

    async def worker(start: int) -> None:
        nonlocal done
        i = start
        while time.perf_counter() < end:
            model, question = work[i % len(work)]
            (await client.post("/v1/chat/completions", json=_body(model, question))).raise_for_status()
            done += 1
            i += concurrency
    await asyncio.gather(*(worker(i) for i in range(concurrency)))
    return done / (time.perf_counter() - begun)


def memory(pid: int) -> list[tuple[str, float]]:
    """Unique set size in MiB of every process below `pid` that has more than 30 MiB."""
    rows = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            size = process.memory_full_info().uss / 2**20
            words = " ".join(process.cmdline())[:60].split()
            name = " ".join(word.rsplit("/", 1)[-1] for word in words[:3])
            if size > 30:
                rows.append((name or process.name(), size))
    return sorted(rows, key=lambda row: -row[1])


async def _latencies(tenant: Tenant, documents: list[SampledDocument], timings: Timings) -> list[dict[str, Any]]:
    """Post one by one and ask at once; then first-token times of warm adapters, pinned, routed and base."""
    rng, ready = Random(SEED), []
    for document in documents:
        begun = time.perf_counter()
        posted = await tenant.post_only("", document.text)
        timings.add("POST to 202", time.perf_counter() - begun)
        ready.append(await tenant.ready(posted["id"], poll_s=0.005))
        timings.add("POST to ready", time.perf_counter() - begun)
        question = ask(document.facts[0], document, rng).text
        timings.add("ready to first adapted token", await _first_token(tenant.client, ready[-1]["id"], question))
    for i in range(3 * len(documents)):
        j = i % ADAPTERS
        question = ask(rng.choice(documents[j].facts), documents[j], rng).text
        for name, model in (("base", "base"), ("pinned", ready[j]["id"]), ("routed", "imprint")):
            timings.add(f"TTFT {name}", await _first_token(tenant.client, model, question))
    return ready


async def measure(server: Server, pid: int, folder: Path) -> dict[str, Any]:
    """Everything that the table shows."""
    tenant, timings, rng = Tenant(server.url, server.create_key("bench")), Timings(), Random(SEED)
    documents = [sample_document(rng, FACTS, Split.HELD_OUT) for _ in range(DOCUMENTS)]
    ready = await _latencies(tenant, documents, timings)
    adapters = {}
    for i in range(ADAPTERS):
        source = next((server.data_dir / "blobs").rglob(ready[i]["adapter_id"]))
        adapters[ready[i]["adapter_id"]] = Path(shutil.copytree(source, folder / ready[i]["adapter_id"]))
    questions = [(ready[i]["adapter_id"], ask(fact, documents[i], rng).text)
                 for i in range(ADAPTERS) for fact in documents[i].facts]
    rng.shuffle(questions)
    own_memory = memory(pid)
    peer = VllmServer(adapters, server.port + 1, folder / "peer.log")
    rows: list[dict[str, Any]] = []
    try:
        await peer.ready()
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=peer.url, timeout=300, limits=limits) as other:
            for _ in range(DOCUMENTS):
                timings.add("TTFT vLLM's server, adapter", await _first_token(other, *questions[_ % len(questions)]))
            systems = {"imprint, adapter pinned": (tenant.client, questions),
                       "imprint, routed": (tenant.client, [("imprint", q) for _, q in questions]),
                       "imprint, base": (tenant.client, [("base", q) for _, q in questions]),
                       "vLLM's server, adapter": (other, questions),
                       "vLLM's server, base": (other, [("base", q) for _, q in questions])}
            for concurrency in CONCURRENCY:
                found: dict[str, list[float]] = {name: [] for name in systems}
                for _ in range(ROUNDS):
                    for name, (client, work) in systems.items():
                        found[name].append(await _throughput(client, work, concurrency))
                for name, rates in found.items():
                    ratios = [a / b for a, b in zip(rates, found["vLLM's server, adapter"], strict=True)]
                    rows.append({"system": name, "concurrency": concurrency, "requests_per_s": statistics.median(rates),
                                 "ratio": statistics.median(ratios)})
        peer_memory = memory(peer.process.pid)
    finally:
        peer.stop()
        await tenant.client.aclose()
    return {"machine": machine(), "timings": timings.samples, "throughput": rows, "memory_mib": own_memory,
            "peer_memory_mib": peer_memory}


def report(result: dict[str, Any]) -> str:
    """The Markdown tables."""
    lines = [f"Machine: {result['machine']}. Model: nano, float32. {DOCUMENTS} documents of {FACTS} facts, "
             f"{ADAPTERS} adapters under load, answers of at most {MAX_TOKENS} tokens.", "",
             "| latency | p50 ms | p95 ms | samples |", "|---|---|---|---|"]
    for name, samples in result["timings"].items():
        p95 = statistics.quantiles(samples, n=20)[-1]
        lines.append(f"| {name} | {statistics.median(samples) * 1e3:.1f} | {p95 * 1e3:.1f} | {len(samples)} |")
    lines += ["", "| system | concurrency | requests/s | against vLLM's server with adapters |", "|---|---|---|---|"]
    for row in result["throughput"]:
        lines.append(f"| {row['system']} | {row['concurrency']} | {row['requests_per_s']:.1f} | {row['ratio']:.2f} |")
    for title, name in (("imprint", "memory_mib"), ("vLLM's server", "peer_memory_mib")):
        lines += ["", f"| process of {title} | memory MiB (unique set) |", "|---|---|"]
        lines += [f"| {process} | {size:.0f} |" for process, size in result[name]]
        lines.append(f"| all | {sum(size for _, size in result[name]):.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write `main_job.md` and `main_job.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "server")
        server.start()
        try:
            result = asyncio.run(measure(server, server.pid, folder))
        finally:
            server.stop()
    table = report(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "main_job.md").write_text(table)
    (options.output / "main_job.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
