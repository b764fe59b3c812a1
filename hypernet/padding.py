"""Token sequences of different lengths in one pass: how they are padded, and which go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad(rows: Sequence[list[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T]` int64, padded on the right with 0, and a mask `[B, T]` bool that is true on tokens."""
    length = max(map(len, rows))
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, :len(row)] = True
    return tokens.to(device), mask.to(device)


def pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask `[B, T]` int64, padded on the left with 0 and masked with 0 there: all rows end together."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def batches(lengths: Sequence[int], tokens: int, rows: int | None = None, spread: float = 0.0) -> list[list[int]]:
    """Indices in groups of like length, the shortest first, in which padding wastes the least.

    Padded to its longest a group has at most `tokens` tokens, or one row. It has at most `rows` rows (None: any number)
    and, where `spread` is given, its longest has at most `spread` times the tokens of its shortest.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        last = groups[-1] if groups else []
        fits = last and (len(last) + 1) * lengths[i] <= tokens and (rows is None or len(last) < rows)
        if fits and (not spread or lengths[i] <= spread * lengths[last[0]]):
            last.append(i)
        else:
            groups.append([i])
    return groups
