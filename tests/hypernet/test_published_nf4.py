"""NF4 rounding against what bitsandbytes gave for the same weight (tests/data/published/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hypernet.published.activations import ActivationReader
from hypernet.published.folder import PER_LAYER, Reading
from hypernet.published.nf4 import round_linears, round_to_nf4
from tests.hypernet.published_helpers import LAYERS, write_base

GOLD = Path(__file__).parent.parent / "data" / "published" / "nf4.safetensors"


def test_rounding_is_that_of_bitsandbytes() -> None:
    weight = torch.from_numpy((np.random.RandomState(7).standard_normal((160, 128)) * 0.05).astype(np.float32))
    found, wanted = round_to_nf4(weight), load_file(GOLD)["weight"]
    assert float((found - wanted).abs().max()) < 1e-6
    assert float((weight - wanted).abs().max()) > 0.01  # it does round


def test_odd_sizes_zeros_and_types() -> None:
    weight = torch.linspace(-2, 3, 35).view(5, 7)
    assert float((round_to_nf4(weight) - weight).abs().max()) < 0.6  # half the widest gap of 0.304, times 3, and scales
    assert torch.equal(round_to_nf4(torch.zeros(3, 64)), torch.zeros(3, 64))
    assert round_to_nf4(weight.bfloat16()).dtype == torch.bfloat16


def test_a_quantised_base_is_read_without_touching_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_base(tmp_path, "mistral"), dtype=torch.float32).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.arange(1, 13)[None]
    mask = torch.ones_like(ids).bool()
    plain = ActivationReader(model, Reading(PER_LAYER, LAYERS - 1)).read(ids, mask)
    rounded = ActivationReader(model, Reading(PER_LAYER, LAYERS - 1, quantized=True)).read(ids, mask)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(plain[0], rounded[0])  # embeddings are not quantised
    assert float((plain[-1] - rounded[-1]).abs().max()) > 1e-3
    round_linears(model.model.layers)
    whole = ActivationReader(model, Reading(PER_LAYER, LAYERS - 1)).read(ids, mask)
    assert all(torch.equal(one, other) for one, other in zip(whole, rounded, strict=True))
