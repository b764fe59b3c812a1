"""Large indexes: merged in the background, on disk, found intact or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest

import router.index
import router.search
from router.index import AdapterEntry, IndexDamaged, Scope, TenantIndex
from router.neighbours import Neighbours

DIMENSION = 16
COUNT = 600
ENCODER = "minilm 1"


def unit(rows: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def entries(count: int = COUNT, seed: int = 0, name: str = "a") -> list[AdapterEntry]:
    """Documents with two centroids each, a word of their own, and every tenth in a collection."""
    vectors = unit(2 * count, seed)
    return [
        AdapterEntry.of_document(
            f"{name}{i}", "ten_a", f"doc_{name}{i}", f"Sheet {name}{i}", f"The {name}{i} weighs {i} kg.",
            vectors[2 * i : 2 * i + 2], collection_id="col_tenth" if i % 10 == 0 else None,
        )
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.index, "FLAT_ROWS", 200)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 200)


def opened(folder: Path, encoder: str = ENCODER) -> TenantIndex:
    return TenantIndex("ten_a", DIMENSION, folder, encoder)


@pytest.fixture
def stored(tmp_path: Path) -> TenantIndex:
    index = opened(tmp_path / "ten_a")
    index.load([entries()], seq=7)
    assert index.wants_compaction
    index.compact()
    assert not index.wants_compaction
    return index


def exact(found: list[AdapterEntry]) -> TenantIndex:
    index = TenantIndex("ten_a", DIMENSION)
    index.update(found)
    return index


def results(index: TenantIndex, number: int, scope: Scope | None = None) -> list[tuple[str, float, float]]:
    """Of a query that names one document and points at another."""
    found = index.search(unit(1, 1000 + number)[0], {f"a{number}", "kg"}, scope)
    return [(one.entry.adapter_id, one.score, one.rank) for one in found]


def test_a_large_index_finds_what_a_search_of_everything_finds(stored: TenantIndex) -> None:
    everything = exact(entries())
    for number in range(0, 60, 7):
        for scope in (None, Scope("col_tenth"), Scope(adapter_ids=[f"a{i}" for i in range(300)])):
            assert results(stored, number, scope) == results(everything, number, scope)
    assert stored.nbytes < everything.nbytes + router.search.MAX_EXACT_ROWS * 100


def test_it_comes_back_from_disk_as_of_its_change(stored: TenantIndex, tmp_path: Path) -> None:
    stored.update(entries(3, seed=5, name="new"), documents=["doc_a5"], seq=8)
    again = opened(tmp_path / "ten_a")
    assert again.open() and again.seq == 7 and len(again) == COUNT
    again.update(entries(3, seed=5, name="new"), documents=["doc_a5"], seq=8)
    assert [results(again, number) for number in range(9)] == [results(stored, number) for number in range(9)]
    assert "a5" not in again and "new2" in again and again.seq == 8
    assert not opened(tmp_path / "ten_b").open()


def test_what_was_gone_when_the_state_was_written_stays_gone(stored: TenantIndex, tmp_path: Path) -> None:
    stored.update(entries(COUNT // 20 + 80, seed=5, name="new"), remove=["a1"], documents=["doc_a2"], seq=9)
    stored.compact()
    again = opened(tmp_path / "ten_a")
    assert again.open() and again.seq == 9
    assert "a1" not in again and "a2" not in again and len(again) == len(stored)
    assert len(list((tmp_path / "ten_a").glob("segment-*"))) == len(again._snapshot.views)


def damage_by_truncation(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_a_byte, os.unlink])
def test_every_damaged_file_is_noticed(
    stored: TenantIndex, tmp_path: Path, damage: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(damage)
    segment, = (tmp_path / "ten_a").glob("segment-*")
    state = tmp_path / "ten_a" / "state.json"
    for path in sorted(segment.iterdir()) + ([state] if damage is not os.unlink else []):
        content = path.read_bytes()
        if not content:
            continue
        damage(path)
        with pytest.raises(IndexDamaged, match=r"segment-|state\.json"):
            opened(tmp_path / "ten_a").open()
        path.write_bytes(content)
    assert opened(tmp_path / "ten_a").open()


def test_a_file_that_shrinks_while_it_is_mapped_is_noticed_before_it_is_read(
    stored: TenantIndex, tmp_path: Path
) -> None:
    path, = (tmp_path / "ten_a").glob("segment-*/neighbours.faiss")
    os.truncate(path, 100)
    with pytest.raises(IndexDamaged, match="size"):
        stored.search(unit(1)[0], ())
    with pytest.raises(IndexDamaged, match="size"):
        stored.check_files()


def test_a_state_of_another_encoder_tenant_or_format_is_not_taken(stored: TenantIndex, tmp_path: Path) -> None:
    with pytest.raises(IndexDamaged, match="written for"):
        opened(tmp_path / "ten_a", "minilm 2").open()
    with pytest.raises(IndexDamaged, match="written for"):
        TenantIndex("ten_b", DIMENSION, tmp_path / "ten_a", ENCODER).open()
    with pytest.raises(IndexDamaged, match="written for"):
        TenantIndex("ten_a", DIMENSION + 1, tmp_path / "ten_a", ENCODER).open()
    assert json.loads((tmp_path / "ten_a" / "state.json").read_text())["body"]["encoder"] == ENCODER


def test_changes_and_searches_go_on_while_segments_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(tmp_path / "ten_a")
    index.load([entries()], seq=1)
    reached, go_on = threading.Event(), threading.Event()
    build = Neighbours.build

    def slow(vectors: np.ndarray, seed: int = 0) -> Neighbours:
        reached.set()
        assert go_on.wait(30)
        return build(vectors, seed)

    monkeypatch.setattr(Neighbours, "build", slow)
    merging = threading.Thread(target=index.compact)
    merging.start()
    assert reached.wait(30)
    late = entries(40, seed=9, name="late")
    for number, one in enumerate(late):
        index.update([one], documents=[f"doc_a{number}"], seq=2 + number)
        assert one.adapter_id in index and f"a{number}" not in index
    go_on.set()
    merging.join(30)
    expected = exact([*entries()[40:], *late])
    assert len(index) == COUNT and index.seq == 41
    assert [results(index, number) for number in range(80)] == [results(expected, number) for number in range(80)]
    again = opened(tmp_path / "ten_a")
    assert again.open() and again.seq == 1


def test_a_failed_merge_changes_nothing(stored: TenantIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.update(entries(150, seed=5, name="new"), seq=8)
    before = results(stored, 3)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Neighbours, "save", full)
        with pytest.raises(OSError, match="no space"):
            stored.compact()
    assert results(stored, 3) == before
    stored.compact()
    assert results(stored, 3) == before and not stored.wants_compaction


def test_neighbours_find_nearly_all_on_clustered_vectors() -> None:
    rng = np.random.default_rng(0)
    seeds = unit(100)
    vectors = seeds[rng.integers(100, size=20_000)] + rng.normal(size=(20_000, DIMENSION)).astype(np.float32) * 0.1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Neighbours.build(vectors)
    queries = unit(50, seed=3)
    found = sum(
        len(set(np.argsort(-(vectors @ query))[:10]) & set(index.search(query, 64).tolist())) for query in queries
    )
    assert found >= 0.99 * 500


def test_a_mapped_index_finds_the_same_without_threads_that_read_ahead(tmp_path: Path) -> None:
    vectors = unit(4000)
    built = Neighbours.build(vectors)
    built.save(tmp_path / "neighbours.faiss")
    mapped = Neighbours.load(tmp_path / "neighbours.faiss", built.probes)
    for row in range(100):
        assert np.array_equal(mapped.search(vectors[row], 10), built.search(vectors[row], 10))
    # They would go on after a search, and end the process when its file is cut off meanwhile.
    assert faiss.downcast_InvertedLists(mapped._index.invlists).prefetch_nthread == 0
