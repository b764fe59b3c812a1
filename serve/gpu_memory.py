"""What engine and generator take of a GPU's memory, reckoned from the configuration and the models' shapes.

Weights, KV cache, LoRA slots and copies are exact; the peaks while something runs follow from shapes, with factors that
were read off the code; overheads are estimates. docs/gpu.md has the formulas and says what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve.config import ImprintConfig

Owner = Literal["engine", "generator"]
GIB = 2**30
TYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "auto": 2}
GENERATOR_BYTES = 2
"""The generator's base is in bfloat16 where it runs on a GPU."""
ATTENTION_BYTES = 8
"""Eager attention holds its scores in the base's type, once in float32, and once again in the base's type."""
ENGINE_OVERHEAD_GIB = 1.5
"""CUDA context, kernels, graphs."""
GENERATOR_OVERHEAD_GIB = 0.8
DEFAULT_BATCHED_TOKENS = 8192
"""What vLLM may put into one step on large cards where nothing is configured."""
DEFAULT_UTILIZATION = 0.92
"""vLLM's own default of gpu_memory_utilization."""
ANSWER_TOKENS = 33
_REFINE_TOKENS = 64
"""Tokens of one question with its answer, in a refining step."""


class Unreckonable(ValueError):
    """The arithmetic cannot be done; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Term:
    """One use of GPU memory by one replica."""

    owner: Owner
    name: str
    bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class BaseShape:
    """Sizes of a base: `parameters` of all, `layer` of one decoder layer, `modules` the sum of the LoRA targets' input
    and output widths in one layer by module name."""

    parameters: int
    layer: int
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    modules: dict[str, int]

    @staticmethod
    def of(base: str | Path) -> BaseShape:
        """Read from the configuration in a folder, or of a name in the local cache; no weights are needed.

        Raises Unreckonable.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from hypernet.inject import MODULE_PARENTS, layers_path, targets_of

        try:
            config = AutoConfig.from_pretrained(base, local_files_only=True)
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)
                layers: Any = model.get_submodule(layers_path(model))
            targets = targets_of(model, tuple(MODULE_PARENTS))
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise Unreckonable(f"base.model: the shape of {base} cannot be read: {error}") from error
        text: Any = config.get_text_config(decoder=True)
        return BaseShape(
            parameters=sum(p.numel() for p in model.parameters()),
            layer=sum(p.numel() for p in layers[0].parameters()),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=text.intermediate_size,
            heads=text.num_attention_heads,
            key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            modules={target.name: target.d_in + target.d_out for target in targets},
        )

    @property
    def kv_bytes(self) -> int:
        """Numbers that one token leaves in the KV cache; times the type's bytes."""
        return 2 * self.layers * self.key_heads * self.head


def engine_terms(config: ImprintConfig, base: BaseShape) -> list[Term]:
    """What one engine replica takes. Raises Unreckonable."""
    engine, extra = config.engine, config.engine.extra
    if int(extra.get("tensor_parallel_size") or 1) > 1:
        raise Unreckonable("engine.extra.tensor_parallel_size: only engines on one GPU each are reckoned")
    if engine.dtype not in TYPE_BYTES:
        raise Unreckonable(f"engine.dtype: is {engine.dtype!r}; {', '.join(TYPE_BYTES)} are reckoned")
    size = TYPE_BYTES[engine.dtype]
    names = extra.get("lora_target_modules") or list(base.modules)
    width = sum(total for name, total in base.modules.items() if name in names)
    slots = engine.max_loras * base.layers * engine.max_lora_rank * width * size
    tokens = int(extra.get("max_num_batched_tokens") or max(DEFAULT_BATCHED_TOKENS, engine.max_model_len))
    step = tokens * (3 * base.inner + 4 * base.hidden) * size
    logits = engine.max_num_seqs * base.vocabulary * 4 * 3
    held = (engine.kv_cache_gib * GIB) // (base.kv_bytes * size)
    return [
        Term("engine", "weights", base.parameters * size, f"{base.parameters:,} parameters x {size} bytes"),
        Term("engine", "KV cache", engine.kv_cache_gib * GIB, f"engine.kv_cache_gib; holds {held:,} tokens"),
        Term("engine", "LoRA slots", slots, f"{engine.max_loras} slots x {base.layers} layers x rank "
             f"{engine.max_lora_rank} x {width:,} x {size} bytes"),
        Term("engine", "one step", step + logits, f"{tokens:,} tokens, and logits of {engine.max_num_seqs} answers "
             f"over {base.vocabulary:,} words"),
        Term("engine", "overhead", int(ENGINE_OVERHEAD_GIB * GIB), "CUDA context, kernels and graphs: an estimate"),
    ]


def generator_terms(config: ImprintConfig, base: BaseShape) -> list[Term]:
    """What one generator replica takes, empty where its hypernetwork runs on the CPU. Raises Unreckonable."""
    from hypernet.published.errors import CheckpointInvalid
    from hypernet.published.folder import DOC_TO_LORA, format_of, load_doc_to_lora_config

    settings, size = config.generator, GENERATOR_BYTES
    if settings.kind != "hypernet":
        return []
    checkpoint = config.checkpoint_path()
    try:
        if format_of(checkpoint) != DOC_TO_LORA:
            return []
        network = load_doc_to_lora_config(checkpoint)
        numbers = _numbers(checkpoint)
    except (OSError, CheckpointInvalid) as error:
        raise Unreckonable(f"generator.checkpoint: {error}") from error
    from hypernet.generate import BATCH_TOKENS

    reading = network.reading
    longest = min(reading.max_tokens, int(1.5 * reading.chunk_tokens))
    tokens = max(BATCH_TOKENS, longest)
    attention = base.heads * tokens * longest * ATTENTION_BYTES
    hidden = (reading.layers + 1) * tokens * base.hidden * size
    projection = tokens * (3 * network.sizes.projection + base.hidden) * 4
    peaks = {"reading a batch": attention + hidden + projection}
    if settings.gate.enabled:
        rows = settings.gate.probes
        peaks["the gate"] = (rows * base.heads * longest**2 * ATTENTION_BYTES
                             + rows * ANSWER_TOKENS * base.vocabulary * 4 * 2)
    if settings.refine.enabled:
        rows = max(8, settings.gate.probes) * _REFINE_TOKENS
        # What one layer keeps for the way back, and logits with their gradient in float32.
        peaks["refining"] = (rows * base.layers * (16 * base.hidden + 6 * base.inner) * size
                             + rows * base.vocabulary * 4 * 3)
    name = max(peaks, key=peaks.__getitem__)
    found = [Term("generator", "weights", base.parameters * size, f"{base.parameters:,} parameters x {size} bytes")]
    if reading.quantized:
        count = max(1, reading.layers)
        found.append(Term("generator", "rounded copy", count * base.layer * size,
                          f"{count} layers as in NF4 x {base.layer:,} parameters x {size} bytes"))
    return [*found,
            Term("generator", "hypernetwork", numbers * 4, f"{numbers:,} parameters x 4 bytes"),
            Term("generator", "peak", peaks[name], f"{name}: the largest of {', '.join(peaks)}"),
            Term("generator", "overhead", int(GENERATOR_OVERHEAD_GIB * GIB), "CUDA context and kernels: an estimate")]


@dataclass(frozen=True, slots=True)
class Plan:
    """Terms of one engine and one generator replica, and what meets on one GPU, in bytes."""

    terms: tuple[Term, ...]
    on_one_gpu: int
    others: int

    def of(self, owner: Owner) -> int:
        """What one replica takes."""
        return sum(term.bytes for term in self.terms if term.owner == owner)


def plan(config: ImprintConfig, gpus: int) -> Plan:
    """Reckon the configuration for so many GPUs, at least 1. Raises Unreckonable."""
    base = BaseShape.of(config.base_path())
    terms = (*engine_terms(config, base), *generator_terms(config, base))
    sums: dict[Owner, int] = {owner: sum(term.bytes for term in terms if term.owner == owner)
                              for owner in ("engine", "generator")}
    engines = [sums["engine"]] * config.engine.most_replicas_per_node
    generators = [sums["generator"]] * config.generator.num_replicas if sums["generator"] else []
    together = math.ceil((len(engines) + len(generators)) / gpus)
    on_one = sum(sorted(engines + generators, reverse=True)[:together])
    others = 0 if together == 1 else sum(sorted([*generators, *engines[1:]], reverse=True)[:together - 1])
    return Plan(terms, on_one, others)


def utilization(config: ImprintConfig) -> float:
    """vLLM's `gpu_memory_utilization` as configured. Raises Unreckonable where it is no share."""
    value = config.engine.extra.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise Unreckonable(f"engine.extra.gpu_memory_utilization: is {value!r}; a number above 0, at most 1, is needed")
    return float(value)


def _numbers(checkpoint: Path) -> int:
    """How many numbers a converted checkpoint holds, read from its header."""
    from safetensors import SafetensorError, safe_open

    from hypernet.published.errors import CheckpointInvalid
    from hypernet.published.folder import WEIGHTS

    try:
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{checkpoint / WEIGHTS}: cannot be read as safetensors: {error}") from error
