"""An encoder whose vectors are kept on disk, so that a run goes on where the last one ended."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from router.embed import Encoder, Vectors

_BATCH = 128


class CachedEncoder:
    """Vectors of `encoder` in a SQLite file, under the encoder's version and the text's hash. For one thread."""

    def __init__(self, encoder: Encoder, file: Path) -> None:
        self.id, self.version, self.dimension = encoder.id, encoder.version, encoder.dimension
        self._encoder = encoder
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(file)
        self._file.execute("create table if not exists vectors (key blob primary key, vector blob) without rowid")
        self._held: dict[bytes, Vectors] = {}
        self.computed = 0
        """Texts that were not on disk."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row for each text: float32 [texts, dimension], L2-normalised. Raises as the encoder does."""
        keys = [hashlib.sha256(f"{self.version}\0{text}".encode()).digest() for text in texts]
        missing = {}
        for key, text in zip(keys, texts, strict=True):
            if key not in self._held and not self._read(key):
                missing[key] = text
        # Texts of like length together: a batch is padded to its longest.
        waiting = sorted(missing.items(), key=lambda item: len(item[1]))
        for first in range(0, len(waiting), _BATCH):
            self._compute(dict(waiting[first: first + _BATCH]))
        if not keys:
            return np.empty((0, self.dimension), dtype=np.float32)
        return np.stack([self._held[key] for key in keys])

    def _read(self, key: bytes) -> bool:
        row = self._file.execute("select vector from vectors where key = ?", (key,)).fetchone()
        if row is None:
            return False
        self._held[key] = np.frombuffer(row[0], dtype=np.float32)
        return True

    def _compute(self, texts: dict[bytes, str]) -> None:
        vectors = self._encoder.embed(list(texts.values()))
        self._held.update(zip(texts, vectors, strict=True))
        with self._file:
            self._file.executemany("insert or replace into vectors values (?, ?)",
                                   [(key, vector.tobytes()) for key, vector in zip(texts, vectors, strict=True)])
        self.computed += len(texts)
