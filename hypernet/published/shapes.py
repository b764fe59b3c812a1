"""Compares a checkpoint's tensors with the model that was built from their shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hypernet.inject import MODULE_PARENTS
from hypernet.published.errors import CheckpointInvalid

Tensors = Mapping[str, Tensor]

_SHOWN = 4


def dimensions(tensors: Tensors, key: str, count: int) -> tuple[int, ...]:
    """The shape of a tensor that must exist with `count` dimensions. Raises CheckpointInvalid."""
    if key not in tensors:
        raise CheckpointInvalid(f"{key}: is missing; a checkpoint of this kind has it")
    shape = tuple(tensors[key].shape)
    if len(shape) != count or 0 in shape:
        raise CheckpointInvalid(f"{key}: has shape {shape}; {count} dimensions above zero are needed")
    return shape


def children(tensors: Tensors, prefix: str) -> list[str]:
    """The names that follow `prefix` and a dot in the keys, each once, in the keys' order."""
    start = f"{prefix}."
    return list(dict.fromkeys(key[len(start):].split(".", 1)[0] for key in tensors if key.startswith(start)))


def module_names(tensors: Tensors, prefix: str, needed: str) -> list[str]:
    """The modules that the children of `prefix` name, in the keys' order. `needed` says what a checkpoint has there.

    Raises CheckpointInvalid where there are none, or one of them can carry no LoRA.
    """
    names = children(tensors, prefix)
    if not names:
        raise CheckpointInvalid(f"{prefix}: is missing; {needed}")
    unknown = [name for name in names if name not in MODULE_PARENTS]
    if unknown:
        raise CheckpointInvalid(f"{prefix}.{unknown[0]}: is no module that can carry a LoRA; allowed are "
                                f"{', '.join(MODULE_PARENTS)}")
    return names


def count_children(tensors: Tensors, prefix: str) -> int:
    """How many numbered children `prefix` has. Raises CheckpointInvalid where a number is left out."""
    names = children(tensors, prefix)
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise CheckpointInvalid(f"{prefix}: has the parts {', '.join(sorted(names))}; numbers from 0 without a gap are "
                                "needed")
    return len(names)


def check(tensors: Tensors, model: nn.Module) -> None:
    """Every tensor must be there, with the model's shape, of floating point and finite, and no other.

    `model` may be on the meta device. Raises CheckpointInvalid, naming the first few tensors.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise CheckpointInvalid(f"{_list(missing)}: missing")
    unknown = [key for key in tensors if key not in wanted]
    if unknown:
        raise CheckpointInvalid(f"{_list(unknown)}: belongs to no part of this kind of checkpoint")
    wrong = [key for key, shape in wanted.items() if tuple(tensors[key].shape) != shape]
    if wrong:
        key = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointInvalid(f"{key}: has shape {tuple(tensors[key].shape)}; the other tensors ask for "
                                f"{wanted[key]}{others}")
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise CheckpointInvalid(f"{key}: holds {value.dtype}; floating point is needed")
        if not torch.isfinite(value).all():
            raise CheckpointInvalid(f"{key}: holds values that are not finite")


def _list(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
