"""Which number format multiplies faster on this processor."""

from __future__ import annotations

import time
from functools import cache

import torch


def _ratio() -> float:
    """Time of a product in bfloat16 over that in float32. By turns, and the best of each: on a busy machine single
    pauses would decide, and processes of one training must not differ in it."""
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(12):
        for dtype in best:
            a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
            begun = time.perf_counter()
            a @ b
            best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.bfloat16] / best[torch.float32]


@cache
def bfloat16_is_faster() -> bool:
    """Whether products in bfloat16 beat float32, measured once; without bf16 instructions they are 60 times slower."""
    return _ratio() < 0.8


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 where that is faster, else a context that changes nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_faster())
