"""Tables 1 and 2: requests/s, TTFT and ITL through all of Imprint, against vLLM's own server and Ray Serve LLM.

All servers have the same engine arguments, and those with adapters the same adapter folders. Requests are sent and
timed by the function that `vllm bench serve` uses. Servers that are compared are up at once; the load goes to one at a
time, round by round, and ratios are of the same round.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
from rich.progress import Progress

from benchmarks.ray_llm_server import ray_llm_server
from benchmarks.server import Tenant, machine
from benchmarks.serving.questions import numbered_questions
from benchmarks.vllm_server import PeerServer, VllmServer
from hypernet.training.corpus.documents import Split, sample_document
from tests.server import Server

ADAPTERS, FACTS, SEED = 4, 4, 99
CONCURRENCY = (1, 8, 32)
OUTPUT_TOKENS = 32
REQUESTS = {1: 24, 8: 120, 32: 320}
STOCK, WRAPPER, RAY_LLM = "vLLM's server", "vLLM's server with Imprint's LoRA code", "Ray Serve LLM"
METRICS = ("requests_per_s", *(f"{name}_{share}_ms" for name in ("ttft", "itl", "tpot") for share in ("p50", "p95")))


@dataclass(frozen=True)
class System:
    """Something to be measured: where, by which model names (given to requests in turn), and with which headers."""

    name: str
    url: str
    models: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)


async def bench(system: System, prompts: Sequence[str], concurrency: int) -> dict[str, float]:
    """One closed-loop run over the prompts, through vLLM's request function. Raises RuntimeError where one fails."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_chat_completions

    limit = asyncio.Semaphore(concurrency)

    async def send(http: aiohttp.ClientSession, number: int) -> Any:
        model = system.models[number % len(system.models)]
        request = RequestFuncInput(prompt=prompts[number], api_url=f"{system.url}/v1/chat/completions", prompt_len=0,
                                   output_len=OUTPUT_TOKENS, model=model, model_name=model, ignore_eos=True,
                                   extra_headers=dict(system.headers), extra_body={"temperature": 0})
        async with limit:
            return await async_request_openai_chat_completions(request, http)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
        begun = time.perf_counter()
        outputs = await asyncio.gather(*(send(http, number) for number in range(len(prompts))))
        took = time.perf_counter() - begun
    for output in outputs:
        if not output.success or output.output_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"{system.name}: a request failed: {output.error or output.output_tokens}")
    samples = {"ttft": [one.ttft for one in outputs], "itl": [gap for one in outputs for gap in one.itl],
               "tpot": [(one.latency - one.ttft) / (OUTPUT_TOKENS - 1) for one in outputs]}
    result = {"requests_per_s": len(outputs) / took}
    for name, values in samples.items():
        median, high = np.percentile(values, [50, 95]) * 1000
        result |= {f"{name}_p50_ms": float(median), f"{name}_p95_ms": float(high)}
    return result


async def _rounds(
    systems: Sequence[System], questions: Iterator[str], rounds: int, scale: float, progress: Progress
) -> dict[str, dict[int, list[dict[str, float]]]]:
    """By system and concurrency the figures of each round; each run takes new questions."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {one.name: {} for one in systems}
    task = progress.add_task("load", total=len(CONCURRENCY) * (rounds + 1) * len(systems))
    for concurrency in CONCURRENCY:
        requests = max(concurrency, round(REQUESTS[concurrency] * scale))
        for number in range(rounds + 1):
            # The first round warms up what the first requests of a kind cost. Then turns change from round to round.
            count = requests if number else max(concurrency, requests // 4)
            for one in systems if number % 2 else list(reversed(systems)):
                result = await bench(one, list(itertools.islice(questions, count)), concurrency)
                if number:
                    found[one.name].setdefault(concurrency, []).append(result)
                progress.advance(task)
    return found


async def measure(
    folder: Path, packages: str, rounds: int = 3, scale: float = 1.0, against: Sequence[str] = (STOCK, WRAPPER, RAY_LLM)
) -> dict[str, Any]:
    """Runs the comparisons `against` these; `scale` shortens the runs. ``packages``: a folder with what Ray Serve LLM
    needs (see `benchmarks.ray_llm_server`); without it that comparison is left out."""
    rng = Random(SEED)
    documents = [sample_document(rng, FACTS, Split.HELD_OUT) for _ in range(ADAPTERS)]
    server = Server(folder / "server")
    server.start()
    results: dict[str, Any] = {"machine": machine(), "output_tokens": OUTPUT_TOKENS, "comparisons": {}}
    peers: list[PeerServer] = []
    try:
        key = server.create_key("bench")
        tenant = Tenant(server.url, key)
        folders: dict[str, Path] = {}
        for document in documents:
            adapter_id = (await tenant.post("", document.text))["adapter_ids"][0]
            source = next((server.data_dir / "blobs").rglob(adapter_id))
            folders[adapter_id] = Path(shutil.copytree(source, folder / adapter_id))
        await tenant.client.aclose()
        questions = numbered_questions(documents, rng)
        headers = {"Authorization": f"Bearer {key}"}
        ours = [System("Imprint, routed", server.url, ["imprint"], headers),
                System("Imprint, adapter pinned", server.url, list(folders), headers),
                System("Imprint, base", server.url, ["base"], headers)]

        async def compare(name: str, peer: PeerServer, theirs: list[System], which: list[System]) -> None:
            peers.append(peer)
            await peer.ready()
            with Progress() as progress:
                progress.print(name)
                found = await _rounds([*which, *theirs], questions, rounds, scale, progress)
            results["comparisons"][name] = found
            peer.stop()
            peers.remove(peer)

        port = server.port + 1
        if STOCK in against:
            stock = VllmServer(folders, port, folder / "stock.log")
            theirs = [System(f"{STOCK}, adapter", stock.url, list(folders)),
                      System(f"{STOCK}, base", stock.url, ["base"])]
            await compare(STOCK, stock, theirs, ours)
        if WRAPPER in against:
            ready = VllmServer(folders, port + 1, folder / "wrapper.log", wrapper=True)
            await compare(WRAPPER, ready, [System(f"{WRAPPER}, adapter", ready.url, list(folders))], ours[:2])
        if RAY_LLM in against and packages:
            other = ray_llm_server(port + 2, folder / "ray_llm.log", packages)
            await compare(RAY_LLM, other, [System(f"{RAY_LLM}, base", other.url, ["base"])], ours[2:])
    finally:
        for peer in peers:
            peer.stop()
        server.stop()
    return results


def earlier(file: Path) -> dict[str, Any]:
    """The comparisons of an earlier result; none where there is no such file."""
    found = json.loads(file.read_text())["comparisons"] if file.exists() else {}
    return {peer: {system: {int(concurrency): runs for concurrency, runs in by_concurrency.items()}
                   for system, by_concurrency in systems.items()} for peer, systems in found.items()}


def report(result: dict[str, Any]) -> str:
    """One table a peer; ratios are medians of the rounds'."""
    lines = [f"Machine: {result['machine']}. Model: nano, float32; {ADAPTERS} adapters in turn; questions of about 40 "
             f"tokens with the template, {result['output_tokens']} output tokens, streamed. Timed by the client "
             "of `vllm bench serve`. Medians of the rounds. ITL is between two chunks, which hold more than one token "
             "under load; TPOT is the time for each token after the first."]
    for name, found in result["comparisons"].items():
        reference = list(found)[-2] if name == STOCK else list(found)[-1]
        lines += ["", f"Against {name}:", "",
                  f"| system | concurrency | requests/s | against {reference} | TTFT p50 / p95 ms | ITL p50 / p95 ms | "
                  "TPOT p50 / p95 ms |", "|---|---|---|---|---|---|---|"]
        for concurrency in CONCURRENCY:
            base = [one["requests_per_s"] for one in found[reference][concurrency]]
            for system, by_concurrency in found.items():
                runs = by_concurrency[concurrency]
                ratio = statistics.median(
                    one["requests_per_s"] / other for one, other in zip(runs, base, strict=True))
                median = {metric: statistics.median(one[metric] for one in runs) for metric in METRICS}
                lines.append(
                    f"| {system} | {concurrency} | {median['requests_per_s']:.1f} | {ratio:.2f} | "
                    + " | ".join(f"{median[f'{m}_p50_ms']:.1f} / {median[f'{m}_p95_ms']:.1f}"
                                 for m in ("ttft", "itl", "tpot")) + " |")
    return "\n".join(lines) + "\n"
