"""Indexes of many tenants over a real registry: dropped, read again, built anew when files are damaged."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import router.index
import router.search
from router.embed import Vectors
from router.index import TenantIndex
from serve.deployments.router_index import TenantIndexes
from serve.registry import Registry
from serve.registry.records import NewCentroids
from tests.serve.registry_helpers import acme, clock, make_ready, new_adapter, registry  # noqa: F401

# ruff: noqa: F811

DIMENSION = 8


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/registry.db"


class NamedEncoder:
    """An encoder of which only name and dimension matter here."""

    id = "minilm"
    version = "1"
    dimension = DIMENSION

    def embed(self, texts: Sequence[str]) -> Vectors:
        raise AssertionError("indexes embed nothing")


def vectors(seed: int, rows: int = 2) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(rows, DIMENSION)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def publish(registry: Registry, tenant: str, number: int) -> str:
    """A document that says its number; the ID of its adapter."""
    adapter = new_adapter()
    parts = [(adapter, NewCentroids("minilm", "1", vectors(number)))]
    make_ready(registry, tenant, f"Sheet {number}", f"The model{number} weighs {number} kg.", parts)
    return adapter.id


def first(index: TenantIndex, number: int) -> str | None:
    found = index.search(vectors(number)[0], {f"model{number}"})
    return found[0].entry.adapter_id if found else None


def test_tenants_not_asked_for_make_room_and_come_back(registry: Registry) -> None:
    tenants = [registry.create_tenant(f"tenant-{i}").id for i in range(6)]
    adapters = [[publish(registry, tenant, 10 * i + j) for j in range(3)] for i, tenant in enumerate(tenants)]
    one = TenantIndexes(registry, NamedEncoder())
    one.current(tenants[0])
    indexes = TenantIndexes(registry, NamedEncoder(), max_bytes=int(2.5 * one.nbytes))
    for _ in range(2):
        for i, tenant in enumerate(tenants):
            index = indexes.current(tenant)
            assert [first(index, 10 * i + j) for j in range(3)] == adapters[i]
            assert len(indexes) <= 2 and indexes.nbytes <= 2.5 * one.nbytes
    added = publish(registry, tenants[0], 7)
    assert first(indexes.current(tenants[0]), 7) == added and indexes.seq(tenants[0]) == 4
    assert first(indexes.current("ten_unknown"), 7) is None


@pytest.fixture
def large(
    registry: Registry, acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TenantIndexes:
    """A tenant whose index is large enough to lie on disk."""
    monkeypatch.setattr(router.index, "FLAT_ROWS", 40)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 10)
    for number in range(30):
        publish(registry, acme, number)
    indexes = TenantIndexes(registry, NamedEncoder(), tmp_path / "router-index")
    assert first(indexes.current(acme), 3) is not None
    wait_for(tmp_path / "router-index" / acme / "state.json")
    return indexes


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_large_index_is_read_from_disk_and_follows_on(
    large: TenantIndexes, registry: Registry, acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = publish(registry, acme, 99)
    again = TenantIndexes(registry, NamedEncoder(), tmp_path / "router-index")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "routable_snapshot", None)  # so that nothing but the files can be read
        index = again.current(acme)
    assert len(index) == 31 and first(index, 99) == late
    assert [first(index, i) for i in range(30)] == [first(large.current(acme), i) for i in range(30)]


@pytest.mark.parametrize("mapped", [False, True])
def test_damaged_files_are_built_anew(
    large: TenantIndexes, registry: Registry, acme: str, tmp_path: Path, mapped: bool
) -> None:
    expected = [first(large.current(acme), i) for i in range(30)]
    path, = (tmp_path / "router-index" / acme).glob("segment-*/neighbours.faiss")
    os.truncate(path, path.stat().st_size - 10)
    indexes = large if mapped else TenantIndexes(registry, NamedEncoder(), tmp_path / "router-index")
    assert [first(indexes.current(acme), i) for i in range(30)] == expected


def test_files_newer_than_the_registry_are_not_taken(
    large: TenantIndexes, registry: Registry, acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the database was restored from a backup."""
    folder = tmp_path / "router-index"
    again = TenantIndexes(registry, NamedEncoder(), folder)
    with monkeypatch.context() as patch:
        patch.setattr(TenantIndex, "seq", property(lambda self: 1000))
        loaded = TenantIndex(acme, DIMENSION, folder / acme, "minilm 1")
        again._load(loaded)
    assert loaded.seq == registry.head(acme) and len(loaded) == 30
    assert loaded.wants_compaction, "it comes from the registry, not from the files"


def test_changes_are_seen_while_segments_are_merged(
    registry: Registry, acme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.index, "FLAT_ROWS", 40)
    for number in range(30):
        publish(registry, acme, number)
    begun, go_on = threading.Event(), threading.Event()
    compact = TenantIndex.compact

    def held(index: TenantIndex) -> None:
        begun.set()
        assert go_on.wait(30)
        compact(index)

    monkeypatch.setattr(TenantIndex, "compact", held)
    indexes = TenantIndexes(registry, NamedEncoder(), tmp_path / "router-index")
    indexes.current(acme)
    assert begun.wait(30)
    for number in range(100, 105):
        added = publish(registry, acme, number)
        assert first(indexes.current(acme), number) == added
        assert len(indexes.current(acme)) == number - 69
    go_on.set()
    wait_for(tmp_path / "router-index" / acme / "state.json")
    assert len(indexes.current(acme)) == 35
