"""Nearest vectors among many: an inverted file over k-means cells with 8-bit scalar quantisation (faiss).

Cells, since they can be filtered before the search and mapped from disk, and are built in one pass; a graph (HNSW)
takes longer to build and loses its paths under filters. What is found is compared again by the exact vectors, so
quantisation costs no accuracy as long as enough is looked at.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.ragged import Positions

logger = logging.getLogger(__name__)

CELLS_PER_ROOT = 2.5
"""Cells for each square root of the number of vectors: half of a search compares with cells, half with vectors."""
TRAINING_PER_CELL = 32
_ITERATIONS = 8
_BLOCK = 16_384
_PROBED = (16, 32, 64, 128)
_TRIALS = 64
_NEAREST = 10
MIN_RECALL = 0.998
"""Of the ten nearest, on queries made of the vectors themselves: so many cells are visited in a search."""


class Neighbours:
    """An index over rows of vectors. Searches may run in threads at the same time."""

    def __init__(self, index: faiss.IndexIVF, probes: int) -> None:
        self._index = index
        self.probes = probes

    @classmethod
    def build(cls, vectors: Vectors, seed: int = 0) -> Neighbours:
        """Of float32 [n, dimension], rows L2-normalised. About two minutes for a million on one core."""
        count, dimension = vectors.shape
        rng = np.random.default_rng(seed)
        cells = max(1, min(int(CELLS_PER_ROOT * math.sqrt(count)), count // TRAINING_PER_CELL))
        quantizer = faiss.IndexFlatIP(dimension)
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, dimension, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter, index.cp.seed, index.cp.spherical = _ITERATIONS, seed + 1, True
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, TRAINING_PER_CELL
        sample = np.sort(rng.permutation(count)[: cells * TRAINING_PER_CELL])
        index.train(np.ascontiguousarray(vectors[sample]))
        for start in range(0, count, _BLOCK):
            index.add(np.ascontiguousarray(vectors[start : start + _BLOCK]))
        made = cls(index, _PROBED[0])
        made.probes = made._enough(vectors, rng)
        return made

    @classmethod
    def load(cls, path: Path, probes: int) -> Neighbours:
        """An index that `save` wrote, mapped: its cells are read as they are needed. Check the file before."""
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        assert isinstance(index, faiss.IndexIVF), "an inverted file, as its checksum says"
        # Else each search starts threads that read ahead: they cost many times what it does itself, and go on after it,
        # so that one may find its file cut off, which ends the process.
        assert index.invlists is not None
        lists: Any = faiss.downcast_InvertedLists(index.invlists)
        lists.prefetch_nthread = 0
        return cls(index, probes)

    def save(self, path: Path) -> None:
        """Write the index."""
        faiss.write_index(self._index, str(path))

    def search(self, vector: Vectors, count: int, allowed: npt.NDArray[np.uint8] | None = None) -> Positions:
        """Up to `count` rows near a vector, float32 [dimension], nearest first.

        `allowed` has a bit for each row, the lowest first in its byte: others are passed over in the search.
        """
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = self.probes
        if allowed is not None:
            # The bitmap must outlive the search: the selector holds a bare pointer to it.
            selector = faiss.IDSelectorBitmap(len(allowed) * 8, faiss.swig_ptr(allowed))
            parameters.sel = selector
        rows: Any = self._index.search(vector[None], count, params=parameters)[1][0]
        return rows[rows >= 0]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and numbers of rows."""
        return int(self._index.ntotal) * (self._index.code_size + 8)

    def _enough(self, vectors: Vectors, rng: np.random.Generator) -> int:
        """The least number of cells that finds enough; queries are mixtures of two vectors with noise, since a
        question lies between what it may be about."""
        count, dimension = vectors.shape
        pairs = vectors[rng.integers(count, size=_TRIALS)] + vectors[rng.integers(count, size=_TRIALS)]
        noise = rng.standard_normal(pairs.shape, dtype=np.float32) / math.sqrt(dimension)
        queries = np.asarray(pairs / np.linalg.norm(pairs, axis=1, keepdims=True) + noise, np.float32)
        best = np.full((_TRIALS, _NEAREST), -np.inf, np.float32)
        for start in range(0, count, _BLOCK):
            block = queries @ vectors[start : start + _BLOCK].T
            best = -np.partition(-np.concatenate([best, block], axis=1), _NEAREST - 1, axis=1)[:, :_NEAREST]
        least = best.min(axis=1)
        for self.probes in _PROBED:
            found = sum(
                int((vectors[self.search(query, 4 * _NEAREST)] @ query >= bound - 1e-6).sum())
                for query, bound in zip(queries, least, strict=True)
            )
            if min(found, _TRIALS * _NEAREST) >= MIN_RECALL * _TRIALS * _NEAREST:
                return self.probes
        logger.warning("%d cells find %.3f of the nearest vectors", self.probes, found / (_TRIALS * _NEAREST))
        return self.probes
