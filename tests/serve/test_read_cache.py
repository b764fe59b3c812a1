"""Reads that are kept while nothing is committed: of this process or another one, nothing stale is ever given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from serve.registry import Registry, migrate
from serve.registry.read_cache import MISSING, ReadCache


def _registry(folder: Path) -> Registry:
    url = f"sqlite:///{folder / 'registry.db'}"
    migrate(url)
    return Registry.open(url)


def test_a_result_is_kept_until_a_commit(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    reads = registry.reads
    version = reads.version()
    assert version is not None and reads.get("key") is MISSING
    reads.put(version, "key", 7)
    assert reads.version() == version and reads.get("key") == 7
    registry.get_tenant("acme")
    assert reads.version() == version and reads.get("key") == 7
    registry.create_tenant("acme")
    assert reads.version() != version and reads.get("key") is MISSING
    registry.close()


def test_a_commit_of_another_process_is_seen(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    reads = registry.reads
    reads.put(reads.version(), "key", 7)
    program = "import sys; from serve.registry import Registry; Registry.open(sys.argv[1]).create_tenant('acme')"
    subprocess.run([sys.executable, "-c", program, f"sqlite:///{tmp_path / 'registry.db'}"], check=True)
    reads.version()
    assert reads.get("key") is MISSING
    registry.close()


def test_what_was_read_before_a_commit_is_not_kept_after_it(tmp_path: Path) -> None:
    registry = _registry(tmp_path)
    reads = registry.reads
    before = reads.version()
    registry.create_tenant("acme")
    reads.version()
    reads.put(before, "key", "read before the commit")
    assert reads.get("key") is MISSING
    registry.close()


def test_nothing_is_kept_without_sqlite() -> None:
    reads = ReadCache(None)
    reads.put(reads.version(), "key", 7)
    assert reads.get("key") is MISSING
    reads.close()
