"""The best adapter of a bounded rank for a sum of adapters: a truncated SVD of the summed update.

The update of K adapters concatenated is a product B A of rank at most R = sum of their ranks. By Eckart and Young
(1936) its first singular vectors give the nearest matrix of a lower rank. With B = Q_b R_b and A^T = Q_a R_a those are
the singular vectors of the R x R matrix R_b R_a^T, turned by Q_b and Q_a, so that the d_out x d_in update is never
formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypernet.lora import AdapterInvalid, LoraAdapter, concatenate


def merge(adapters: Sequence[LoraAdapter], rank: int) -> tuple[LoraAdapter, float]:
    """One adapter of at most `rank` ranks for the sum of the updates, and the kept share of its Frobenius norm (0..1).

    The share is over all modules together. All adapters must have the same modules. Raises ValueError where `rank` is
    below 1, and AdapterInvalid, which names the module, where a factor is not finite.
    """
    return truncate(concatenate(list(adapters)), rank)


def truncate(adapter: LoraAdapter, rank: int) -> tuple[LoraAdapter, float]:
    """The nearest adapter of at most `rank` ranks, and the kept share of the update's Frobenius norm; see `merge`.

    An adapter within `rank` comes back as it is, with a share of 1.
    """
    if rank < 1:
        raise ValueError(f"rank: is {rank}; at least 1 is needed")
    if adapter.rank <= rank:
        return adapter, 1.0
    tensors = {}
    kept, whole = 0.0, 0.0
    for path, (a, b) in adapter.tensors.items():
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterInvalid(f"{path}: holds values that are not finite")
        a_low, b_low, values = _truncate_product(a, b * (adapter.alpha / adapter.rank), rank)
        tensors[path] = (a_low, b_low)
        kept += float(values[:rank].square().sum())
        whole += float(values.square().sum())
    share = (kept / whole) ** 0.5 if whole else 1.0
    return LoraAdapter(rank, float(rank), tensors, adapter.base_model), share


def _truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A `[r, d_in]` and B `[d_out, r]` nearest to the product of B `[d_out, R]` and A `[R, d_in]`, and its singular
    values, largest first. The root of each value goes into either factor, so that their norms stay alike."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    # Small, and squares of the values are summed: worth the precision.
    u, values, vh = torch.linalg.svd(r_b.double() @ r_a.double().mT, full_matrices=False)
    found = min(rank, len(values))
    root = values[:found].sqrt()
    a_low, b_low = a.new_zeros(rank, a.size(1)), b.new_zeros(b.size(0), rank)
    # A module narrower than the rank has fewer singular values: the other ranks stay zero.
    a_low[:found] = (root[:, None] * vh[:found]).to(a) @ q_a.mT
    b_low[:, :found] = q_b @ (u[:, :found] * root).to(b)
    return a_low, b_low, values
