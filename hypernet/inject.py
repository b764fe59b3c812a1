"""Applies LoRA factors to a frozen base inside torch, a different adapter for each row of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hypernet.perceiver import Factors, Target

MODULE_PARENTS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
                  "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


LAYERS = "model.layers"
"""Where a transformers decoder with a head keeps its layers."""
NESTED_LAYERS = "model.language_model.layers"
"""Where a multimodal model keeps those of its text decoder."""


def module_path(layer: int, name: str, layers: str = LAYERS) -> str:
    """The path of a target module in a transformers decoder: "model.layers.0.mlp.down_proj"."""
    return f"{layers}.{layer}.{MODULE_PARENTS[name]}.{name}"


def split_path(path: str) -> tuple[str, int, str]:
    """What `module_path` was given: the path of the layers, the layer and the module's name.

    Raises ValueError where `path` is no such path.
    """
    for layers in (LAYERS, NESTED_LAYERS):
        number, _, name = path.removeprefix(f"{layers}.").partition(".")
        name = name.rpartition(".")[2]
        if number.isdecimal() and name in MODULE_PARENTS and path == module_path(int(number), name, layers):
            return layers, int(number), name
    raise ValueError(f"{path}: is no path of a module that can carry a LoRA")


def layers_path(model: nn.Module) -> str:
    """Where a transformers decoder with a head keeps its layers. Raises AttributeError where it has none."""
    for layers in (LAYERS, NESTED_LAYERS):
        try:
            model.get_submodule(layers)
        except AttributeError:
            continue
        return layers
    raise AttributeError(f"{type(model).__name__} has neither {LAYERS} nor {NESTED_LAYERS}")


def targets_of(model: nn.Module, names: tuple[str, ...]) -> tuple[Target, ...]:
    """The widths of the named modules, read from the first layer of a transformers decoder."""
    found, layers = [], layers_path(model)
    for name in names:
        linear: Any = model.get_submodule(module_path(0, name, layers))
        found.append(Target(name, int(linear.in_features), int(linear.out_features)))
    return tuple(found)


@contextmanager
def adapted(model: nn.Module, factors: Factors) -> Iterator[None]:
    """Within the context row b of a batch runs with adapter b: `y + (x A_b^T) B_b` at every target module.

    The factors are `[B, L, r, d]` and may carry gradients; they take on the device and type of what the modules read.
    """
    handles, layers = [], layers_path(model)
    for name, (a, b) in factors.items():
        for layer in range(a.size(1)):
            linear = model.get_submodule(module_path(layer, name, layers))

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor,
                     a_l: Tensor = a[:, layer], b_l: Tensor = b[:, layer]) -> Tensor:
                x = inputs[0]
                return output + torch.bmm(torch.bmm(x, a_l.to(x).mT), b_l.to(x))
            handles.append(linear.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
