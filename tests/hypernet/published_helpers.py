"""Random checkpoints in the exact form of the published ones, and tiny bases of the architectures they were made for.

Every tensor is a function of its key alone, from numpy's frozen `RandomState`. So upstream's code, run elsewhere on
the same weights, gave the outputs in tests/data/published (see its README), and the weights need not be stored.
"""

from __future__ import annotations

import json
import string
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft  # noqa: F401 (pickle wants the packages around a class to be imported)
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, BertTokenizerFast

Shapes = Mapping[str, tuple[int, ...]]

LAYERS, HIDDEN, INNER, HEADS, KEY_HEADS, HEAD = 3, 32, 48, 4, 2, 8
WIDTHS = {"q_proj": (HIDDEN, HEADS * HEAD), "k_proj": (HIDDEN, KEY_HEADS * HEAD), "v_proj": (HIDDEN, KEY_HEADS * HEAD),
          "o_proj": (HEADS * HEAD, HIDDEN), "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER),
          "down_proj": (INNER, HIDDEN)}

_COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": HEAD, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
    "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256,
}
BASES: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 8,
               "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
               "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None,
                "hidden_act": "silu"},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False,
              "sliding_window": None, "hidden_act": "silu", "attention_bias": False},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False,
              "sliding_window": None, "hidden_act": "silu"},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
              "attention_bias": False, "mlp_bias": False},
    "gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 8,
               "sliding_window_pattern": 2, "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh",
               "rope_local_base_freq": 10000.0, "attention_bias": False},
}


def fill(shapes: Shapes) -> dict[str, Tensor]:
    """A random float32 tensor for each key, the same on every machine: norms about 0.8, matrices by their width."""
    found = {}
    for key, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        values = 0.8 + 0.1 * values if len(shape) == 1 else values * (1.5 / shape[-1] ** 0.5)
        found[key] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return found


def write_base(folder: Path, name: str) -> Path:
    """A base of one of the architectures in `BASES`: configuration and weights, no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_COMMON | BASES[name], indent=2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    save_file(fill(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_encoder(folder: Path, width: int = 24, positions: int = 64, seed: int = 0) -> Path:
    """A random BERT as a text encoder, with a tokenizer that knows letters, digits and a few marks."""
    torch.manual_seed(seed)
    letters = [*string.ascii_lowercase, *string.digits]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters, *(f"##{c}" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=positions)
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=positions, initializer_range=0.3)
              ).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Shape:
    """The sizes of a Doc-to-LoRA hypernetwork. `blocks` says of each encoder layer whether it is a cross-attention.

    `layers`, `hidden` and `widths` (of each module, in and out) are those of the base.
    """

    modules: tuple[str, ...] = ("down_proj",)
    latent: int = 16
    latents: int = 8
    rank: int = 4
    blocks: tuple[bool, ...] = (True, True)
    residual_blocks: int = 1
    per_layer_activations: bool = True
    per_layer_processing: bool = True
    layers: int = LAYERS
    hidden: int = HIDDEN
    widths: Mapping[str, tuple[int, int]] = field(default_factory=lambda: WIDTHS)


def doc_to_lora_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the tensors in a Doc-to-LoRA checkpoint."""
    width, count, rank, layers, hidden = shape.latent, len(shape.modules), shape.rank, shape.layers, shape.hidden
    found: dict[str, tuple[int, ...]] = {}
    front = "aggregator.perceiver"
    for name, sizes in (("gate_proj", (4 * hidden, hidden)), ("up_proj", (4 * hidden, hidden)),
                        ("down_proj", (width, 4 * hidden))):
        found[f"{front}.modality_projection.{name}.weight"] = sizes
    queries = count * rank * (1 if shape.per_layer_activations else layers)
    for part, rows, blocks in (("encoder", shape.latents, shape.blocks), ("decoder", queries, (True,))):
        found[f"{front}.{part}.latents_q"] = (rows, width)
        for i, crosses in enumerate(blocks):
            layer = f"{front}.{part}.layers.{i}"
            norms = ["input_latents", "post_attention", "pre_ff", "post_ff", *(["input_context"] if crosses else [])]
            found |= {f"{layer}.{name}_layernorm.weight": (width,) for name in norms}
            found |= {f"{layer}.self_attn.{name}_proj.weight": (rows, width)
                      for name, rows in (("q", 2048), ("k", 512), ("v", 512))}
            found[f"{layer}.self_attn.o_proj.weight"] = (width, 2048)
            found |= {f"{layer}.mlp.{name}_proj.weight": (4 * width, width) for name in ("gate", "up")}
            found[f"{layer}.mlp.down_proj.weight"] = (width, 4 * width)
        found[f"{front}.{part}.layernorm.weight"] = (width,)
    for i in range(shape.residual_blocks):
        if shape.per_layer_processing:
            block = f"layers.{i}.layers"
            found |= {f"{block}.1.weight": (layers, width, 4 * width), f"{block}.1.bias": (1, layers, 1, 1, 4 * width),
                      f"{block}.3.weight": (layers, 4 * width, width), f"{block}.3.bias": (1, layers, 1, 1, width)}
            first, last = f"{block}.0", f"{block}.4"
        else:
            block = f"layers.{i}.mlp"
            found |= {f"{block}.2.weight": (4 * width, width), f"{block}.2.bias": (4 * width,),
                      f"{block}.5.weight": (width, 4 * width), f"{block}.5.bias": (width,)}
            first, last = f"{block}.0", f"{block}.6"
        found |= {f"{norm}.{kind}": (width,) for norm in (first, last) for kind in ("weight", "bias")}
    for module in shape.modules:
        d_in, d_out = shape.widths[module]
        found |= {f"bias_A.{module}": (layers, rank, d_in), f"bias_B.{module}": (layers, rank, d_out),
                  f"scaler_A.{module}": (1, layers, rank, 1), f"scaler_B.{module}": (1, layers, rank, 1)}
    both = max(sum(shape.widths[module]) for module in shape.modules)
    found["head.weight"] = (layers, width, both) if count == 1 else (layers, count, width, both)
    return found


def text_to_lora_shapes(modules: tuple[str, ...] = ("v_proj", "q_proj"), latent: int = 16, embedding: int = 24,
                        head_in: int = 20, rank: int = 4, head_bias: bool = True, layers: int = LAYERS,
                        widths: Mapping[str, tuple[int, int]] = WIDTHS) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the tensors in a Text-to-LoRA checkpoint; the heads stand in the order of `modules`.

    `layers` and `widths` (of each module, in and out) are those of the base.
    """
    half, quarter = latent // 2, latent // 4
    found: dict[str, tuple[int, ...]] = {}
    for kind in ("AB_offset", "mean_recon_target", "std_recon_target"):
        found |= {f"{kind}.A.{name}": (layers, rank, widths[name][0]) for name in modules}
        found |= {f"{kind}.B.{name}": (layers, widths[name][1], rank) for name in modules}

    def linear(key: str, d_in: int, d_out: int) -> None:
        found[f"{key}.weight"], found[f"{key}.bias"] = (d_out, d_in), (d_out,)

    def norm(key: str, width: int) -> None:
        found[f"{key}.weight"], found[f"{key}.bias"] = (width,), (width,)

    linear("task_encoder.mlp.0", embedding, half)
    norm("task_encoder.mlp.1", half)
    for key, rows in (("layer_depth_encoder", layers), ("layer_type_encoder", len(modules))):
        found[f"{key}.0.weight"] = (rows, quarter)
        norm(f"{key}.1", quarter)
    linear("mixer.1", latent, 4 * latent)
    linear("mixer.4", 4 * latent, latent)
    for key in ("mlp1.mlp", "mlp2.mlp"):
        norm(f"{key}.0", latent)
        linear(f"{key}.1", latent, 4 * latent)
        linear(f"{key}.4", 4 * latent, latent)
    norm("mlp3.0", latent)
    linear("mlp3.1", latent, 4 * latent)
    linear("mlp3.4", 4 * latent, head_in)
    for name in modules:
        linear(f"heads.{name}", head_in, rank * sum(widths[name]))
        if not head_bias:
            del found[f"heads.{name}.bias"]
    return found


@dataclass
class HypernetConfig:
    """Has the name and the place that upstream's class has in a pickle."""

    lora_config: Any
    layer_indices: Tensor
    feature_sizes: tuple[dict[str, int], dict[str, int]]
    aggregator_config: Any
    latent_size: int = 99999  # wrong on purpose: sizes are to come from the tensors
    num_pre_head_layers: int = 99999
    use_bias: bool = True
    per_rank_gen: bool = True


@dataclass
class AggregatorConfig:
    """As HypernetConfig."""

    num_blocks: int = 99999
    n_latent_queries: int = 99999
    pooling_type: str = "mean"


@dataclass
class CtxEncoderArguments:
    """As HypernetConfig."""

    ctx_encoder_model_name_or_path: str | None = None
    ctx_encoder_type: str = "per_layer_activations"
    layer_idx: int | None = None
    quantize_ctx_encoder: bool = False
    ctx_encoder_last_layer: int | None = None


class PeftType(str, Enum):  # noqa: UP042 (upstream's is one of these)
    """As HypernetConfig."""

    LORA = "LORA"


@dataclass
class LoraConfig:
    """As HypernetConfig."""

    r: int
    lora_alpha: float
    target_modules: set[str]
    peft_type: PeftType = PeftType.LORA
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)


_PLACES: dict[str, tuple[type, ...]] = {
    "ctx_to_lora.modeling.hypernet": (HypernetConfig,),
    "ctx_to_lora.modeling.aggregator": (AggregatorConfig,),
    "ctx_to_lora.configs": (CtxEncoderArguments,),
    "peft.utils.peft_types": (PeftType,),
    "peft.tuners.lora.config": (LoraConfig,),
}


@contextmanager
def upstream_modules() -> Iterator[None]:
    """Within the context the stand-ins pickle under upstream's names."""
    # pickle imports the packages around a class too; those of PEFT are there.
    packages = ["ctx_to_lora", "ctx_to_lora.modeling"]
    before = {name: sys.modules.get(name) for name in [*packages, *_PLACES]}
    homes = {cls: cls.__module__ for classes in _PLACES.values() for cls in classes}
    for name in before:
        sys.modules[name] = ModuleType(name)
    for name, classes in _PLACES.items():
        for cls in classes:
            setattr(sys.modules[name], cls.__name__, cls)
            cls.__module__ = name
    try:
        yield
    finally:
        for cls, home in homes.items():
            cls.__module__ = home
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def save_doc_to_lora(file: Path, shape: Shape, tensors: Mapping[str, Tensor] | None = None,
                     base_name: str = "example/tiny", prefix: str = "", **encoder: Any) -> Path:
    """Write a `pytorch_model.bin`; `encoder` are fields of CtxEncoderArguments, `prefix` stands before each key."""
    tensors = fill(doc_to_lora_shapes(shape)) if tensors is None else tensors
    lora = LoraConfig(shape.rank, 2 * shape.rank ** 1.5, set(shape.modules))
    sizes = tuple({module: shape.widths[module][side] for module in shape.modules} for side in (0, 1))
    arguments = CtxEncoderArguments(**encoder)
    if not shape.per_layer_activations and "ctx_encoder_type" not in encoder:
        arguments.ctx_encoder_type = "early_exit"
    config = HypernetConfig(lora, torch.arange(shape.layers), (sizes[0], sizes[1]), AggregatorConfig())
    file.parent.mkdir(parents=True, exist_ok=True)
    with upstream_modules():
        torch.save({prefix + key: value for key, value in tensors.items()} | {
            "base_model_name_or_path": base_name, "hypernet_config": config, "ctx_encoder_args": arguments}, file)
    return file


def save_text_to_lora(folder: Path, shapes: Shapes | None = None, base_name: str = "example/tiny",
                      **arguments: Any) -> Path:
    """Write `hypermod.pt`, `args.yaml` and `adapter_config.json`; `arguments` go to args.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(fill(text_to_lora_shapes() if shapes is None else shapes), folder / "hypermod.pt")
    fields = {"training_task": "sft", "emb_model": "Alibaba-NLP/gte-large-en-v1.5", "model_dir": base_name} | arguments
    (folder / "args.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "base_model_name_or_path": base_name,
        "target_modules": ["q_proj", "v_proj"]}))
    return folder
