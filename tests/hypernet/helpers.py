"""Tiny random models of nano's own classes, and arithmetic on adapters that several tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import module_path, targets_of
from hypernet.lora import LoraAdapter
from hypernet.perceiver import HypernetConfig, Hypernetwork
from hypernet.training.base import base_config

LAYERS, HIDDEN, INNER = 2, 64, 96


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Nano's configuration in a smaller size, with weights large enough for prompts to matter."""
    small = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
             "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.15}
    return LlamaConfig.from_dict(base_config(tokenizer).to_dict() | small)


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A random base, in evaluation mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(tiny_config(tokenizer), attn_implementation="eager").eval()


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write the base as training does."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def tiny_network(model: LlamaForCausalLM, base: Path, seed: int = 0) -> Hypernetwork:
    """A random hypernetwork of rank 4 for two kinds of modules; it reads about 40 tokens at once."""
    torch.manual_seed(seed)
    return Hypernetwork(HypernetConfig(
        features=(LAYERS + 1) * HIDDEN, layers=LAYERS, targets=targets_of(model, ("down_proj", "q_proj")), rank=4,
        width=32, heads=2, max_tokens=96, chunk_tokens=40, base_fingerprint=fingerprint_folder(base))).eval()


def random_lora(seed: int, rank: int = 4, alpha: float = 6.0, names: tuple[str, ...] = ("down_proj", "q_proj"),
                strength: float = 0.3) -> LoraAdapter:
    """Random factors for every layer of the tiny base."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"down_proj": (INNER, HIDDEN), "q_proj": (HIDDEN, HIDDEN)}
    tensors = {}
    for layer in range(LAYERS):
        for name in names:
            d_in, d_out = widths[name]
            tensors[module_path(layer, name)] = (torch.randn(rank, d_in, generator=generator) * strength,
                                                 torch.randn(d_out, rank, generator=generator) * strength)
    return LoraAdapter(rank, alpha, tensors, "tiny")


def deltas(lora: LoraAdapter) -> dict[str, Tensor]:
    """The update of each weight, `[d_out, d_in]`."""
    return {path: lora.alpha / lora.rank * b @ a for path, (a, b) in lora.tensors.items()}
