"""Answers of the registry, kept for exactly as long as nothing was committed to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from serve.registry.database import BUSY_TIMEOUT_MS

MISSING = object()
_ENTRIES = 4096


class ReadCache:
    """Results of reads of an SQLite registry. For one thread.

    SQLite's `data_version` changes with every commit of any other connection, of this process or another one, and
    asking for it costs microseconds. So a result read after some version was seen is right for as long as that version
    lasts: a revoked key or a deleted adapter is noticed at once. Other databases have nothing so cheap; for them
    nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        """``path``: the SQLite file; None where the registry is none."""
        self._connection = None
        if path is not None:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        self._version: int | None = None
        self._results: dict[Hashable, Any] = {}

    def version(self) -> int | None:
        """The state of the registry now; to be asked for before a read whose result is to be kept. None: unknown."""
        if self._connection is None:
            return None
        version: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._results.clear()
        return version

    def get(self, key: Hashable) -> Any:
        """What was kept under `key` in the state that `version` just gave, or MISSING."""
        return self._results.get(key, MISSING)

    def put(self, version: int | None, key: Hashable, result: Any) -> None:
        """Keep a result that was read after `version` was asked for."""
        if version is None or version != self._version:
            return
        if len(self._results) >= _ENTRIES:
            self._results.clear()
        self._results[key] = result

    def close(self) -> None:
        """Close its connection."""
        if self._connection is not None:
            self._connection.close()
