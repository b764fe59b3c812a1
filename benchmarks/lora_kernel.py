"""What adapters cost on a CPU: tokens/s with 0 to 64 adapters, through our LoRA wrapper and through vLLM's own.

    python -m benchmarks.lora_kernel

64 requests of 64 prompt and 32 output tokens at once, dealt round to the adapters, through `vllm.LLM`: two engines for
each shape and number type, one with the plugin of this project and one without any, each in a process of its own with
one thread for the model. They take turns, and a round asks for every number of adapters in turn. The figures are
medians over the rounds; a ratio divides by the same engine's answers without an adapter (LoRA enabled, 64 adapters in
their slots), of the same rounds: once tokens/s, and once the engine's processor time, which other work on the machine
disturbs less. Adapters are random, of two kinds: `down_proj` at rank 16, as the nano pair makes
them, and all seven projections at rank 8. Shapes are the shipped nano base and a wider random one.

Tokens are not checked here: `tests/serve/test_lora_cpu.py` compares them with PEFT's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.server import machine

RESULTS = Path(__file__).parent / "results"
NANO = Path(__file__).parent.parent / "hypernet" / "nano" / "base"
REQUESTS, PROMPT, OUTPUT = 64, 64, 32
COUNTS = (0, 1, 4, 16, 64)
KINDS = {
    "down_proj rank 16": (("down_proj",), 16),
    "all-linear rank 8": (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 8),
}
WRAPPERS = ("ours", "vLLM's own")
GOALS = {4: 0.85, 64: 0.6}


@dataclass(frozen=True)
class Setting:
    """One engine: ``base`` and ``adapters`` (one folder for each kind) are on disk."""

    base: str
    dtype: str
    adapters: str


@dataclass(frozen=True)
class Row:
    """One engine's medians with ``adapters`` of ``kind``, and of the rounds' ratios to none."""

    shape: str
    dtype: str
    kind: str
    wrapper: str
    adapters: int
    tokens_per_s: float
    cpu_s: float
    """Processor time of a run."""
    ratio: float
    lowest: float
    highest: float
    cpu_ratio: float
    """Processor time without an adapter by that with them."""


@dataclass(frozen=True)
class Run:
    """One run of all requests."""

    tokens_per_s: float
    cpu_s: float


class Engine:
    """An engine in a process of its own, which measures what it is asked for."""

    def __init__(self, setting: Setting, wrapper: str) -> None:
        """Blocks until the engine is up. Raises RuntimeError where it does not come up."""
        read, write = os.pipe()
        environment = dict(os.environ)
        if wrapper != WRAPPERS[0]:
            environment["VLLM_PLUGINS"] = ""
        command = [sys.executable, "-m", "benchmarks.lora_kernel", "--engine", json.dumps(asdict(setting)), str(write)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment,
                                         pass_fds=[write], text=True)
        os.close(write)
        self._answers: IO[str] = os.fdopen(read)
        self._read()

    def run(self, kind: str, adapters: int) -> Run:
        """One run of all requests."""
        stdin = cast(IO[str], self._process.stdin)
        stdin.write(json.dumps([kind, adapters]) + "\n")
        stdin.flush()
        return self._read()

    def close(self) -> None:
        cast(IO[str], self._process.stdin).close()
        self._process.wait(60)
        self._answers.close()

    def _read(self) -> Run:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the engine ended with {self._process.wait()}")
        return Run(*json.loads(line))


def serve(setting: Setting, answers: IO[str]) -> None:
    """The engine's process: reads `[kind, adapters]` a line, and writes a run a line; one of zeros when it is up."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from serve.vllm_executor import EXECUTOR_PATH

    llm = LLM(
        setting.base,
        skip_tokenizer_init=True,
        dtype=cast(Any, setting.dtype),
        max_model_len=2 * (PROMPT + OUTPUT),
        enable_lora=True,
        max_loras=max(COUNTS),
        max_cpu_loras=len(KINDS) * max(COUNTS),
        max_lora_rank=max(rank for _, rank in KINDS.values()),
        max_num_seqs=REQUESTS,
        block_size=32,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=True,
        distributed_executor_backend=EXECUTOR_PATH,
    )
    vocabulary = json.loads((Path(setting.base) / "config.json").read_text())["vocab_size"]
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocabulary, (REQUESTS, PROMPT), generator=rng).tolist()
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    loras = {
        kind: [
            LoRARequest(f"{kind} {i}", 1 + number * max(COUNTS) + i, str(Path(setting.adapters) / kind / str(i)))
            for i in range(max(COUNTS))
        ]
        for number, kind in enumerate(KINDS)
    }
    processes = psutil.Process().children(recursive=True)

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    print([0.0, 0.0], file=answers, flush=True)
    for line in sys.stdin:
        kind, count = json.loads(line)
        chosen = [loras[kind][i % count] for i in range(REQUESTS)] if count else None
        prompts: Any = [{"prompt_token_ids": ids} for ids in tokens]
        started, used = time.perf_counter(), cpu_s()
        llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        print([REQUESTS * OUTPUT / (time.perf_counter() - started), cpu_s() - used], file=answers, flush=True)


def make_wide(folder: Path) -> Path:
    """A random Llama of width 512 and 8 layers, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
                         tie_word_embeddings=True, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    return folder


def make_adapter(folder: Path, base: Path, modules: Sequence[str], rank: int, seed: int) -> None:
    """A random LoRA for the Llama in ``base``, in PEFT's format."""
    config = json.loads((base / "config.json").read_text())
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (width, query), "k_proj": (width, key), "v_proj": (width, key), "o_proj": (query, width),
              "gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            d_in, d_out = shapes[module]
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(rank, d_in, generator=rng)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(d_out, rank, generator=rng)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    card = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
            "target_modules": list(modules), "base_model_name_or_path": base.name}
    (folder / "adapter_config.json").write_text(json.dumps(card))


def measure(shape: str, setting: Setting, rounds: int) -> list[Row]:
    """Both engines in turns, `rounds` times over all kinds and numbers of adapters."""
    engines = {wrapper: Engine(setting, wrapper) for wrapper in WRAPPERS}
    rows = []
    try:
        for kind in KINDS:
            for engine in engines.values():
                # Fills the slots with this kind, and is not counted.
                engine.run(kind, max(COUNTS))
                engine.run(kind, 0)
            runs: dict[tuple[str, int], list[Run]] = {(w, n): [] for w in WRAPPERS for n in COUNTS}
            for _ in range(rounds):
                for count in COUNTS:
                    for wrapper, engine in engines.items():
                        runs[wrapper, count].append(engine.run(kind, count))
            for (wrapper, count), found in runs.items():
                pairs = list(zip(found, runs[wrapper, 0], strict=True))
                ratios = [run.tokens_per_s / base.tokens_per_s for run, base in pairs]
                rows.append(Row(shape, setting.dtype, kind, wrapper, count,
                                statistics.median(run.tokens_per_s for run in found),
                                statistics.median(run.cpu_s for run in found),
                                statistics.median(ratios), min(ratios), max(ratios),
                                statistics.median(base.cpu_s / run.cpu_s for run, base in pairs)))
                print(rows[-1], file=sys.stderr)
    finally:
        for engine in engines.values():
            engine.close()
    return rows


def report(rows: Sequence[Row], rounds: int, load: float) -> str:
    """The results as Markdown."""
    lines = [
        "# LoRA on CPU: our wrapper beside vLLM's own", "",
        f"{REQUESTS} requests of {PROMPT} prompt and {OUTPUT} output tokens at once through `vllm.LLM`, one thread for "
        f"the model. {machine()}. Medians of {rounds} rounds in which the engines took turns; in brackets the lowest "
        f"and the highest ratio of a round. Load of the machine during the run (5 minutes' average): {load:.1f}; above "
        "about 1.5, other work shared its cores, which moves tokens/s more than ratios.", "",
        "`python -m benchmarks.lora_kernel`", "",
        "Ratios are against the same engine without adapters in the request (LoRA enabled, all slots full): of "
        "tokens/s, and of the engine's processor time, which other work disturbs less. Goals for ours: "
        + ", ".join(f"{goal} with {count} adapters" for count, goal in GOALS.items()) + ".", ""]
    for shape, dtype, kind in dict.fromkeys((row.shape, row.dtype, row.kind) for row in rows):
        lines += [f"## {shape}, {dtype}, {kind}", "",
                  "| Adapters | Ours, tokens/s | Ratio | CPU ratio | vLLM's own, tokens/s | Ratio | CPU ratio | "
                  "Ours / vLLM's |",
                  "|---|---|---|---|---|---|---|---|"]
        found = {(row.wrapper, row.adapters): row for row in rows if (row.shape, row.dtype, row.kind)
                 == (shape, dtype, kind)}
        for count in COUNTS:
            a, b = found[WRAPPERS[0], count], found[WRAPPERS[1], count]
            lines.append(f"| {count or 'none'} | {_cells(a)} | {_cells(b)} | {a.tokens_per_s / b.tokens_per_s:.1f} |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: Row) -> str:
    return f"{row.tokens_per_s:.0f} | {row.ratio:.2f} ({row.lowest:.2f}-{row.highest:.2f}) | {row.cpu_ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=("nano", "wide"), default=["nano", "wide"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        setting, descriptor = options.engine
        serve(Setting(**json.loads(setting)), os.fdopen(int(descriptor), "w"))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = Path(scratch) / shape
            base = NANO if shape == "nano" else make_wide(folder / "base")
            for kind, (modules, rank) in KINDS.items():
                for i in range(max(COUNTS)):
                    make_adapter(folder / "adapters" / kind / str(i), base, modules, rank, i)
            for dtype in options.dtypes:
                rows += measure(shape, Setting(str(base), dtype, str(folder / "adapters")), options.rounds)
                # After each engine, so that a run that is cut short leaves what it has.
                load = os.getloadavg()[1]
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / "lora_kernel.md").write_text(report(rows, options.rounds, load))
                record = {"machine": machine(), "load": load, "rounds": options.rounds,
                          "rows": [asdict(row) for row in rows]}
                (options.output / "lora_kernel.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report(rows, options.rounds, load))


if __name__ == "__main__":
    main()
