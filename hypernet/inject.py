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


def module_path(layer: int, name: str) -> str:
    """The path of a target module in a transformers decoder: "model.layers.0.mlp.down_proj"."""
    return f"model.layers.{layer}.{MODULE_PARENTS[name]}.{name}"


def targets_of(model: nn.Module, names: tuple[str, ...]) -> tuple[Target, ...]:
    """The widths of the named modules, read from the first layer of a transformers decoder."""
    found = []
    for name in names:
        linear: Any = model.get_submodule(module_path(0, name))
        found.append(Target(name, int(linear.in_features), int(linear.out_features)))
    return tuple(found)


@contextmanager
def adapted(model: nn.Module, factors: Factors) -> Iterator[None]:
    """Within the context row b of a batch runs with adapter b: `y + (x A_b^T) B_b` at every target module.

    The factors are `[B, L, r, d]` and may carry gradients.
    """
    handles = []
    for name, (a, b) in factors.items():
        for layer in range(a.size(1)):
            linear = model.get_submodule(module_path(layer, name))

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor,
                     a_l: Tensor = a[:, layer], b_l: Tensor = b[:, layer]) -> Tensor:
                return output + torch.bmm(torch.bmm(inputs[0], a_l.mT), b_l)
            handles.append(linear.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
