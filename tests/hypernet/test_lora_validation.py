"""Every way in which an adapter folder can be unfit is refused by name, before an engine sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hypernet.lora import CONFIG, WEIGHTS, AdapterInvalid, LoraAdapter, validate_folder
from tests.hypernet.helpers import random_lora

PATH = "model.layers.1.mlp.down_proj"
KEY = f"base_model.model.{PATH}"
MAX_RANK = 8


@pytest.fixture
def refuse(tmp_path: Path, llama: LlamaForCausalLM) -> Callable[[str], None]:
    """Fails unless the folder is refused with a message that matches."""

    def check(message: str) -> None:
        with pytest.raises(AdapterInvalid, match=message):
            validate_folder(tmp_path, llama.config, MAX_RANK)

    random_lora(1).save(tmp_path)
    validate_folder(tmp_path, llama.config, MAX_RANK)
    return check


def put(folder: Path, path: str, a: Tensor | None = None, b: Tensor | None = None) -> None:
    """Writes the adapter with other factors at one module."""
    lora = random_lora(1)
    own = lora.tensors.get(path, lora.tensors[PATH])
    changed = {path: (own[0].clone() if a is None else a, own[1].clone() if b is None else b)}
    replace(lora, tensors={**lora.tensors, **changed}).save(folder)


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(("a", "b"), [((4, 95), (64, 4)), ((4, 96), (65, 4)), ((3, 96), (64, 3)), ((4, 96), (4, 64)),
                                      ((1, 4, 96), (64, 4))])
def test_wrong_shape(tmp_path: Path, refuse: Callable[[str], None], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    put(tmp_path, PATH, torch.ones(a), torch.ones(b))
    refuse(rf"{PATH}: A .* the base needs \(4, 96\) and \(64, 4\)")


def test_rank_above_the_cap(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    random_lora(1, rank=MAX_RANK + 1).save(tmp_path)
    refuse("r: is 9; 1 to 8 is allowed")


def test_rank_that_the_tensors_do_not_have(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    edit_config(tmp_path, r=5)
    refuse("the base needs")
    edit_config(tmp_path, r=0)
    refuse("r: is 0")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, refuse: Callable[[str], None], value: float) -> None:
    a, b = torch.ones(4, 96), torch.ones(64, 4)
    a[2, 7] = value
    put(tmp_path, PATH, a=a)
    refuse(f"{PATH}.lora_A: holds values that are not finite")
    b[5, 1] = value
    put(tmp_path, PATH, b=b)
    refuse(f"{PATH}.lora_B: holds values that are not finite")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_scale_that_is_not_finite(tmp_path: Path, refuse: Callable[[str], None], alpha: float) -> None:
    edit_config(tmp_path, lora_alpha=alpha)
    refuse("lora_alpha: is .* a finite number is needed")


def test_huge_norm(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    put(tmp_path, PATH, b=torch.full((64, 4), 1e6))
    refuse(f"{PATH}.lora_B: has a norm above 10000")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(tmp_path: Path, refuse: Callable[[str], None], keep: float) -> None:
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    (tmp_path / WEIGHTS).write_bytes(data[:size])
    refuse(f"{WEIGHTS}: cannot be read as safetensors")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(tmp_path: Path, refuse: Callable[[str], None], name: str) -> None:
    (tmp_path / name).unlink()
    refuse(f"{name}: cannot be read")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", '{"r": 4}', '{"r": "four", "lora_alpha": 4}',
                                  '{"r": Infinity, "lora_alpha": 4}', '{"r": 4, "lora_alpha": null}', "\ufeff{}"])
def test_malformed_configuration(tmp_path: Path, refuse: Callable[[str], None], text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    refuse(f"{CONFIG}: cannot be read")


def test_configuration_that_is_no_text(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe\x00")
    refuse(f"{CONFIG}: cannot be read")


@pytest.mark.parametrize("path", [
    "model.layers.1.mlp.swish_proj", "model.layers.2.mlp.down_proj", "model.layers.-1.mlp.down_proj",
    "model.layers.\u00b2.mlp.down_proj", "model.layers.01.mlp.down_proj", "model.layers.1.self_attn.down_proj",
    "model.layers.1.down_proj", "model.embed_tokens", "lm_head", "layers.1.mlp.down_proj", "model.layers.1.mlp",
])
def test_unknown_module(tmp_path: Path, refuse: Callable[[str], None], path: str) -> None:
    put(tmp_path, path)
    refuse("is no module of the base that can carry a LoRA; .* in layers 0 to 1 are allowed")


def test_half_a_pair(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    edit_weights(tmp_path, lambda tensors: tensors.__delitem__(f"{KEY}.lora_B.weight"))
    refuse(rf"{PATH} has \['lora_A'\]; exactly lora_A and lora_B")


@pytest.mark.parametrize("key", ["foo", f"{KEY}.lora_magnitude_vector", f"{KEY}.lora_A.default.weight"])
def test_foreign_tensor(tmp_path: Path, refuse: Callable[[str], None], key: str) -> None:
    edit_weights(tmp_path, lambda tensors: tensors.__setitem__(key, torch.ones(3)))
    refuse("exactly lora_A and lora_B are allowed")


def test_no_tensors(tmp_path: Path, refuse: Callable[[str], None]) -> None:
    LoraAdapter(4, 4.0, {}).save(tmp_path)
    refuse("holds no LoRA tensors")
