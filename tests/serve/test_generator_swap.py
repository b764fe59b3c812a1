"""Another base or hypernetwork under live documents: all of them get new adapters, none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypernet.generate import HypernetGenerator
from tests.serve.generator_bench import Bench, open_bench
from tests.tiny_pair import make_pair

TEXTS = [f"Room {number} is blue. It has {number} doors." for number in range(5)]


def states(bench: Bench) -> list[str]:
    return sorted(entry.state for entry in bench.registry.routable(bench.tenant_id))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pairs")
    return [make_pair(folder / str(seed), seed) for seed in (0, 1)]


def test_a_swapped_pair_makes_all_documents_anew(tmp_path: Path, pairs: list[tuple[Path, Path]]) -> None:
    (base_a, checkpoint_a), (base_b, checkpoint_b) = pairs
    generator_a = HypernetGenerator.load(checkpoint_a, base_a)
    generator_b = HypernetGenerator.load(checkpoint_b, base_b, chunks_per_part=2)
    assert generator_a.base_fingerprint != generator_b.base_fingerprint
    long = "\n\n".join(f"House {number} has {number + 3} rooms and a garden." for number in range(60))
    with open_bench(tmp_path, base_a, generator_a) as first:
        posted = [first.post(text) for text in [*TEXTS, long]]
        while first.worker.run_once():
            pass
        old = {post.document.id: {adapter.id for adapter in first.current(post)} for post in posted}
        assert set(states(first)) == {"ready"}

    # One document at a time, to look at it on the way.
    with open_bench(tmp_path, base_b, generator_b, batch_chunks=1, hold_at="leased") as second:
        second.worker.start()
        while second.registry.count_jobs("generate")["running"] == 0:
            pass
        # Nobody is routed to what fits the new base no longer, and every document is on its way.
        assert set(states(second)) == {"stale"}
        assert second.registry.count_stale_pending() == len(posted)
        assert all(second.document(post).state == "processing" for post in posted)

    with open_bench(tmp_path, base_b, generator_b, batch_chunks=1) as third:
        left = []
        while third.worker.run_once():
            left.append(third.registry.count_stale_pending())
        assert left == list(range(len(posted) - 1, -1, -1))
        for post in posted:
            assert third.document(post).state == "ready"
            for adapter in third.current(post):
                assert adapter.id not in old[post.document.id] and adapter.state == "ready"
                assert adapter.base_fingerprint == generator_b.base_fingerprint
                assert adapter.generator_fingerprint == generator_b.fingerprint
        assert len(third.current(posted[-1])) > 1  # as the new pair cuts it
        assert set(states(third)) == {"ready"}


def test_the_same_pair_makes_nothing_anew(tmp_path: Path, pairs: list[tuple[Path, Path]]) -> None:
    base, checkpoint = pairs[0]
    generator = HypernetGenerator.load(checkpoint, base)
    with open_bench(tmp_path, base, generator) as first:
        posted = first.post(TEXTS[0])
        first.worker.run_once()
        before = first.current(posted)
    with open_bench(tmp_path, base, generator) as second:
        second.worker.start()
        assert second.registry.count_jobs()["queued"] == 0
        assert second.current(posted) == before
