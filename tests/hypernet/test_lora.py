"""Adapters as files: what torch computes, PEFT computes from the folder; joined adapters add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hypernet.inject import MODULE_PARENTS, adapted, module_path, targets_of
from hypernet.lora import CONFIG, WEIGHTS, LoraAdapter, concatenate, factors_of, validate_folder
from hypernet.perceiver import concatenate_ranks
from tests.hypernet.helpers import HIDDEN, INNER, LAYERS, deltas, random_lora

IDS = torch.arange(24).view(2, 12) + 30


def test_save_and_load(tmp_path: Path) -> None:
    lora = random_lora(1)
    lora.save(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]
    again = LoraAdapter.load(tmp_path / "adapter")
    assert (again.rank, again.alpha, again.base_model) == (4, 6.0, "tiny")
    assert again.target_modules == lora.target_modules == ("down_proj", "q_proj")
    assert again.tensors.keys() == lora.tensors.keys()
    for path, (a, b) in lora.tensors.items():
        assert torch.equal(again.tensors[path][0], a) and torch.equal(again.tensors[path][1], b)


@pytest.mark.parametrize("names", [("down_proj",), ("down_proj", "q_proj")])
@torch.no_grad()
def test_peft_computes_what_adapted_computes(tmp_path: Path, pair: tuple[Path, Path], llama: LlamaForCausalLM,
                                             names: tuple[str, ...]) -> None:
    lora = random_lora(2, names=names)
    lora.save(tmp_path)
    with adapted(llama, factors_of([lora])):
        ours = llama(input_ids=IDS[:1]).logits
    base = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=IDS[:1]).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - llama(input_ids=IDS[:1]).logits).abs().max() > 0.1


@torch.no_grad()
def test_each_row_has_its_own_adapter_and_none_stays(llama: LlamaForCausalLM) -> None:
    loras = [random_lora(3), random_lora(4, rank=2)]
    before = llama(input_ids=IDS).logits
    with adapted(llama, factors_of(loras)):
        together = llama(input_ids=IDS).logits
    for i, lora in enumerate(loras):
        with adapted(llama, factors_of([lora])):
            assert torch.allclose(llama(input_ids=IDS[i:i + 1]).logits[0], together[i], atol=1e-5)
    with pytest.raises(RuntimeError), adapted(llama, factors_of(loras)):
        llama(input_ids=IDS[:1].expand(3, -1))
    assert torch.equal(llama(input_ids=IDS).logits, before)


def test_concatenate_is_the_sum_of_the_updates() -> None:
    loras = [random_lora(5, rank=4, alpha=6.0), random_lora(6, rank=2, alpha=1.0), random_lora(7, rank=3, alpha=3.0)]
    joined = concatenate(loras)
    assert joined.rank == 9 and joined.base_model == "tiny"
    each = [deltas(lora) for lora in loras]
    for path, update in deltas(joined).items():
        assert torch.allclose(update, each[0][path] + each[1][path] + each[2][path], atol=1e-5)


def test_concatenate_of_one_changes_nothing() -> None:
    lora = random_lora(8)
    for path, update in deltas(concatenate([lora])).items():
        assert torch.allclose(update, deltas(lora)[path], atol=1e-6)


def test_training_joins_ranks_as_serving_does() -> None:
    loras = [random_lora(seed, alpha=4.0) for seed in range(6)]
    joined = concatenate_ranks(factors_of(loras), chunks=3)
    for name, (a, b) in joined.items():
        assert a.shape[:3] == (2, LAYERS, 12)
        for group in range(2):
            expected = deltas(concatenate(loras[3 * group:3 * group + 3]))
            for layer in range(LAYERS):
                update = b[group, layer].mT @ a[group, layer]
                assert torch.allclose(update, expected[module_path(layer, name)], atol=1e-5)


def test_targets_are_read_from_the_model(llama: LlamaForCausalLM) -> None:
    found = {target.name: (target.d_in, target.d_out) for target in targets_of(llama, tuple(MODULE_PARENTS))}
    assert found["down_proj"] == (INNER, HIDDEN) and found["gate_proj"] == (HIDDEN, INNER)
    assert found["q_proj"] == (HIDDEN, HIDDEN)


def test_a_good_folder_is_valid(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    random_lora(9).save(tmp_path)
    assert validate_folder(tmp_path, llama.config, max_rank=4).rank == 4
