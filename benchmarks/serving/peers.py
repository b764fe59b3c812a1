"""Tables 1 and 2: requests/s, TTFT and ITL through all of Imprint, against vLLM's own server and Ray Serve LLM.

All servers have the same engine arguments, and those with adapters the same adapter folders. The client is vLLM's own
(`vllm bench serve`), in a process of its own. Servers that are compared are up at once; the load goes to one at a
time, round by round, and ratios are of the same round.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.progress import Progress

from benchmarks.ray_llm_server import ray_llm_server
from benchmarks.server import Tenant, machine
from benchmarks.vllm_server import PeerServer, VllmServer
from hypernet.nano import base_dir
from hypernet.training.corpus.documents import Split, ask, sample_document
from tests.server import Server

ADAPTERS, FACTS, SEED = 4, 4, 99
CONCURRENCY = (1, 8, 32)
OUTPUT_TOKENS = 32
REQUESTS = {1: 24, 8: 120, 32: 320}
_CLIENT = "from vllm.benchmarks import serve; from vllm.utils.argparse_utils import FlexibleArgumentParser as P; " \
          "p = P(); serve.add_cli_args(p); serve.main(p.parse_args())"
METRICS = ("request_throughput", "output_throughput", "median_ttft_ms", "p95_ttft_ms", "median_itl_ms", "p95_itl_ms",
           "median_tpot_ms", "p95_tpot_ms")


@dataclass(frozen=True)
class System:
    """Something to be measured: where, by which model names (given to requests in turn), and with which headers."""

    name: str
    url: str
    models: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)


async def bench(system: System, dataset: Path, concurrency: int, requests: int, folder: Path) -> dict[str, float]:
    """One run of vLLM's client. Raises RuntimeError where a request fails."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-c", _CLIENT, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
               "--base-url", system.url, "--model", system.models[0], "--tokenizer", str(base_dir()),
               "--dataset-name", "custom", "--dataset-path", str(dataset), "--custom-output-len", str(OUTPUT_TOKENS),
               "--skip-chat-template", "--num-prompts", str(requests), "--max-concurrency", str(concurrency),
               "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,itl,tpot",
               "--metric-percentiles", "50,95", "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-result",
               "--result-dir", str(folder), "--result-filename", result.name]
    if len(system.models) > 1:
        command += ["--lora-modules", *system.models, "--lora-assignment", "round-robin"]
    if system.headers:
        command += ["--header", *(f"{name}={value}" for name, value in system.headers.items())]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={"PATH": "", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    output, _ = await process.communicate()
    if process.returncode or not result.exists():
        raise RuntimeError(f"{system.name}: vLLM's client failed:\n{output.decode()[-3000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{system.name}: {found['completed']} of {requests} requests succeeded")
    return {name: float(found[name]) for name in METRICS}


async def _rounds(
    systems: Sequence[System], dataset: Path, rounds: int, scale: float, folder: Path, progress: Progress
) -> dict[str, dict[int, list[dict[str, float]]]]:
    """By system and concurrency the figures of each round."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {one.name: {} for one in systems}
    task = progress.add_task("load", total=len(CONCURRENCY) * (rounds + 1) * len(systems))
    for concurrency in CONCURRENCY:
        requests = max(concurrency, round(REQUESTS[concurrency] * scale))
        for number in range(rounds + 1):
            # The first round warms up what the first requests of a kind cost. Then turns change from round to round.
            turn = systems if number % 2 else list(reversed(systems))
            for one in turn:
                count = requests if number else max(concurrency, requests // 4)
                result = await bench(one, dataset, concurrency, count, folder)
                if number:
                    found[one.name].setdefault(concurrency, []).append(result)
                progress.advance(task)
    return found


async def measure(folder: Path, rounds: int = 3, scale: float = 1.0, ray_llm: str = "") -> dict[str, Any]:
    """Runs everything; `scale` shortens the runs. ``ray_llm``: a folder with what Ray Serve LLM needs (see
    `benchmarks.ray_llm_server`); without it table 2 is left out."""
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
        # Numbered, so that no question is answered out of the prefix cache.
        facts = [(fact, document) for document in documents for fact in document.facts]
        questions = [f"Case {number}: {ask(*facts[number % len(facts)], rng).text}" for number in range(500)]
        rng.shuffle(questions)
        dataset = folder / "questions.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in questions))
        headers = {"Authorization": f"Bearer {key}"}
        ours = [System("Imprint, routed", server.url, ["imprint"], headers),
                System("Imprint, adapter pinned", server.url, list(folders), headers),
                System("Imprint, base", server.url, ["base"], headers)]

        async def compare(name: str, peer: PeerServer, theirs: list[System], which: list[System]) -> None:
            peers.append(peer)
            await peer.ready()
            with Progress() as progress:
                progress.print(name)
                found = await _rounds([*which, *theirs], dataset, rounds, scale, folder, progress)
            results["comparisons"][name] = found
            peer.stop()
            peers.remove(peer)

        port = server.port + 1
        stock = VllmServer(folders, port, folder / "stock.log")
        await compare("vLLM's server", stock, [System("vLLM's server, adapter", stock.url, list(folders)),
                                               System("vLLM's server, base", stock.url, ["base"])], ours)
        ready = VllmServer(folders, port + 1, folder / "wrapper.log", wrapper=True)
        await compare("vLLM's server with Imprint's LoRA code", ready,
                      [System("vLLM's server with Imprint's LoRA code, adapter", ready.url, list(folders))], ours[:2])
        if ray_llm:
            other = ray_llm_server(port + 2, folder / "ray_llm.log", ray_llm)
            await compare("Ray Serve LLM", other, [System("Ray Serve LLM, base", other.url, ["base"])], ours[2:])
    finally:
        for peer in peers:
            peer.stop()
        server.stop()
    return results


def report(result: dict[str, Any]) -> str:
    """One table a peer; ratios are medians of the rounds'."""
    lines = [f"Machine: {result['machine']}. Model: nano, float32; {ADAPTERS} adapters in turn; questions of about 40 "
             f"tokens with the template, {result['output_tokens']} output tokens, streamed. Client: vLLM's `bench "
             "serve`. Medians of the rounds. ITL is between two chunks, which hold more than one token under load; "
             "TPOT is the time for each token after the first."]
    for name, found in result["comparisons"].items():
        reference = list(found)[-2] if name == "vLLM's server" else list(found)[-1]
        lines += ["", f"Against {name}:", "",
                  f"| system | concurrency | requests/s | against {reference} | TTFT p50 / p95 ms | ITL p50 / p95 ms | "
                  "TPOT p50 / p95 ms |", "|---|---|---|---|---|---|---|"]
        for concurrency in CONCURRENCY:
            base = [one["request_throughput"] for one in found[reference][concurrency]]
            for system, by_concurrency in found.items():
                runs = by_concurrency[concurrency]
                ratio = statistics.median(
                    one["request_throughput"] / other for one, other in zip(runs, base, strict=True))
                median = {metric: statistics.median(one[metric] for one in runs) for metric in METRICS}
                lines.append(
                    f"| {system} | {concurrency} | {median['request_throughput']:.1f} | {ratio:.2f} | "
                    + " | ".join(f"{median[f'median_{m}_ms']:.1f} / {median[f'p95_{m}_ms']:.1f}"
                                 for m in ("ttft", "itl", "tpot")) + " |")
    return "\n".join(lines) + "\n"
