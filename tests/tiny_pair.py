"""A tiny random base with a random hypernetwork for it: real formats and code paths, no training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypernet.fingerprint import fingerprint_folder
from hypernet.perceiver import HypernetConfig, Hypernetwork, Target
from tests.tiny_models import make_base


def make_pair(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Writes both below `folder` and returns the folders of base and hypernetwork."""
    base = make_base(folder / "base", seed, max_length=2048)
    # The hypernetwork reads documents behind this token.
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    torch.manual_seed(seed)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    config = HypernetConfig(
        features=(layers + 1) * width,
        layers=layers,
        targets=(Target("down_proj", model.config.intermediate_size, width),),
        rank=8,
        width=64,
        heads=2,
        max_tokens=512,
        chunk_tokens=256,
        base_fingerprint=fingerprint_folder(base),
    )
    Hypernetwork(config).save(folder / "hypernetwork")
    return base, folder / "hypernetwork"
