"""What was deleted or replaced leaves the files of an index, also with several replicas at the same folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import router.index
import router.search
from router.index import AdapterEntry, TenantIndex
from router.lexical import term
from router.neighbours import Neighbours
from router.storage import IndexDamaged, SegmentFolder, disk_state, holds_any, remove_folder, remove_leftovers

DIMENSION = 16
COUNT = 600
MARKER = "zweitausendfuenfhundert"


def unit(rows: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def entry(name: str, seed: int, title: str = "") -> AdapterEntry:
    title = title or f"Sheet {name}"
    return AdapterEntry.of_document(f"adp_{name}", "ten_a", f"doc_{name}", title, f"The {name}.", unit(2, seed))


SECRET = entry("secret", 4711, f"Sheet {MARKER}")
TRACES = {
    "title": MARKER.encode(), "document": b"doc_secret", "adapter": b"adp_secret",
    "word": term(MARKER).to_bytes(8, "little"), "first vector": SECRET.centroids[0].tobytes(),
    "second vector": SECRET.centroids[1].tobytes(),
}  # fmt: skip


def traces(folder: Path) -> set[str]:
    """What of the secret document is in any file."""
    content = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {name for name, what in TRACES.items() if any(what in one for one in content)}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.index, "FLAT_ROWS", 200)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 200)


def opened(folder: Path, clock: Clock) -> TenantIndex:
    return TenantIndex("ten_a", DIMENSION, folder, "minilm 1", clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ten_a"


@pytest.fixture
def stored(folder: Path, clock: Clock) -> TenantIndex:
    index = opened(folder, clock)
    index.load([[*(entry(f"a{i}", i) for i in range(COUNT)), SECRET]], seq=7)
    index.compact()
    assert traces(folder) == set(TRACES) and not index.holds_gone(clock.now + 1)
    return index


def names(index: TenantIndex, seed: int) -> list[str]:
    return [one.entry.adapter_id for one in index.search(unit(2, seed)[0], ())]


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_what_is_gone_is_out_of_the_files_when_its_time_has_come(
    stored: TenantIndex, folder: Path, clock: Clock, how: str
) -> None:
    clock.now = 2_000.0
    stored.update([] if how == "deleted" else [entry("new", 1)], documents=["doc_secret"], seq=8)
    assert not stored.wants_compaction, "a search does not care"
    assert not stored.holds_gone(2_000.0) and stored.holds_gone(2_000.5)
    stored.compact()
    stored.compact(2_000.0)
    assert traces(folder) == set(TRACES), "not yet"
    before = [names(stored, seed) for seed in range(9)]
    stored.compact(2_000.5)
    assert traces(folder) == set() and not stored.holds_gone(9_999.0)
    assert [names(stored, seed) for seed in range(9)] == before
    again = opened(folder, clock)
    assert again.open() and again.seq == 8 and len(again) == len(stored) == COUNT + (how == "replaced")
    assert [names(again, seed) for seed in range(9)] == before


def test_the_time_of_what_is_gone_outlives_the_process(stored: TenantIndex, folder: Path, clock: Clock) -> None:
    clock.now = 2_000.0
    stored.update(documents=["doc_secret"], seq=8)
    stored.update([entry(f"b{i}", 1_000 + i) for i in range(110)], seq=9)
    clock.now = 3_000.0
    stored.compact()
    assert traces(folder) == set(TRACES), "only the new documents were merged"
    state = disk_state(folder)
    assert state is not None and state.gone_since == 2_000.0 and state.seq == 9
    again = opened(folder, clock)
    assert again.open() and "adp_secret" not in again and again.holds_gone(2_001.0)
    again.compact(2_001.0)
    assert traces(folder) == set() and len(again) == COUNT + 110


def test_a_segment_of_which_nothing_is_left_goes(stored: TenantIndex, folder: Path, clock: Clock) -> None:
    everything = [f"doc_a{i}" for i in range(COUNT)]
    stored.update(documents=[*everything, "doc_secret"], seq=8)
    assert len(stored) == 0 and traces(folder) == set(TRACES)
    stored.compact(clock.now + 1)
    assert traces(folder) == set() and not list(folder.glob("segment-*"))
    again = opened(folder, clock)
    assert again.open() and (len(again), again.seq) == (0, 8)


def test_a_look_that_finds_nothing_to_do_leaves_segments_free_to_be_merged(stored: TenantIndex, clock: Clock) -> None:
    stored.update([entry("b", 900)], seq=8)
    stored.compact(clock.now + 1)
    stored.update([entry("c", 901)], seq=9)
    assert len(stored._snapshot.views) == 2, "the large segment, and one of both new documents"


def test_a_file_whose_entries_have_moved_to_memory_does_not_keep_them(
    stored: TenantIndex, folder: Path, clock: Clock
) -> None:
    """A segment that has shrunk is small again, and the next change merges it with others in memory."""
    stored.update(documents=[f"doc_a{i}" for i in range(20, COUNT)], seq=8)
    stored.compact(clock.now + 1)
    assert len(list(folder.glob("segment-*"))) == 1
    stored.update([entry("b", 900)], seq=9)
    assert len(stored._snapshot.views) == 1 and not stored._snapshot.views[0].name
    stored.update(documents=["doc_secret"], seq=10)
    assert traces(folder) == set(TRACES)
    stored.compact(clock.now + 1)
    assert traces(folder) == set()
    again = opened(folder, clock)
    assert again.open() and again.seq == 10 and len(again) == 21 and "adp_b" in again


def test_what_goes_while_segments_are_written_anew_goes_next_time(
    stored: TenantIndex, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.update(documents=["doc_a1"], seq=8)
    reached, go_on = threading.Event(), threading.Event()
    build = Neighbours.build

    def slow(vectors: np.ndarray, seed: int = 0) -> Neighbours:
        reached.set()
        assert go_on.wait(30)
        return build(vectors, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Neighbours, "build", slow)
        writing = threading.Thread(target=stored.compact, args=(clock.now + 1,))
        writing.start()
        assert reached.wait(30)
        stored.update([entry("b", 900)], documents=["doc_secret"], seq=9)
        go_on.set()
        writing.join(30)
    assert traces(folder) == set(TRACES) and stored.holds_gone(clock.now + 1)
    stored.compact(clock.now + 1)
    assert traces(folder) == set() and "adp_b" in stored and len(stored) == COUNT


def test_a_replica_with_an_older_state_does_not_bring_files_back(
    stored: TenantIndex, folder: Path, clock: Clock
) -> None:
    """Both have mapped the same segment; one writes it anew, the other has yet to learn of the deletion."""
    other = opened(folder, clock)
    assert other.open()
    stored.update(documents=["doc_secret"], seq=8)
    stored.compact(clock.now + 1)
    assert traces(folder) == set()
    mine = disk_state(folder)
    other.update([entry(f"b{i}", 1_000 + i) for i in range(110)], seq=8)
    assert other.wants_compaction
    other.compact()
    assert names(other, 4711)[0] == "adp_secret", "what it has mapped stays usable"
    assert disk_state(folder) == mine and traces(folder) == set()
    other.update(documents=["doc_secret"], seq=9)
    assert not other.holds_gone(clock.now + 1) and "adp_secret" not in other
    again = opened(folder, clock)
    assert again.open() and again.seq == 8 and len(again) == COUNT


def test_files_tell_which_adapters_they_hold(stored: TenantIndex, folder: Path) -> None:
    state = disk_state(folder)
    assert state is not None and (state.seq, state.gone_since) == (7, None) and state.names == stored.committed
    assert holds_any(folder, state, ["adp_x", "adp_secret"]) and not holds_any(folder, state, ["adp_x"])
    assert not holds_any(folder, state, [])
    assert disk_state(folder.parent) is None
    next(folder.glob("segment-*")).rename(folder / "elsewhere")
    with pytest.raises(IndexDamaged, match="lacks"):
        disk_state(folder)
    with pytest.raises(IndexDamaged):
        holds_any(folder, state, ["adp_x"])


def test_leftovers_of_killed_processes_are_removed(stored: TenantIndex, folder: Path) -> None:
    used, = folder.glob("segment-*")
    for name in ("segment-lost", "writing-dead"):
        (folder / name).mkdir()
        (folder / name / "columns.titles.values.npy").write_bytes(MARKER.encode())
    with SegmentFolder(folder, "ten_a", "minilm 1", DIMENSION).staged() as staging:
        remove_leftovers(folder, time.time() - 60)
        assert {path.name for path in folder.iterdir()} >= {"segment-lost", "writing-dead", staging.name}, "too young"
        remove_leftovers(folder, time.time() + 60)
        left = {path.name for path in folder.iterdir()}
        assert left == {used.name, staging.name, "state.json", "lock"}, "what is being written stays"
    assert opened(folder, Clock()).open()


def test_an_index_whose_files_were_removed_goes_on_and_is_written_again_as_a_whole(
    stored: TenantIndex, folder: Path, clock: Clock
) -> None:
    stored.update(documents=["doc_secret"], seq=8)
    remove_folder(folder)
    assert not folder.exists() and names(stored, 3)[0] == "adp_a3"
    assert not stored.holds_gone(clock.now + 1)
    stored.update([entry(f"b{i}", 1_000 + i) for i in range(110)], seq=9)
    before = [names(stored, seed) for seed in range(9)]
    stored.compact()
    again = opened(folder, clock)
    assert again.open() and again.seq == 9 and len(again) == COUNT + 110
    assert [names(again, seed) for seed in range(9)] == before == [names(stored, seed) for seed in range(9)]
    assert traces(folder) == set()
    remove_folder(folder)
    remove_folder(folder)
    assert not again.holds_gone(clock.now + 1) and not opened(folder, clock).open()
