"""Rows of different lengths in one array, as compressed sparse rows hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Row i is `values[starts[i] : starts[i + 1]]`; `starts` is int64 [rows + 1] and begins with 0."""

    starts: Positions
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, rows: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> Ragged:
        """Rows, of which there may be none."""
        values = np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)
        return cls(starts_of(np.fromiter(map(len, rows), np.int64, len(rows))), values)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Ragged:
        """Texts as UTF-8. Lone surrogates, which JSON lets through, stay what they are."""
        return cls.of([np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts], np.uint8)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.starts.nbytes + self.values.nbytes

    def row(self, index: int) -> npt.NDArray[Any]:
        """One row, a view."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def text(self, index: int) -> str:
        """One row of `of_texts`."""
        return self.row(index).tobytes().decode("utf-8", "surrogatepass")

    def lengths(self, rows: Positions) -> Positions:
        """How long these rows are."""
        return self.starts[rows + 1] - self.starts[rows]

    def places(self, rows: Positions) -> Positions:
        """Where in `values` the elements of these rows stand, row after row."""
        lengths = self.lengths(rows)
        before = starts_of(lengths)
        return np.repeat(self.starts[rows] - before[:-1], lengths) + np.arange(before[-1])

    def take(self, rows: Positions) -> Ragged:
        """These rows, in this order, copied."""
        return Ragged(starts_of(self.lengths(rows)), self.values[self.places(rows)])

    @staticmethod
    def joined(parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts; there must be a part."""
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return Ragged(starts_of(lengths), np.concatenate([part.values for part in parts]))


def starts_of(lengths: npt.NDArray[Any]) -> Positions:
    """The `starts` of rows with these lengths."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
