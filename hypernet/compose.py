"""Several adapters as one: the weighted sum of their updates, exact, by rank concatenation.

sum_i w_i (alpha_i / r_i) B_i A_i is the product of B matrices side by side and A matrices stacked, so the sum of
adapters is an adapter whose rank is the sum of theirs. PEFT's `add_weighted_adapter(combination_type="cat")` does the
same on a loaded model; here it is done on tensors alone, without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hypernet.lora import AdapterInvalid, LoraAdapter, concatenate


def compose(adapters: Sequence[LoraAdapter], weights: Sequence[float], max_rank: int) -> LoraAdapter:
    """One adapter whose update is the sum of the given ones' updates, each times its weight. Factors are float32.

    Weights and scalings are folded into B; alpha equals the rank. A module that only some adapters change gets zeros
    for the ranks of the others, since an engine expects one rank for all modules. Raises ValueError where nothing is
    given or the weights are not as many as the adapters; AdapterInvalid where the ranks add up to more than `max_rank`,
    or where adapters differ in a module's shape, which is named.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; one weight for each adapter is needed")
    rank = sum(adapter.rank for adapter in adapters)
    if rank > max_rank:
        each = " + ".join(str(adapter.rank) for adapter in adapters)
        raise AdapterInvalid(f"r: the ranks add up to {each} = {rank}; at most {max_rank} is allowed")
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for adapter in adapters:
        for path, pair in adapter.tensors.items():
            widths = tuple(_widths(*known) for known in (modules.setdefault(path, pair), pair))
            if widths[0] != widths[1]:
                raise AdapterInvalid(f"{path}: is {widths[0]} wide in one adapter and {widths[1]} in another; the "
                                     "adapters must be of one base model")
    return concatenate([
        # Rounding weights and scalings to a narrower type would make the sum inexact, so everything is float32 first.
        replace(adapter, alpha=adapter.alpha * weight,
                tensors={path: _factors(adapter, path, like) for path, like in modules.items()})
        for adapter, weight in zip(adapters, weights, strict=True)
    ])


def _widths(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Input and output width of a module from its factors A `[r, d_in]` and B `[d_out, r]`."""
    return a.size(1), b.size(0)


def _factors(adapter: LoraAdapter, path: str, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The adapter's factors of a module, or zeros of its rank and of the widths of `like`."""
    found = adapter.tensors.get(path)
    if found is not None:
        return found[0].float(), found[1].float()
    d_in, d_out = _widths(*like)
    return torch.zeros(adapter.rank, d_in), torch.zeros(d_out, adapter.rank)
