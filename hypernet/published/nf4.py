"""The rounding of NF4 with double quantisation (QLoRA, arXiv 2305.14314), without its storage.

Networks that were trained on a base quantised this way read activations that carry its rounding. Weights are rounded
as bitsandbytes does it and kept in their own type, so no GPU kernels are needed, and no memory is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEIGHT_BLOCK, SCALE_BLOCK = 64, 256

# The values of the 4-bit normal float, as the paper lists them.
_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def _dynamic_values() -> Tensor:
    """The 256 values of the dynamic 8-bit float: seven decades, each cut more finely than the one below it."""
    found = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        found += [middles, -middles]
    return torch.cat(found).sort().values


_DYNAMIC = _dynamic_values()


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Each element of `x` replaced by the nearest of the sorted `values`."""
    values = values.to(x)
    return values[torch.bucketize(x, (values[:-1] + values[1:]) / 2)]


def _round_blocks(x: Tensor, block: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Flat `x` in blocks `[n, block]`, each divided by its largest magnitude `[n, 1]` and rounded to `values`."""
    blocks = nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    return _nearest(blocks / scales.clamp_min(torch.finfo(x.dtype).tiny), values), scales


def round_to_nf4(weight: Tensor) -> Tensor:
    """`weight` after quantisation to NF4 in blocks of 64, whose scales are quantised to 8 bits in blocks of 256."""
    rounded, scales = _round_blocks(weight.detach().float().flatten(), WEIGHT_BLOCK, _NF4)
    mean = scales.mean()
    codes, outer = _round_blocks((scales - mean).flatten(), SCALE_BLOCK, _DYNAMIC)
    scales = (codes * outer).flatten()[:rounded.size(0)] + mean
    return (rounded * scales[:, None]).flatten()[:weight.numel()].view_as(weight).to(weight.dtype)


def round_linears(module: nn.Module) -> None:
    """Round the weights of all linear layers below `module`, in place."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight.copy_(round_to_nf4(part.weight))
