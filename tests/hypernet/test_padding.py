"""Padding on either side, and batches of like length."""

from __future__ import annotations

import torch

from hypernet.padding import batches, pad, pad_left

ROWS = [[5, 6, 7], [8]]


def test_padding_on_either_side() -> None:
    tokens, mask = pad(ROWS)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    tokens, mask = pad_left(ROWS, torch.device("cpu"))
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batches_are_of_like_length_and_bounded() -> None:
    lengths = [9, 2, 30, 4, 3, 100]
    assert batches(lengths, tokens=20) == [[1, 4, 3], [0], [2], [5]]
    assert batches(lengths, tokens=10_000) == [[1, 4, 3, 0, 2, 5]]
    assert batches(lengths, tokens=10_000, rows=4) == [[1, 4, 3, 0], [2, 5]]
    assert batches(lengths, tokens=10_000, spread=2.0) == [[1, 4, 3], [0], [2], [5]]
    assert batches([4, 8, 9], tokens=10_000, spread=2.0) == [[0, 1], [2]], "exactly twice as long still fits"
    assert batches([], tokens=10) == []
