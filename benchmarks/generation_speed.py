"""Documents to adapters: how many a second, how long each waits, how much memory, by length and batch.

    python -m benchmarks.generation_speed                                     # the shipped nano pair
    python -m benchmarks.generation_speed --shape gemma-2-2b --upstream DIR   # for a GPU; random weights
    python -m benchmarks.generation_speed --shape small-gemma-2 --upstream DIR

Every way makes the adapters of the same documents, turn by turn in one run. With `--upstream` (a checkout of
github.com/SakanaAI/doc-to-lora; see benchmarks/upstream.py) its own code runs on the same base, weights and tokens, one
document at a time as its interface has it, and the adapters are compared with ours before anything is timed. Its time
stops at the factors in the model's memory; ours holds chunking, tokenising, and the adapter on the host as for PEFT.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.server import machine
from benchmarks.upstream import Upstream
from hypernet.documents import DocumentText
from hypernet.generate import HypernetGenerator
from hypernet.lora import factors_of
from hypernet.nano import base_dir, hypernet_dir
from hypernet.published.doc_to_lora import DocToLoraSizes
from hypernet.published.folder import PER_LAYER, DocToLoraConfig, Reading, Source, save
from hypernet.training.corpus.documents import Split, sample_document
from tests.hypernet.published_helpers import BASES, Shape, doc_to_lora_shapes
from tests.tiny_models import make_tokenizer

SEED = 5_209
TOLERANCE = 2e-2
"""Largest allowed difference between our factors and upstream's, relative to the largest value (bfloat16 on a GPU)."""

Way = Callable[[Sequence[DocumentText]], object]


@dataclass(frozen=True)
class Scale:
    """A base and a Doc-to-LoRA network for it with random weights, and what is measured on them.

    `lengths` are in tokens of the document; `documents` is how many of each go through every way in one round.
    """

    base: dict[str, Any]
    network: Shape
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    documents: int


@dataclass
class Measured:
    """Seconds of each call, documents made, and the most memory above what the models take, in bytes."""

    seconds: list[float] = field(default_factory=list)
    documents: int = 0
    peak: int = 0


def _gemma(layers: int, hidden: int, inner: int, heads: int, head: int, vocabulary: int, latent: int,
           blocks: int) -> tuple[dict[str, Any], Shape]:
    config = BASES["gemma2"] | {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": head, "sliding_window": 4096,
        "query_pre_attn_scalar": head, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    return config, Shape(latent=latent, latents=8, rank=8, blocks=(True,) * blocks, layers=layers, hidden=hidden,
                         widths={"down_proj": (inner, hidden)})


SCALES = {
    "gemma-2-2b": Scale(*_gemma(26, 2304, 9216, 8, 256, 256_000, 512, 9), (128, 512, 2000), (4, 16), 32),
    "small-gemma-2": Scale(*_gemma(6, 256, 768, 4, 64, 320, 128, 3), (64, 256, 1024), (4, 16), 16),
}
NANO_LENGTHS, NANO_BATCHES, NANO_DOCUMENTS = (24, 80, 320), (4, 16), 16


def texts(tokenizer: Any, length: int, count: int, seed: int) -> list[DocumentText]:
    """Documents of about `length` tokens."""
    rng = Random(f"{SEED}-{seed}-{length}")
    found = []
    for _ in range(count):
        text = ""
        while len(ids := tokenizer.encode(text, add_special_tokens=False)) < length:
            text += sample_document(rng, rng.choice((1, 2, 4)), Split.HELD_OUT).text + "\n\n"
        found.append(DocumentText("", tokenizer.decode(ids[:length]).strip()))
    return found


def random_pair(scale: Scale, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """Write a base to `folder`/base and a converted checkpoint to `folder`/hypernetwork; returns its tensors."""
    base, checkpoint = folder / "base", folder / "hypernetwork"
    checkpoint.mkdir(parents=True)
    make_tokenizer().save_pretrained(base)
    (base / "config.json").write_text(json.dumps(scale.base))
    torch.manual_seed(SEED)
    with device:
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        tensors = {}
        for key, shape in doc_to_lora_shapes(scale.network).items():
            tensor = torch.randn(shape)
            tensors[key] = (0.8 + 0.1 * tensor if len(shape) == 1 else tensor * shape[-1] ** -0.5).cpu()
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(base)
    sizes = DocToLoraSizes.of(tensors)
    save(checkpoint, DocToLoraConfig(
        base_model="example/random", source=Source("random", "", 0), sizes=sizes,
        reading=Reading(PER_LAYER, sizes.layers - 1), scaling=2 * sizes.rank ** 1.5), tensors)
    return tensors


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The most bytes in use within, above those at the start: of the GPU where there is one, else of the process."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - before
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that the allocator keeps would hide a later peak
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = psutil.Process().memory_info().rss
    yield found
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found[0] = int(status["VmHWM"].split()[0]) * 1024 - before


def measure(ways: dict[str, tuple[int, Way]], documents: Sequence[DocumentText], rounds: int,
            device: torch.device) -> dict[str, Measured]:
    """All documents through every way, `rounds` times by turns, after one call of each to warm up."""
    found = {name: Measured() for name in ways}
    for batch, make in ways.values():
        make(documents[:batch])
    for _ in range(rounds):
        for name, (batch, make) in ways.items():
            with peak_memory(device) as peak:
                for first in range(0, len(documents), batch):
                    some = documents[first:first + batch]
                    begun = time.perf_counter()
                    make(some)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    found[name].seconds.append(time.perf_counter() - begun)
                    found[name].documents += len(some)
            found[name].peak = max(found[name].peak, peak[0])
    return found


def our_ways(generator: HypernetGenerator, batches: Sequence[int]) -> dict[str, tuple[int, Way]]:
    """One by one, and in batches."""
    def make(batch: int) -> Way:
        def run(documents: Sequence[DocumentText]) -> object:
            generator.batch_chunks = batch
            return generator.generate(documents)
        return run
    return {"one by one": (1, make(1))} | {f"batches of {batch}": (batch, make(batch)) for batch in batches}


def largest_difference(generator: HypernetGenerator, upstream: Upstream, document: DocumentText) -> float:
    """Between our factors of a document and upstream's, relative to the largest value of each."""
    reader = generator.reader
    ids = reader.frame(document.text)
    ours, theirs = factors_of(reader.adapters([ids])), upstream.factors(ids)
    worst = 0.0
    for name, pair in ours.items():
        # We fold the scale into B.
        for mine, other in zip(pair, theirs[name], strict=True):
            wanted = other.float().cpu()
            scale = float((mine * wanted).sum() / wanted.square().sum())
            worst = max(worst, float((mine - scale * wanted).abs().max() / (scale * wanted).abs().max()))
    return worst


def rows_of(label: str, documents: Sequence[DocumentText], measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """A row for each way: documents a second, seconds until a document's adapter is there, memory."""
    rows = []
    for name, one in measured.items():
        p50, p95 = np.percentile(one.seconds, (50, 95))
        rows.append({"length": label, "documents": len(documents), "way": name,
                     "documents_per_s": round(one.documents / sum(one.seconds), 5), "p50_ms": round(p50 * 1e3, 2),
                     "p95_ms": round(p95 * 1e3, 2), "peak_mib": round(one.peak / 2**20, 1)})
    return rows


def run(generator: HypernetGenerator, upstream: Upstream | None, lengths: Sequence[int], batches: Sequence[int],
        count: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows for each length and for all lengths mixed."""
    ways = our_ways(generator, batches)
    if upstream is not None:
        def one_by_one(documents: Sequence[DocumentText]) -> object:
            return [upstream.factors(generator.reader.frame(document.text)) for document in documents]
        ways = {"upstream, one by one": (1, one_by_one)} | ways
    cells = {str(length): texts(generator.tokenizer, length, count, seed) for seed, length in enumerate(lengths)}
    if upstream is not None:
        for documents in cells.values():
            difference = largest_difference(generator, upstream, documents[0])
            if difference > TOLERANCE:
                raise RuntimeError(f"our adapter differs from upstream's by {difference:.2e} of its largest value; "
                                   f"at most {TOLERANCE:g} is allowed")
    mixed = [document for documents in cells.values() for document in documents]
    Random(SEED).shuffle(mixed)
    cells["mixed"] = mixed[:count]
    rows = []
    for label, documents in cells.items():
        rows += rows_of(label, documents, measure(ways, documents, rounds, device))
        print("\n".join(map(json.dumps, rows[-len(ways):])), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown; each way's documents a second also against ours one by one, and against upstream's."""
    speeds = {(row["length"], row["way"]): row["documents_per_s"] for row in rows}
    lines = ["| tokens | way | documents/s | against ours one by one | against upstream | p50 ms | p95 ms | peak MiB |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        own, theirs = (speeds.get((row["length"], way)) for way in ("one by one", "upstream, one by one"))
        ratios = [f"{row['documents_per_s'] / other:.2f}" if other else "-" for other in (own, theirs)]
        lines.append(f"| {row['length']} | {row['way']} | {row['documents_per_s']:.2f} | {ratios[0]} | {ratios[1]} | "
                     f"{row['p50_ms']} | {row['p95_ms']} | {row['peak_mib']} |")
    return lines


def main() -> None:
    """Measure one shape and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["nano", *SCALES], default="nano")
    parser.add_argument("--upstream", type=Path, help="a checkout of upstream's repository; not for nano")
    parser.add_argument("--documents", type=int, help="of each length; by default as many as the shape says")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.upstream and options.shape == "nano":
        parser.error("--upstream: has no network of nano's kind; choose another --shape")
    if options.threads:
        torch.set_num_threads(options.threads)
    upstream, settings = None, {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        if options.shape == "nano":
            device = torch.device("cpu")
            generator = HypernetGenerator.load(hypernet_dir(), base_dir())
            rows = run(generator, None, NANO_LENGTHS, NANO_BATCHES, options.documents or NANO_DOCUMENTS,
                       options.rounds, device)
        else:
            scale, folder = SCALES[options.shape], Path(name)
            tensors = random_pair(scale, folder, device)
            generator = HypernetGenerator.load(folder / "hypernetwork", folder / "base")
            if options.upstream:
                upstream = Upstream(options.upstream, folder / "base", scale.network, tensors, device)
            settings = {"base": scale.base, "network": asdict(scale.network)}
            rows = run(generator, upstream, scale.lengths, scale.batches, options.documents or scale.documents,
                       options.rounds, device)
    where = f"GPU: {torch.cuda.get_device_name()}" if device.type == "cuda" else machine()
    kind = "the shipped nano pair" if options.shape == "nano" else f"{options.shape}, random weights"
    lines = ["Documents to adapters. A document in a batch waits for the whole batch; memory is what comes on top of "
             "the models.", f"Machine: {where}, {torch.get_num_threads()} threads. Model: {kind}.", "", *table(rows)]
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"generation_speed_{options.shape.replace('-', '_')}"
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    file.with_suffix(".json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
