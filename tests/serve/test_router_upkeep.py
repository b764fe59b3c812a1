"""Deleted documents leave the files of tenants' indexes in bounded time, whoever has them in memory. Real registry and
files; times are set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import router.index
import router.search
from router.embed import Vectors
from router.index import TenantIndex
from router.storage import disk_state
from serve.deployments.router_index import TenantIndexes
from serve.deployments.router_upkeep import PURGE_AFTER_S, IndexUpkeep
from serve.registry import Registry
from serve.registry.records import NewCentroids
from tests.serve.registry_helpers import Clock, acme, clock, make_ready, new_adapter, registry  # noqa: F401

# ruff: noqa: F811

DIMENSION = 8
COUNT = 21
MARKER = "zweitausendfuenfhundert"
SEED = 4711


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


def vectors(seed: int) -> Vectors:
    made = np.random.default_rng(seed).normal(size=(2, DIMENSION)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def publish(registry: Registry, tenant: str, seed: int, title: str = "", **post: object) -> str:
    """The ID of a new document."""
    parts = [(new_adapter(), NewCentroids("minilm", "1", vectors(seed)))]
    return make_ready(registry, tenant, title or f"Sheet {seed}", f"Text {seed}.", parts, **post).document_id


class Bench:
    """A tenant with an index on disk, one document of which is to be deleted."""

    def __init__(self, registry: Registry, tenant: str, folder: Path, clock: Clock) -> None:
        self.registry, self.tenant, self.folder, self.clock = registry, tenant, folder, clock
        for number in range(COUNT):
            publish(registry, tenant, number)
        self.secret = publish(registry, tenant, SEED, f"Sheet {MARKER}")
        self.indexes = self.fresh()
        self.indexes.current(tenant)
        deadline = time.monotonic() + 60
        while not (folder / tenant / "state.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert self.traces() == {MARKER.encode(), vectors(SEED)[0].tobytes()}

    def fresh(self) -> TenantIndexes:
        """As of another replica, or after a restart."""
        return TenantIndexes(self.registry, NamedEncoder(), self.folder, clock=self.clock)

    def upkeep(self, indexes: TenantIndexes) -> IndexUpkeep:
        return IndexUpkeep(self.registry, indexes, self.folder, clock=self.clock)

    def traces(self) -> set[bytes]:
        """What of the secret document is in any file."""
        content = [path.read_bytes() for path in self.folder.rglob("*") if path.is_file()]
        return {one for one in (MARKER.encode(), vectors(SEED)[0].tobytes()) if any(one in file for file in content)}

    def rounds(self, upkeep: IndexUpkeep, seconds: float) -> None:
        """So many seconds of upkeep, once a minute."""
        for _ in range(int(seconds // 60)):
            self.clock.now += 60
            upkeep.run_once()
            self.settle(upkeep._indexes)

    def settle(self, indexes: TenantIndexes) -> None:
        """Wait until nothing is written any more in the background."""
        deadline = time.monotonic() + 60
        while any(one.compacting for one in indexes._tenants.values()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def bench(registry: Registry, acme: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(router.index, "FLAT_ROWS", 40)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 10)
    return Bench(registry, acme, tmp_path / "router-index", clock)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_an_index_in_memory_is_written_anew_though_nobody_asks(bench: Bench, how: str) -> None:
    upkeep = bench.upkeep(bench.indexes)
    if how == "deleted":
        bench.registry.delete_document(bench.tenant, bench.secret)
    else:
        publish(bench.registry, bench.tenant, 5, "Sheet", document_id=bench.secret)
    bench.rounds(upkeep, 240)
    assert bench.traces(), "it is not done at every deletion"
    bench.rounds(upkeep, PURGE_AFTER_S - 240)
    assert bench.traces() == set()
    state = disk_state(bench.folder / bench.tenant)
    assert state is not None and state.seq == bench.registry.head(bench.tenant), "kept, for the next start"
    assert len(bench.fresh().current(bench.tenant)) == COUNT + (how == "replaced")


def test_files_of_an_index_that_is_not_in_memory_are_removed(bench: Bench) -> None:
    upkeep = bench.upkeep(bench.fresh())
    bench.rounds(upkeep, PURGE_AFTER_S)
    publish(bench.registry, bench.tenant, 99)
    bench.registry.mark_stale("base-2", "gen-2")
    bench.rounds(upkeep, PURGE_AFTER_S)
    assert len(bench.traces()) == 2, "a new document, and stale adapters, are no reason"
    bench.registry.delete_document(bench.tenant, bench.secret)
    bench.rounds(upkeep, 240)
    assert len(bench.traces()) == 2
    bench.rounds(upkeep, PURGE_AFTER_S - 240)
    assert bench.traces() == set() and not (bench.folder / bench.tenant).exists()
    assert len(bench.fresh().current(bench.tenant)) == COUNT + 1, "from the registry"


def test_what_never_was_in_the_files_is_no_reason_to_remove_them(bench: Bench) -> None:
    """As every refinement replaces adapters."""
    late = publish(bench.registry, bench.tenant, 99)
    for number in range(100, 104):
        publish(bench.registry, bench.tenant, number, "Sheet 99", document_id=late)
    before = disk_state(bench.folder / bench.tenant)
    bench.rounds(bench.upkeep(bench.fresh()), 2 * PURGE_AFTER_S)
    bench.indexes.current(bench.tenant)
    bench.rounds(bench.upkeep(bench.indexes), 2 * PURGE_AFTER_S)
    assert disk_state(bench.folder / bench.tenant) == before


def test_a_deletion_that_the_state_knows_of_is_carried_out_by_others(bench: Bench) -> None:
    """A replica wrote its state with the document among what is gone, and then was no more."""
    bench.registry.delete_document(bench.tenant, bench.secret)
    for number in range(100, 110):
        publish(bench.registry, bench.tenant, number)
    index = bench.indexes.current(bench.tenant)
    index._commit(index._folder, index.seq)  # type: ignore[arg-type]
    state = disk_state(bench.folder / bench.tenant)
    assert state is not None and state.gone_since == bench.clock.now and len(bench.traces()) == 2
    bench.rounds(bench.upkeep(bench.fresh()), PURGE_AFTER_S)
    assert bench.traces() == set()


def test_of_two_replicas_either_order_ends_without_the_text(bench: Bench) -> None:
    other = bench.fresh()
    other.current(bench.tenant)
    mine, theirs = bench.upkeep(bench.indexes), bench.upkeep(other)
    bench.registry.delete_document(bench.tenant, bench.secret)
    for _ in range(int(PURGE_AFTER_S // 60)):
        bench.rounds(mine, 60)
        theirs.run_once()
        bench.settle(other)
    assert bench.traces() == set()
    for indexes in (bench.indexes, other, bench.fresh()):
        index = indexes.current(bench.tenant)
        found = [index.search(vectors(seed)[0], ())[0].score for seed in range(COUNT)]
        assert len(index) == COUNT and found == pytest.approx([0.6] * COUNT, abs=1e-5)
    # And once more, now that only one of them has files.
    gone = publish(bench.registry, bench.tenant, SEED, f"Sheet {MARKER}")
    for indexes in (other, bench.indexes):
        index = indexes.current(bench.tenant)
        index.compact(bench.clock.now + 1)
    bench.registry.delete_document(bench.tenant, gone)
    for _ in range(int(PURGE_AFTER_S // 60)):
        bench.rounds(theirs, 60)
        mine.run_once()
        bench.settle(bench.indexes)
    assert bench.traces() == set()


def test_folders_of_tenants_that_are_no_more_and_damaged_ones_go_at_once(bench: Bench) -> None:
    gone = bench.folder / "ten_gone"
    (bench.folder / bench.tenant).rename(gone)
    damaged = bench.folder / bench.registry.create_tenant("globex").id
    damaged.mkdir()
    (damaged / "state.json").write_text("{}")
    upkeep = bench.upkeep(bench.fresh())
    upkeep.run_once()
    assert not gone.exists() and not damaged.exists() and bench.traces() == set()
    upkeep.run_once()


def test_a_tenant_that_fails_does_not_keep_others_from_their_turn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    globex = bench.registry.create_tenant("globex").id
    (bench.folder / globex).mkdir()
    followed_on = TenantIndexes.followed_on

    def fails(indexes: TenantIndexes, tenant_id: str) -> TenantIndex | None:
        if tenant_id == globex:
            raise OSError("no such database")
        return followed_on(indexes, tenant_id)

    monkeypatch.setattr(TenantIndexes, "followed_on", fails)
    bench.registry.delete_document(bench.tenant, bench.secret)
    bench.rounds(bench.upkeep(bench.indexes), PURGE_AFTER_S)
    assert bench.traces() == set() and f"of {globex} could not be looked at" in caplog.text


def test_it_runs_by_itself_until_it_is_stopped(bench: Bench) -> None:
    bench.registry.delete_document(bench.tenant, bench.secret)
    bench.clock.now += PURGE_AFTER_S
    upkeep = IndexUpkeep(bench.registry, bench.fresh(), bench.folder, every_s=0.01, clock=bench.clock)
    upkeep.start()
    deadline = time.monotonic() + 30
    while bench.traces():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    upkeep.stop()
    upkeep._thread.join(30)
    assert not upkeep._thread.is_alive()
