"""Which number format multiplies faster on this processor."""

from __future__ import annotations

import time
from functools import cache

import torch


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
    for _ in range(3):
        a @ b
    begun = time.perf_counter()
    for _ in range(10):
        a @ b
    return time.perf_counter() - begun


@cache
def bfloat16_is_faster() -> bool:
    """Whether products in bfloat16 beat float32, measured once; without bf16 instructions they are 60 times slower."""
    return _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32)


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 where that is faster, else a context that changes nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_faster())
