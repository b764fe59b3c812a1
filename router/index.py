"""The documents of one tenant, searched by centroid and by shared words; of a long document, by its parts.

Similarity of vectors alone mixes up near misses: of sixty data sheets of one company it finds the right one for about
two questions in three, since names and versions hardly move a vector. Shared words, weighed by how few documents hold
them, tell those apart. The score of an adapter is

    (1 - word_weight) * cosine of its nearest centroid  +  word_weight * share of the query's words that it holds

with each word counting by the logarithm of its rarity among the documents searched. Where names contain each other
("Corvo", "Corvo Mini"), the order of candidates also counts what the document's heading says and the query does not.

A long document has several adapters, each of a part of its text, and is as good as its best part, which is the one
that answers. Rarity counts documents, not parts: a name that all parts of one document share is no common word.
Which of its parts is best is another question. There rarity counts parts: what all of them say, above all the name of
what the document is about, is no evidence for any.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain

import faiss
import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.scoring import PartWeights, WordWeights, rank, relevance
from router.text import heading, part_title, words

MAX_RESCORED = 256
"""Adapters nearest by vector that are then scored by words."""
Span = tuple[int, int]


class State(StrEnum):
    """Whether an adapter may answer. One that may not stays in the index: the next best would answer about another
    document, or another part."""

    READY = "ready"
    DEGRADED = "degraded"
    """It failed the quality gate."""
    STALE = "stale"
    """It was made for another base model or generator."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterEntry:
    """One adapter: its centroids (float32 [n, dimension], L2-normalised) and the words of what it was made from.

    That is part `part` (from 0) of `parts` of the document, or all of it where `parts` is 1. `part_words` are the words
    to compare with those of other parts.
    """

    adapter_id: str
    tenant_id: str
    document_id: str
    title: str
    centroids: Vectors = field(repr=False)
    words: frozenset[str] = field(repr=False)
    heading_words: frozenset[str] = field(repr=False)
    part_words: frozenset[str] = field(default=frozenset(), repr=False)
    collection_id: str | None = None
    state: State = State.READY
    part: int = 0
    parts: int = 1

    @classmethod
    def of_document(
        cls,
        adapter_id: str,
        tenant_id: str,
        document_id: str,
        title: str,
        text: str,
        centroids: Vectors,
        collection_id: str | None = None,
        state: State = State.READY,
        spans: Sequence[Span] = (),
        part: int = 0,
        parts: int = 1,
        contexts: Sequence[str] = (),
    ) -> AdapterEntry:
        """An entry with the words of a document's title and of its text, or of those `spans` of the text alone.

        The heading is the document's in any case, as all its parts are about what it names. `contexts` are names that
        belong to the spans though they stand before them.
        """
        covered = "\n".join([*contexts, *(text[start:end] for start, end in spans)]) if spans else text
        return cls(
            adapter_id=adapter_id,
            tenant_id=tenant_id,
            document_id=document_id,
            title=title,
            centroids=centroids,
            words=words(f"{title}\n{covered}"),
            heading_words=words(heading(title, text)),
            part_words=words(f"{part_title(title)}\n{covered}") if parts > 1 else frozenset(),
            collection_id=collection_id,
            state=state,
            part=part,
            parts=parts,
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """What a search may see; None: everything of the tenant."""

    collection_id: str | None = None
    adapter_ids: Collection[str] | None = None
    document_id: str | None = None

    def allows(self, entry: AdapterEntry) -> bool:
        """Whether an entry is within the scope."""
        if self.collection_id is not None and entry.collection_id != self.collection_id:
            return False
        if self.document_id is not None and entry.document_id != self.document_id:
            return False
        return self.adapter_ids is None or entry.adapter_id in self.adapter_ids

    @property
    def everything(self) -> bool:
        """Whether no entry can be outside."""
        return self.collection_id is None and self.adapter_ids is None and self.document_id is None


@dataclass(frozen=True, slots=True)
class Scored:
    """A search result. `score` in -1..1 says how well the query fits, and `rank` orders the results."""

    entry: AdapterEntry
    score: float
    similarity: float
    word_share: float
    rank: float


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """Never changed after it was built, so a search needs no lock. `documents` is how many there are, and
    `document_frequency` how many of them hold a word, in whichever part."""

    entries: tuple[AdapterEntry, ...]
    owners: npt.NDArray[np.int64]
    rows: faiss.IndexFlatIP
    documents: int
    document_frequency: Counter[str]


class TenantIndex:
    """Searches run at any time on the snapshot that they find; changes build the next snapshot and swap it in."""

    def __init__(self, tenant_id: str, dimension: int) -> None:
        self.tenant_id = tenant_id
        self.dimension = dimension
        self._change = threading.Lock()
        self._snapshot = _build((), Counter(), dimension)

    def __len__(self) -> int:
        """The number of adapters."""
        return len(self._snapshot.entries)

    def __contains__(self, adapter_id: str) -> bool:
        return any(entry.adapter_id == adapter_id for entry in self._snapshot.entries)

    def get(self, adapter_id: str) -> AdapterEntry | None:
        """The entry of an adapter."""
        return next((entry for entry in self._snapshot.entries if entry.adapter_id == adapter_id), None)

    def parts(self, document_id: str) -> list[AdapterEntry]:
        """A document's entries, in the order of its parts."""
        found = (entry for entry in self._snapshot.entries if entry.document_id == document_id)
        return sorted(found, key=lambda entry: entry.part)

    def add(self, entry: AdapterEntry) -> None:
        """Put an adapter in, in place of the entry that it had. Raises ValueError, see `update`."""
        self.update([entry])

    def remove(self, adapter_id: str) -> None:
        """Take an adapter out; nothing happens when it is not there."""
        self.update(remove=[adapter_id])

    def update(
        self,
        add: Sequence[AdapterEntry] = (),
        remove: Iterable[str] = (),
        documents: Iterable[str] = (),
    ) -> None:
        """Take out the adapters `remove` and all of the `documents`, then put others in: one change, which no search
        sees a part of.

        Raises ValueError, and changes nothing, for an entry of another tenant and for centroids that are missing, not
        finite or of another dimension.
        """
        for entry in add:
            self._check(entry)
        with self._change:
            before = self._snapshot
            new = {entry.adapter_id: entry for entry in add}
            gone = new.keys() | set(remove)
            dropped = set(documents)
            kept = [e for e in before.entries if e.adapter_id not in gone and e.document_id not in dropped]
            kept_ids = {entry.adapter_id for entry in kept}
            left = [entry for entry in before.entries if entry.adapter_id not in kept_ids]
            # Counted on from before: counting all documents' words anew would take most of a change's time.
            touched = {entry.document_id for entry in chain(left, new.values())}
            frequency = before.document_frequency.copy()
            for held in _words_by_document(before.entries, touched):
                frequency.subtract(held)
            for held in _words_by_document(chain(kept, new.values()), touched):
                frequency.update(held)
            if left:
                frequency = +frequency  # without words that no document holds any more
            self._snapshot = _build((*kept, *new.values()), frequency, self.dimension)

    def search(
        self, vector: Vectors, query_words: Collection[str], scope: Scope | None = None, limit: int = 5
    ) -> list[Scored]:
        """The best `limit` documents within `scope`, best first, each with its adapter, or with that of the
        part that fits best among its parts. The score is the document's, that of its best adapter.

        `vector` is float32 [dimension], L2-normalised. What lies outside the scope is filtered before the search and
        has no influence on results or scores. Raises ValueError for a vector that is not finite or of another shape.
        """
        found = self._results(vector, query_words, scope or Scope())
        results: dict[str, Scored] = {}
        for result in found:
            results.setdefault(result.entry.document_id, result)  # they come best first
            if len(results) == limit:
                break
        parts: dict[str, list[Scored]] = {document_id: [] for document_id in results}
        for result in found:
            if result.entry.parts > 1 and result.entry.document_id in parts:
                parts[result.entry.document_id].append(result)
        return [
            replace(result, entry=_by_part(parts[document_id], query_words)[0].entry) if parts[document_id] else result
            for document_id, result in results.items()
        ]

    def search_parts(
        self, document_id: str, vector: Vectors, query_words: Collection[str], limit: int = 5
    ) -> list[Scored]:
        """The best `limit` parts of one document, best first, scored as if there were no other and ranked among
        themselves; empty where the document is not here. Raises ValueError as `search` does.
        """
        return _by_part(self._results(vector, query_words, Scope(document_id=document_id)), query_words)[:limit]

    def _results(self, vector: Vectors, query_words: Collection[str], scope: Scope) -> list[Scored]:
        """Adapters within the scope, best first; of more than MAX_RESCORED those that are nearest by vector."""
        vector = np.ascontiguousarray(vector, dtype=np.float32)
        if vector.shape != (self.dimension,) or not np.isfinite(vector).all():
            raise ValueError(f"a query vector must be {self.dimension} finite numbers")
        snapshot = self._snapshot
        if scope.everything:
            visible = np.ones(len(snapshot.entries), dtype=bool)
        else:
            visible = np.fromiter(map(scope.allows, snapshot.entries), dtype=bool, count=len(snapshot.entries))
        if not visible.any():
            return []
        nearest = [(snapshot.entries[i], value) for i, value in _nearest(snapshot, vector, visible).items()]
        if visible.all():
            weights = WordWeights(query_words, snapshot.document_frequency, snapshot.documents)
        else:
            relevant = frozenset(query_words).union(*(entry.heading_words for entry, _ in nearest))
            seen: dict[str, set[str]] = {}
            for i in np.flatnonzero(visible):
                entry = snapshot.entries[i]
                seen.setdefault(entry.document_id, set()).update(entry.words & relevant)
            weights = WordWeights(query_words, Counter(chain.from_iterable(seen.values())), len(seen))
        results = [_score(entry, similarity, weights) for entry, similarity in nearest]
        results.sort(key=lambda result: (-result.rank, result.entry.part, result.entry.adapter_id))
        return results

    def _check(self, entry: AdapterEntry) -> None:
        if entry.tenant_id != self.tenant_id:
            raise ValueError(f"{entry.adapter_id} belongs to another tenant")
        shape = entry.centroids.shape
        if len(shape) != 2 or shape[0] == 0 or shape[1] != self.dimension:
            raise ValueError(f"{entry.adapter_id}: centroids must be [n, {self.dimension}], not {list(shape)}")
        if not np.isfinite(entry.centroids).all():
            raise ValueError(f"{entry.adapter_id}: centroids are not finite")


def _build(entries: tuple[AdapterEntry, ...], frequency: Counter[str], dimension: int) -> _Snapshot:
    rows = faiss.IndexFlatIP(dimension)
    if entries:
        rows.add(np.concatenate([entry.centroids for entry in entries]).astype(np.float32, copy=False))
    owners = np.repeat(np.arange(len(entries)), [len(entry.centroids) for entry in entries])
    documents = len({entry.document_id for entry in entries})
    return _Snapshot(entries, owners, rows, documents, frequency)


def _words_by_document(entries: Iterable[AdapterEntry], documents: Collection[str]) -> Iterable[frozenset[str]]:
    """The words of each of these documents, over all its parts."""
    held: dict[str, frozenset[str]] = {}
    for entry in entries:
        if entry.document_id in documents:
            held[entry.document_id] = held.get(entry.document_id, frozenset()) | entry.words
    return held.values()


def _nearest(snapshot: _Snapshot, vector: Vectors, visible: npt.NDArray[np.bool_]) -> dict[int, float]:
    """Position of an entry -> cosine of its nearest centroid, for at least the MAX_RESCORED nearest entries."""
    allowed = visible[snapshot.owners]
    # Each entry takes up at most as many results as it has rows, so this many rows cover enough entries.
    most = int(np.bincount(snapshot.owners).max())
    count = min(int(allowed.sum()), MAX_RESCORED * most)
    parameters = None
    if not allowed.all():
        # The bitmap must outlive the search: the selector holds a bare pointer to it.
        bitmap = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bitmap))
        parameters = faiss.SearchParameters()
        parameters.sel = selector
    similarities, rows = snapshot.rows.search(vector[None], count, params=parameters)
    best: dict[int, float] = {}
    for similarity, row in zip(similarities[0].tolist(), rows[0].tolist(), strict=True):
        if row >= 0:
            best.setdefault(int(snapshot.owners[row]), similarity)  # rows come best first
    return best


def _score(entry: AdapterEntry, similarity: float, weights: WordWeights) -> Scored:
    word_share = weights.share(entry.words)
    score = relevance(similarity, word_share)
    return Scored(entry, score, similarity, word_share, rank(score, weights.unsaid(entry.heading_words)))


def _by_part(results: Sequence[Scored], query_words: Collection[str]) -> list[Scored]:
    """The parts of one document, best first, ranked by what tells them apart."""
    if len(results) < 2:
        return list(results)
    weights = PartWeights(query_words, [result.entry.part_words for result in results])
    ranked = [
        replace(result, rank=relevance(result.similarity, weights.share(result.entry.part_words)))
        for result in results
    ]
    return sorted(ranked, key=lambda result: (-result.rank, result.entry.part, result.entry.adapter_id))
