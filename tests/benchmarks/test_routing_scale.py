"""The benchmark of routing at scale, on a small scale and without an encoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import router.index
import router.search
from benchmarks import routing_scale
from benchmarks.routing_scale import Row, Seeds, measure, perturbed, report, write
from router.text import words


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    found = dict(list(routing_scale.texts().items())[:40])
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(found), 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Seeds([sorted(words(text)) for text in found.values()], list(found), vectors, perturbed(vectors, rng))


@pytest.fixture
def row(seeds: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Row:
    """Large enough, by these limits, for an index of neighbours on disk."""
    monkeypatch.setattr(router.index, "FLAT_ROWS", 1000)
    monkeypatch.setattr(router.search, "MAX_EXACT_ROWS", 100)
    return measure(seeds, 2400, 2, 40, tmp_path)


def test_a_case(row: Row, tmp_path: Path) -> None:
    assert (row.rows, row.tenants) == (2400, 2)
    assert row.recall >= 0.99 and row.same_best >= 0.9 and row.probes >= 1
    assert row.file_bytes > 2400 * 32 * 4 and row.index_bytes > 0
    assert 0 < row.search.p50 <= row.search.p99 and 0 < row.insert_visible.p50 and row.while_inserting.p50 > 0
    write([row, replace(row, rows=1_000_000)], tmp_path)
    text = (tmp_path / "routing_scale.md").read_text()
    assert text == report([row, replace(row, rows=1_000_000)], float(text.split("average): ")[1].split(";")[0]))
    assert "| 2,400 | 2 |" in text and "| 1,000,000 | 2 |" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert tables == [9] * 4 + [11] * 4
    assert json.loads((tmp_path / "routing_scale.json").read_text())["rows"][0]["recall"] == row.recall


def test_real_texts_are_distinct() -> None:
    found = routing_scale.texts()
    assert len(found) == len(set(found.values())) > 500
    assert all(len(text) > 40 for text in found.values())


def test_perturbed_copies_stay_near(seeds: Seeds) -> None:
    copies = perturbed(seeds.vectors, np.random.default_rng(1))
    cosines = (copies * seeds.vectors).sum(axis=1)
    np.testing.assert_allclose(np.linalg.norm(copies, axis=1), 1, atol=1e-5)
    assert 0.75 < cosines.mean() < 0.95
