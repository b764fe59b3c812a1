"""A LoRA adapter as tensors, and as the folder that PEFT and vLLM load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from hypernet.inject import LAYERS, NESTED_LAYERS, module_path, split_path
from hypernet.perceiver import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
MAX_NORM = 1e4
"""Frobenius norm above which a factor is taken for garbage."""


class AdapterInvalid(ValueError):
    """The adapter cannot be served; the message names the file or tensor, what is wrong and what is allowed."""


@dataclass(frozen=True)
class LoraAdapter:
    """Factors by module path ("model.layers.0.mlp.down_proj"): A `[r, d_in]`, B `[d_out, r]`, float32.

    The weight's update is `alpha / rank * B @ A`. `base_model` names the base for people; fingerprints tell machines.
    """

    rank: int
    alpha: float
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    base_model: str = ""

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last names of the modules, sorted: ("down_proj",)."""
        return tuple(sorted({path.rsplit(".", 1)[-1] for path in self.tensors}))

    def placed(self, layers: str) -> LoraAdapter:
        """The same factors for a base that keeps its layers at the path `layers` (see `hypernet.inject.layers_path`).

        Raises ValueError where a path is none of a decoder's module.
        """
        moved = {}
        for path, pair in self.tensors.items():
            _, layer, name = split_path(path)
            moved[module_path(layer, name, layers)] = pair
        return replace(self, tensors=moved)

    def save(self, folder: Path) -> None:
        """Write the two files that `peft.PeftModel.from_pretrained` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        flat: dict[str, Tensor] = {}
        for path, (a, b) in self.tensors.items():
            flat[f"{_PREFIX}{path}.lora_A.weight"] = a.contiguous()
            flat[f"{_PREFIX}{path}.lora_B.weight"] = b.contiguous()
        save_file(flat, folder / WEIGHTS)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": self._peft_targets(), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "base_model_name_or_path": self.base_model, "use_rslora": False,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def _peft_targets(self) -> list[str]:
        """Last names, as people expect them; whole paths where a vision tower has modules of the same names."""
        nested = any(path.startswith(f"{NESTED_LAYERS}.") for path in self.tensors)
        return sorted(self.tensors) if nested else list(self.target_modules)

    @staticmethod
    def load(folder: Path) -> LoraAdapter:
        """Read a PEFT folder. Raises AdapterInvalid where a file is missing, malformed or incomplete."""
        try:
            config = json.loads((folder / CONFIG).read_text())
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            base_model = str(config.get("base_model_name_or_path") or "")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise AdapterInvalid(f"{CONFIG}: cannot be read as a PEFT LoRA configuration: {error}") from error
        halves: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(folder / WEIGHTS, "pt") as file:
                for key in file.keys():
                    path, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
                    halves.setdefault(path, {})[part] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise AdapterInvalid(f"{WEIGHTS}: cannot be read as safetensors: {error}") from error
        for path, parts in halves.items():
            if set(parts) != {"lora_A", "lora_B"}:
                raise AdapterInvalid(f"{WEIGHTS}: {path} has {sorted(parts)}; exactly lora_A and lora_B are allowed")
        return LoraAdapter(rank, alpha, {p: (v["lora_A"], v["lora_B"]) for p, v in halves.items()}, base_model)


def concatenate(adapters: list[LoraAdapter]) -> LoraAdapter:
    """One adapter whose update is the sum of the given ones' updates; ranks add up. All must have the same modules."""
    first = adapters[0]
    tensors = {}
    for path in first.tensors:
        a = torch.cat([adapter.tensors[path][0] for adapter in adapters], dim=0)
        b = torch.cat([adapter.tensors[path][1] * (adapter.alpha / adapter.rank) for adapter in adapters], dim=1)
        tensors[path] = (a, b)
    rank = sum(adapter.rank for adapter in adapters)
    return LoraAdapter(rank, float(rank), tensors, first.base_model)


def factors_of(adapters: Sequence[LoraAdapter]) -> Factors:
    """The adapters as rows of a batch for `hypernet.inject.adapted`: A `[B, L, r, d_in]`, B `[B, L, r, d_out]`.

    alpha is folded into B; those of lower rank, and modules that only others have, are filled with zeros.
    """
    rank = max(adapter.rank for adapter in adapters)
    layers = 1 + max(split_path(path)[1] for adapter in adapters for path in adapter.tensors)
    found: Factors = {}
    for i, adapter in enumerate(adapters):
        for path, (a, b) in sorted(adapter.tensors.items()):
            _, layer, name = split_path(path)
            if name not in found:
                found[name] = (torch.zeros(len(adapters), layers, rank, a.size(1)),
                               torch.zeros(len(adapters), layers, rank, b.size(0)))
            found[name][0][i, layer, :adapter.rank] = a
            found[name][1][i, layer, :adapter.rank] = b.mT * (adapter.alpha / adapter.rank)
    return found


def _widths(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of each module name that may carry a LoRA. `config` is that of the text decoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    queries, keys = config.num_attention_heads * head, groups * head
    return {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys),
            "o_proj": (queries, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
            "down_proj": (inner, hidden)}


def validate_folder(folder: Path, base: PretrainedConfig, max_rank: int) -> LoraAdapter:
    """Load and check a PEFT folder against the base: modules, shapes, rank, finiteness, norms.

    Raises AdapterInvalid with the tensor's name, what it has and what is allowed.
    """
    adapter = LoraAdapter.load(folder)
    if not 1 <= adapter.rank <= max_rank:
        raise AdapterInvalid(f"r: is {adapter.rank}; 1 to {max_rank} is allowed")
    if not math.isfinite(adapter.alpha):
        raise AdapterInvalid(f"lora_alpha: is {adapter.alpha}; a finite number is needed")
    if not adapter.tensors:
        raise AdapterInvalid(f"{WEIGHTS}: holds no LoRA tensors")
    text = base.get_text_config(decoder=True)
    layers, widths = LAYERS if text is base else NESTED_LAYERS, _widths(text)
    for path, (a, b) in adapter.tensors.items():
        try:
            place, layer, name = split_path(path)
        except ValueError:
            place, layer, name = "", -1, ""
        if place != layers or not 0 <= layer < text.num_hidden_layers:
            raise AdapterInvalid(f"{path}: is no module of the base that can carry a LoRA; {sorted(widths)} in "
                                 f"layers 0 to {text.num_hidden_layers - 1} are allowed, below {layers}")
        d_in, d_out = widths[name]
        if tuple(a.shape) != (adapter.rank, d_in) or tuple(b.shape) != (d_out, adapter.rank):
            raise AdapterInvalid(f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)}; the base needs "
                                 f"{(adapter.rank, d_in)} and {(d_out, adapter.rank)}")
        for label, tensor in (("lora_A", a), ("lora_B", b)):
            if not torch.isfinite(tensor).all():
                raise AdapterInvalid(f"{path}.{label}: holds values that are not finite")
            if float(tensor.float().norm()) > MAX_NORM:
                raise AdapterInvalid(f"{path}.{label}: has a norm above {MAX_NORM:g}")
    return adapter
