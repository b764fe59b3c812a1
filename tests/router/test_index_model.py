"""An index against a model that keeps everything in a dict and compares everything with everything.

Small limits make segments merge, get an index of neighbours and go to disk within a few changes.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import router.index
import router.search
from router.index import AdapterEntry, Scope, TenantIndex

DIMENSION = 8
DOCUMENTS = [f"doc_{i}" for i in range(30)]
WORDS = ["corvo", "lumen", "aster", "mini", "max", "kerosene", "crate", "3", "7", "gate"]
COLLECTIONS = [None, "col_a", "col_b"]
documents = st.sampled_from(DOCUMENTS)
vocabulary = st.lists(st.sampled_from(WORDS), max_size=6).map(frozenset)


def unit(seed: int, rows: int) -> np.ndarray:
    """float32 [rows, DIMENSION], normalised."""
    vectors = np.random.default_rng(seed).normal(size=(rows, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Model:
    """What a search is to give, by definition."""

    def __init__(self) -> None:
        self.entries: dict[str, AdapterEntry] = {}

    def visible(self, scope: Scope) -> list[AdapterEntry]:
        return [
            one for one in self.entries.values()
            if scope.collection_id in (None, one.collection_id) and scope.document_id in (None, one.document_id)
            and (scope.adapter_ids is None or one.adapter_id in scope.adapter_ids)
        ]

    def scores(self, vector: np.ndarray, query: frozenset[str], scope: Scope) -> dict[str, tuple[float, float]]:
        """Adapter -> score, rank."""
        visible = self.visible(scope)
        held: dict[str, set[str]] = {}
        for one in visible:
            held.setdefault(one.document_id, set()).update(one.words)

        def count(word: str) -> int:
            return sum(word in words for words in held.values())

        def weight(word: str) -> float:
            return math.log1p(len(held) / (count(word) or 0.5))

        result = {}
        total = sum(map(weight, query))
        for one in visible:
            share = sum(weight(word) for word in query & one.words) / total if total else 0.0
            score = 0.6 * float((one.centroids @ vector).max()) + 0.4 * share
            heading = [word for word in one.heading_words if len(held) < 3 or 2 * count(word) <= len(held)]
            named = sum(map(weight, heading))
            unsaid = sum(weight(word) for word in heading if word not in query) / named if named else 0.0
            result[one.adapter_id] = score, score - 0.12 * unsaid
        return result

    def parts(self, document_id: str, vector: np.ndarray, query: frozenset[str], scope: Scope) -> dict[str, float]:
        """Adapter -> rank among the visible parts of its document."""
        parts = [one for one in self.visible(scope) if one.document_id == document_id]
        counts = {word: sum(word in one.part_words for one in parts) for word in query}
        weights = {word: math.log(len(parts) / count) for word, count in counts.items() if count}
        total = sum(weights.values())
        return {
            one.adapter_id: 0.6 * float((one.centroids @ vector).max())
            + 0.4 * (sum(w for word, w in weights.items() if word in one.part_words) / total if total else 0.0)
            for one in parts
        }


class IndexMachine(RuleBasedStateMachine):
    """Changes and searches in any order."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="imprint-index-"))
        self.index = self.fresh()
        self.model = Model()
        self.log: list[list[str]] = []
        """The documents that each change touched."""

    def fresh(self) -> TenantIndex:
        return TenantIndex("ten_a", DIMENSION, self.folder / "ten_a", "minilm 1")

    def change(self, add: list[AdapterEntry], remove: list[str], dropped: list[str]) -> None:
        self.log.append([*dropped, *(one.document_id for one in add),
                         *(self.model.entries[name].document_id for name in remove if name in self.model.entries)])
        self.index.update(add, remove, dropped, seq=len(self.log))
        kept = {name: one for name, one in self.model.entries.items()
                if name not in remove and one.document_id not in dropped}
        self.model.entries = kept | {one.adapter_id: one for one in add}

    @rule(several=st.lists(st.tuples(documents, st.lists(vocabulary, min_size=1, max_size=3), vocabulary,
                                     st.sampled_from(COLLECTIONS)), min_size=1, max_size=6),
          seed=st.integers(0, 999))
    def replace(self, several: list[tuple[str, list[frozenset[str]], frozenset[str], str | None]], seed: int) -> None:
        number = len(self.log)
        entries = {
            document: [
                AdapterEntry(
                    adapter_id=f"adp_{number}_{document}_{part}", tenant_id="ten_a", document_id=document,
                    title=f"Sheet {document}", centroids=unit(seed + part, 1 + (seed + part) % 4),
                    words=words | heading, heading_words=heading, part_words=words if len(texts) > 1 else frozenset(),
                    collection_id=collection, part=part, parts=len(texts),
                )
                for part, words in enumerate(texts)
            ]
            for document, texts, heading, collection in several
        }
        self.change([one for parts in entries.values() for one in parts], [], list(entries))

    @rule(gone=st.lists(documents, min_size=1, max_size=3))
    def delete(self, gone: list[str]) -> None:
        self.change([], [], gone)

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data())
    def remove_one_adapter(self, data: st.DataObject) -> None:
        self.change([], [data.draw(st.sampled_from(sorted(self.model.entries)))], [])

    @rule()
    def compact(self) -> None:
        self.index.compact()

    @rule()
    def purge(self) -> None:
        """Of what is gone nothing is left in any file."""
        self.index.compact(math.inf)
        assert not self.index.holds_gone(math.inf)
        gone = {one for change in self.log for one in change} - {one.document_id for one in self.model.entries.values()}
        content = b"".join(path.read_bytes() for path in self.folder.rglob("columns.document_ids.values.npy"))
        assert not [one for one in gone if re.search(rb"%b(?!\d)" % one.encode(), content)]

    @precondition(lambda self: (self.folder / "ten_a" / "state.json").exists())
    @rule()
    def reopen(self) -> None:
        """What was on disk, and then what has changed since."""
        self.index = self.fresh()
        assert self.index.open() and 0 < self.index.seq <= len(self.log)
        touched = {document for change in self.log[self.index.seq :] for document in change}
        entries = [one for one in self.model.entries.values() if one.document_id in touched]
        self.index.update(entries, documents=touched, seq=len(self.log))

    @rule(seed=st.integers(0, 999), query=vocabulary, collection=st.sampled_from(COLLECTIONS),
          limit=st.integers(1, 6), data=st.data())
    def route(self, seed: int, query: frozenset[str], collection: str | None, limit: int, data: st.DataObject) -> None:
        names = sorted(self.model.entries)
        listed = data.draw(st.none() | st.lists(st.sampled_from([*names, "adp_absent"]), max_size=8))
        self.check_search(unit(seed, 1)[0], query, Scope(collection, listed), limit)

    def check_search(self, vector: np.ndarray, query: frozenset[str], scope: Scope, limit: int) -> None:
        expected = self.model.scores(vector, query, scope)
        best: dict[str, tuple[float, float]] = {}
        for name, (score, rank) in expected.items():
            document = self.model.entries[name].document_id
            best[document] = max(best.get(document, (-9.0, -9.0)), (rank, score))
        results = self.index.search(vector, query, scope, limit)
        ranks = sorted((rank for rank, _ in best.values()), reverse=True)[:limit]
        assert [result.rank for result in results] == pytest.approx(ranks, abs=1e-5)
        for result in results:
            entry = self.model.entries[result.entry.adapter_id]
            assert (result.entry.document_id, result.entry.part) == (entry.document_id, entry.part)
            assert (result.rank, result.score) == pytest.approx(best[entry.document_id], abs=1e-5)
            parts = self.model.parts(entry.document_id, vector, query, scope)
            assert parts[entry.adapter_id] >= max(parts.values()) - 1e-5

    @precondition(lambda self: self.model.entries)
    @rule(data=st.data(), seed=st.integers(0, 999), query=vocabulary)
    def route_within_a_document(self, data: st.DataObject, seed: int, query: frozenset[str]) -> None:
        document = data.draw(st.sampled_from(sorted({one.document_id for one in self.model.entries.values()})))
        vector = unit(seed, 1)[0]
        results = self.index.search_parts(document, vector, query, limit=9)
        parts = self.model.parts(document, vector, query, Scope())
        assert {result.entry.adapter_id for result in results} == set(parts)
        if len(parts) > 1:
            assert [result.rank for result in results] == pytest.approx(
                sorted(parts.values(), reverse=True), abs=1e-5
            )

    @invariant()
    def finds_the_same(self) -> None:
        query = frozenset(WORDS[len(self.log) % 7 :][:3])
        self.check_search(unit(len(self.log), 1)[0], query, Scope(), 5)

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.index) == len(self.model.entries)
        for name, one in self.model.entries.items():
            found = self.index.get(name)
            assert found is not None and (found.title, found.state) == (one.title, one.state)
            assert found.collection_id == one.collection_id

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


@pytest.fixture(autouse=True, scope="module")
def small_limits() -> Any:
    """So that a dozen documents go through every stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router.index, "FLAT_ROWS", 16)
        patch.setattr(router.index, "_TAIL_ROWS", 3)
        patch.setattr(router.index, "_DEAD_SHARE", 0.6)
        patch.setattr(router.search, "MAX_EXACT_ROWS", 6)
        yield


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=40, stateful_step_count=30, derandomize=True, deadline=None, database=None)
