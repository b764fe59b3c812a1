"""How long a new composition of adapters takes until its first token: compose, write, load.

    python -m benchmarks.compose_latency

The shipped nano pair's adapters of held-out documents, and the engine's own parts in this process: registry, blob
store, node cache, compositions, loader and vLLM. Every composition measured is new (other weights), its members are
on this node already. Columns, p50 / p95:

- compose: reading the members' files and concatenating their ranks
- write: the composed folder, to where the server keeps them
- make: all that a request waits for before loading: members looked up and verified, composed, written
- load: vLLM's `add_lora`, where vLLM's memory is full with the removal of another one before it
- made and loaded: both together
- first token: of a request that begins with making it; beside it that of an adapter that vLLM holds

Situations: vLLM has room for it; its memory is full of others, so that one goes for each that comes; streams of other
adapters are running.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.nano_pair import RANK_CAP, Pair
from benchmarks.server import machine
from hypernet.compose import compose
from hypernet.fingerprint import fingerprint_folder
from hypernet.lora import LoraAdapter
from hypernet.nano import base_dir
from hypernet.training.corpus.documents import Split, sample_document
from serve.blobs import BlobStore
from serve.config import EngineConfig
from serve.deployments.engine_adapters import AdapterCache
from serve.deployments.engine_compositions import Compositions, folder_for_compositions
from serve.deployments.engine_context import Member, composition_id
from serve.deployments.engine_loader import AdapterLoader, LocalAdapter
from serve.deployments.engine_metrics import EngineMetrics
from serve.ids import new_id
from serve.memory_tiers import MemoryTiers
from serve.registry import Registry, migrate
from serve.registry.records import NewAdapter, NewCentroids
from serve.residency import ResidencyTable

SEED, DOCUMENTS, FACTS = 81, 12, 2
MEMBERS, REPEATS = (2, 4), 40
PROMPT_TOKENS, STREAMS, STREAM_TOKENS = 24, 8, 64
ENGINE = EngineConfig(max_loras=16, max_lora_rank=RANK_CAP, max_cpu_loras=64, threads="nobind")
FIGURES = ("compose", "write", "make", "load", "made and loaded", "first token", "first token, held")


class Node:
    """One engine replica's parts, without Ray and HTTP, with a tenant and its adapters."""

    def __init__(self, folder: Path) -> None:
        """Generates the adapters and starts vLLM."""
        from serve.deployments.engine_vllm import VllmRuntime

        url = f"sqlite:///{folder / 'registry.db'}"
        migrate(url)
        self.registry, blobs = Registry.open(url), BlobStore.open(f"file://{folder / 'blobs'}")
        self.tenant_id = self.registry.create_tenant("benchmark").id
        base = fingerprint_folder(base_dir())
        rng = Random(SEED)
        texts = [sample_document(rng, FACTS, Split.HELD_OUT).text for _ in range(DOCUMENTS)]
        self.adapters: list[str] = []
        for number, adapter in enumerate(Pair().adapters(texts)):
            adapter.save(folder / f"made-{number}")
            self.adapters.append(self._publish(blobs, folder / f"made-{number}", adapter, base))
        metrics = EngineMetrics()
        self.residency = ResidencyTable(ENGINE.max_loras)
        self.cache = AdapterCache(self.registry, blobs, folder / "cache" / "adapters", base, RANK_CAP,
                                  ENGINE.cache_bytes, lambda _: False, metrics)
        self.place = folder_for_compositions(folder / "cache")
        self.compositions = Compositions(self.registry, self.cache, self.residency, self._forget, self.place,
                                         RANK_CAP, ENGINE.composition_bytes, metrics)
        self.runtime = VllmRuntime(str(base_dir()), ENGINE)
        tiers: MemoryTiers[Any] = MemoryTiers(ENGINE.max_loras, ENGINE.max_cpu_loras)
        self.loader = AdapterLoader(self.runtime, tiers, self.residency, metrics, lambda _: None)

    def close(self) -> None:
        """Ends vLLM."""
        self.runtime.shutdown()
        self.compositions.close()
        self.cache.close()
        self.registry.close()

    @asynccontextmanager
    async def attached(self, members: tuple[Member, ...], took: dict[str, float]) -> AsyncIterator[Any]:
        """Make and load, as a request does, and note the seconds; gives vLLM's LoRA request."""
        async with AsyncExitStack() as stack:
            name = composition_id(members)
            stack.enter_context(self.residency.name(name))
            started = time.perf_counter()
            local = await self.compositions.get(self.tenant_id, members)
            made = time.perf_counter()
            await stack.enter_async_context(self.residency.hold(name, self.tenant_id))
            lora = await self.loader.load(local)
            took |= {"make": made - started, "load": time.perf_counter() - made,
                     "made and loaded": time.perf_counter() - started}
            yield lora

    async def load_alone(self, adapter_id: str) -> Any:
        """vLLM's LoRA request of a single adapter."""
        with self.residency.name(adapter_id):
            return await self.loader.load(await self.cache.get(self.tenant_id, adapter_id))

    async def generate(self, lora: Any, rng: Random, tokens: int) -> float:
        """Seconds until the first token of a random prompt, which no prefix cache holds; runs to the end."""
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": [rng.randrange(20, 2000) for _ in range(PROMPT_TOKENS)]}
        options = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        started, first = time.perf_counter(), 0.0
        async for _ in self.runtime.engine.generate(prompt, options, new_id("job"), lora_request=lora):
            first = first or time.perf_counter() - started
        return first

    async def folders(self, members: tuple[Member, ...]) -> list[Path]:
        """The members' files on this node."""
        found: list[LocalAdapter] = [await self.cache.get(self.tenant_id, adapter_id) for adapter_id, _ in members]
        return [local.folder for local in found]

    async def _forget(self, adapter_id: str) -> bool:
        if self.residency.idle_s(adapter_id) is None:
            return False
        await self.loader.drop(adapter_id)
        return self.residency.idle_s(adapter_id) is not None

    def _publish(self, blobs: BlobStore, folder: Path, adapter: LoraAdapter, base: str) -> str:
        adapter_id = new_id("adp")
        stored = blobs.put_folder(f"adapters/{adapter_id}", folder)
        posted = self.registry.post_document(self.tenant_id, adapter_id, adapter_id)
        self.registry.lease_jobs("benchmark", 1, 60)
        made = NewAdapter(adapter_id, "lora", adapter.rank, adapter.alpha, adapter.target_modules, stored.prefix,
                          stored.checksum, stored.size_bytes, base, "benchmark")
        centroid = NewCentroids("benchmark", "1", np.ones((1, 2), np.float32))
        self.registry.publish(posted.job.id, "benchmark", [(made, centroid)])
        return adapter_id


@dataclass(frozen=True)
class Situation:
    """Where vLLM is when a composition comes."""

    name: str
    streams: int = 0


async def measure(node: Node, situation: Situation, members: int, repeats: int, rng: Random) -> dict[str, Any]:
    """One row: milliseconds by figure, sorted."""
    figures: dict[str, list[float]] = {name: [] for name in FIGURES}
    held = await node.load_alone(node.adapters[0])
    drawn = compositions(node.adapters, members, rng)
    async with streams(node, situation.streams):
        for _ in range(repeats):
            one = next(drawn)
            folders = await node.folders(one)
            started = time.perf_counter()
            composed = compose([LoraAdapter.load(folder) for folder in folders], [w for _, w in one], RANK_CAP)
            done = time.perf_counter()
            composed.save(node.place / "measured")
            figures["write"].append(time.perf_counter() - done)
            figures["compose"].append(done - started)
            shutil.rmtree(node.place / "measured")
            took: dict[str, float] = {}
            async with node.attached(one, took) as lora:
                first = await node.generate(lora, rng, 1)
            for name, seconds in took.items():
                figures[name].append(seconds)
            figures["first token"].append(took["made and loaded"] + first)
            figures["first token, held"].append(await node.generate(held, rng, 1))
            await asyncio.sleep(0.005)
    milliseconds = {name: sorted(1000 * value for value in values) for name, values in figures.items()}
    return {"situation": situation.name, "members": members, "milliseconds": milliseconds}


def compositions(adapters: list[str], members: int, rng: Random) -> Iterator[tuple[Member, ...]]:
    """Ever new ones: any members, with weights that no other has."""
    while True:
        yield tuple((adapter_id, round(rng.uniform(0.5, 1.5), 9)) for adapter_id in rng.sample(adapters, members))


@asynccontextmanager
async def streams(node: Node, count: int) -> AsyncIterator[None]:
    """So many requests of single adapters that run all the time."""
    async def run(number: int) -> None:
        rng, adapter_id = Random(number), node.adapters[number % DOCUMENTS]
        async with node.residency.hold(adapter_id, node.tenant_id):
            while True:
                await node.generate(await node.load_alone(adapter_id), rng, STREAM_TOKENS)

    tasks = [asyncio.create_task(run(number)) for number in range(count)]
    if tasks:
        await asyncio.sleep(2)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def rows(node: Node, repeats: int) -> list[dict[str, Any]]:
    """All situations; vLLM's memory fills between the first and the others."""
    rng = Random(SEED)
    room = ENGINE.max_cpu_loras - 2 * len(MEMBERS)  # with one single adapter, and some to spare
    found = []
    for members in MEMBERS:
        found.append(await measure(node, Situation("room"), members, min(repeats, room // len(MEMBERS)), rng))
    filler = compositions(node.adapters, 2, rng)
    for one in itertools.islice(filler, ENGINE.max_cpu_loras):
        async with node.attached(one, {}):
            pass
    for situation in (Situation("full"), Situation(f"full, {STREAMS} streams", STREAMS)):
        for members in MEMBERS:
            found.append(await measure(node, situation, members, repeats, rng))
    return found


def table(measured: list[dict[str, Any]]) -> list[str]:
    """Markdown, p50 / p95 in milliseconds."""
    lines = ["| vLLM's memory | members | " + " | ".join(FIGURES) + " |", "|---" * (2 + len(FIGURES)) + "|"]
    for row in measured:
        cells = [f"{np.percentile(row['milliseconds'][name], 50):.1f} / "
                 f"{np.percentile(row['milliseconds'][name], 95):.1f}" for name in FIGURES]
        lines.append(f"| {row['situation']} | {row['members']} | " + " | ".join(cells) + " |")
    return lines


async def run(node: Node, repeats: int) -> list[dict[str, Any]]:
    """Check that vLLM runs as the server needs it, and measure."""
    await node.runtime.verify()
    return await rows(node, repeats)


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=REPEATS, help="compositions in each row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder))
        size = next(file.stat().st_size for file in Path(folder).glob("made-0/*.safetensors"))
        try:
            measured = asyncio.run(run(node, options.repeats))
        finally:
            node.close()
        kept = "shared memory" if Path(folder) not in node.place.parents else "disk"
    lines = ["A new composition of adapters, milliseconds, p50 / p95. Columns: see benchmarks/compose_latency.py.",
             f"Machine: {machine()}. Model: nano, adapters of {size / 1000:.0f} kB; compositions in {kept}; "
             f"{ENGINE.max_loras} slots, {ENGINE.max_cpu_loras} adapters in vLLM's memory.", "", *table(measured)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "compose_latency.md").write_text("\n".join(lines) + "\n")
    (options.output / "compose_latency.json").write_text(json.dumps(measured, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
