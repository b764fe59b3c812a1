"""A document too long for one adapter: all its parts appear together, or none does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hypernet.generate import HypernetGenerator
from serve.blobs import BlobStore, StoredFolder
from tests.serve.generator_bench import Bench, open_bench
from tests.tiny_pair import make_pair

TEXT = "\n\n".join(f"Room {i} of the house has the colour number {i * 7}. It has {i} doors." for i in range(40))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def bench(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[Bench]:
    base, checkpoint = pair
    with open_bench(tmp_path, base, HypernetGenerator.load(checkpoint, base, chunks_per_part=2)) as opened:
        yield opened


def test_parts_are_published_together(bench: Bench) -> None:
    posted = bench.post(TEXT)
    assert bench.worker.run_once() == 1
    adapters = bench.current(posted)
    assert len(adapters) > 2
    assert [(a.part, a.parts, a.manifest["part"], a.manifest["parts"]) for a in adapters] == [
        (i, len(adapters), i, len(adapters)) for i in range(len(adapters))
    ]
    assert bench.document(posted).adapter_ids == tuple(adapter.id for adapter in adapters)
    assert bench.job(posted).adapter_id == adapters[0].id
    spans = [(chunk["start"], chunk["end"]) for adapter in adapters for chunk in adapter.manifest["chunks"]]
    # Nothing is left out: what no chunk covers is white space.
    assert spans[0][0] == 0 and spans[-1][1] == len(TEXT)
    assert all(not TEXT[end:start].strip() for (_, end), (start, _) in pairwise(spans))
    assert all(adapter.rank == 16 for adapter in adapters[:-1])
    routable = bench.registry.routable(bench.tenant_id)
    assert [(entry.part, list(entry.spans)) for entry in routable] == [
        (a.part, [(chunk["start"], chunk["end"]) for chunk in a.manifest["chunks"]]) for a in adapters
    ]
    # Each part has centroids of its own text.
    assert len({entry.centroids.tobytes() for entry in routable}) == len(adapters)
    assert bench.stored() == len(adapters) and list(bench.config.staging_dir.iterdir()) == []


def test_a_new_version_retires_all_parts_of_the_old_one(bench: Bench) -> None:
    posted = bench.post(TEXT, external_id="house")
    bench.worker.run_once()
    old = bench.current(posted)
    bench.post("The house was torn down.", external_id="house")
    bench.worker.run_once()
    (new,) = bench.current(posted)
    assert new.version == 2
    kept = [bench.registry.get_adapter(bench.tenant_id, adapter.id) for adapter in old]
    assert all(adapter is not None and adapter.retired_at is not None for adapter in kept)


def test_no_part_appears_where_one_cannot_be_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put = BlobStore.put_folder

    def put_until_full(self: BlobStore, prefix: str, local_dir: Path) -> StoredFolder:
        if len(self.list_folders(f"adapters/{bench.tenant_id}")) == 2:
            raise OSError("no space left on device")
        return put(self, prefix, local_dir)

    monkeypatch.setattr(BlobStore, "put_folder", put_until_full)
    posted = bench.post(TEXT)
    bench.worker.run_once()
    job = bench.job(posted)
    assert job.state == "queued" and "no space" in (job.error or "")
    assert bench.current(posted) == [] and bench.stored() == 0


def test_merging_makes_one_adapter_that_says_what_it_kept(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, checkpoint = pair
    generator = HypernetGenerator.load(checkpoint, base, max_rank=16, long_documents="merge")
    with open_bench(tmp_path, base, generator, long_documents="merge") as bench:
        posted = bench.post(TEXT)
        bench.worker.run_once()
        (adapter,) = bench.current(posted)
        assert adapter.rank == 16 and 0 < adapter.manifest["kept_energy"] < 1
        assert adapter.manifest["chunks"][-1]["end"] == len(TEXT)
