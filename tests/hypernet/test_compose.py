"""Composed adapters are the weighted sum of their updates, in numbers and in PEFT's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hypernet.compose import compose
from hypernet.inject import module_path
from hypernet.lora import AdapterInvalid, LoraAdapter
from tests.hypernet.helpers import HIDDEN, LAYERS, deltas, random_lora

IDS = torch.arange(12)[None] + 30
CASES = range(25)


def drawn(seed: int) -> tuple[list[LoraAdapter], list[float]]:
    """One to five adapters of random ranks, scalings and modules, with weights of either sign."""
    rng = Random(seed)
    loras, weights = [], []
    for i in range(rng.randint(1, 5)):
        names = rng.choice([("down_proj",), ("q_proj",), ("down_proj", "q_proj")])
        lora = random_lora(100 * seed + i, rank=rng.randint(1, 9), alpha=rng.uniform(0.5, 20), names=names)
        if rng.random() < 0.3:  # one that leaves layers alone
            lora = replace(lora, tensors={p: f for p, f in lora.tensors.items() if ".0." in p})
        loras.append(lora)
        weights.append(rng.choice([1.0, -1.0, rng.uniform(-10, 10)]))
    return loras, weights


def summed(loras: list[LoraAdapter], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of the updates, in double precision."""
    total: dict[str, Tensor] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for path, (a, b) in lora.tensors.items():
            total[path] = total.get(path, 0) + weight * lora.alpha / lora.rank * (b.double() @ a.double())
    return total


@pytest.mark.parametrize("seed", CASES)
def test_the_update_is_the_sum_of_the_updates(seed: int) -> None:
    loras, weights = drawn(seed)
    composed = compose(loras, weights, max_rank=64)
    assert composed.rank == sum(lora.rank for lora in loras) == composed.alpha
    expected, found = summed(loras, weights), deltas(composed)
    assert found.keys() == expected.keys()
    for path, update in found.items():
        assert torch.allclose(update, expected[path].float(), rtol=1e-5, atol=1e-4), path


@pytest.mark.parametrize("seed", CASES)
def test_narrow_factors_are_summed_without_rounding(seed: int) -> None:
    loras, weights = drawn(seed)
    loras = [replace(one, tensors={p: (a.bfloat16(), b.bfloat16()) for p, (a, b) in one.tensors.items()})
             for one in loras]
    composed = compose(loras, weights, max_rank=64)
    expected = summed(loras, weights)
    for path, update in deltas(composed).items():
        assert torch.allclose(update, expected[path].float(), rtol=1e-5, atol=1e-4), path
    # An engine in bfloat16 rounds each factor once: each term of the product is off by 2^-8 at most, each way.
    for path, (a, b) in composed.tensors.items():
        rounded = b.bfloat16().double() @ a.bfloat16().double()
        bound = 2**-7 * (b.double().abs() @ a.double().abs()) + 1e-9
        assert ((rounded - expected[path]).abs() <= bound).all(), path


@torch.no_grad()
def test_peft_composes_and_computes_the_same(tmp_path: Path, pair: tuple[Path, Path], llama: LlamaForCausalLM) -> None:
    loras, weights = [random_lora(1), random_lora(2, rank=2, alpha=1.0)], [1.0, 0.5]
    for i, lora in enumerate(loras):
        lora.save(tmp_path / f"{i}")
    compose(loras, weights, max_rank=8).save(tmp_path / "composed")
    model = PeftModel.from_pretrained(base_of(pair), tmp_path / "0", adapter_name="0").eval()
    model.load_adapter(tmp_path / "1", adapter_name="1")
    model.add_weighted_adapter(["0", "1"], weights, "cat", combination_type="cat")
    model.set_adapter("cat")
    theirs = model(input_ids=IDS).logits
    ours = PeftModel.from_pretrained(base_of(pair), tmp_path / "composed").eval()(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (ours - llama(input_ids=IDS).logits).abs().max() > 0.1


@torch.no_grad()
def test_a_module_that_some_lack_runs_in_peft(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    both, one = random_lora(3), random_lora(4, rank=3, names=("down_proj",))
    composed = compose([both, one], [1.0, 2.0], max_rank=8)
    assert composed.target_modules == ("down_proj", "q_proj")
    composed.save(tmp_path)
    found = PeftModel.from_pretrained(base_of(pair), tmp_path).eval()(input_ids=IDS).logits
    merged = base_of(pair)
    for path, update in summed([both, one], [1.0, 2.0]).items():
        merged.get_submodule(path).weight += update.float()
    assert torch.allclose(found, merged(input_ids=IDS).logits, atol=1e-4)


def test_one_adapter_with_a_weight() -> None:
    lora = random_lora(5)
    for path, update in deltas(compose([lora], [-0.5], max_rank=4)).items():
        assert torch.allclose(update, -0.5 * deltas(lora)[path], atol=1e-6)


def test_ranks_past_the_cap_are_refused() -> None:
    loras = [random_lora(seed, rank=4) for seed in range(3)]
    assert compose(loras, [1.0] * 3, max_rank=12).rank == 12
    with pytest.raises(AdapterInvalid, match=r"4 \+ 4 \+ 4 = 12; at most 11 is allowed"):
        compose(loras, [1.0] * 3, max_rank=11)


def test_adapters_of_different_bases_are_refused() -> None:
    path = module_path(LAYERS - 1, "down_proj")
    other = random_lora(6)
    wide = replace(other, tensors={**other.tensors, path: (torch.zeros(4, 7), torch.zeros(HIDDEN, 4))})
    with pytest.raises(AdapterInvalid, match=path):
        compose([random_lora(7), wide], [1.0, 1.0], max_rank=8)


@pytest.mark.parametrize("weights", [[], [1.0, 1.0]])
def test_one_weight_for_each_adapter(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="one weight for each"):
        compose([random_lora(8)] if weights else [], weights, max_rank=8)


def base_of(pair: tuple[Path, Path]) -> LlamaForCausalLM:
    """The tiny base anew, for PEFT to change."""
    return AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32, attn_implementation="eager")
