"""The adapters of one tenant, searched by centroid and by shared words.

Similarity of vectors alone mixes up near misses: of sixty data sheets of one company it finds the right one for about
two questions in three, since names and versions hardly move a vector. Shared words, weighed by how few documents hold
them, tell those apart. The score of an adapter is

    (1 - word_weight) * cosine of its nearest centroid  +  word_weight * share of the query's words that it holds

with each word counting by the logarithm of its rarity among the documents searched. Where names contain each other
("Corvo", "Corvo Mini"), the order of candidates also counts what the document's heading says and the query does not.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import faiss
import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.text import heading, words

WORD_WEIGHT = 0.4
HEADING_WEIGHT = 0.3
MAX_RESCORED = 256
"""Adapters nearest by vector that are then scored by words."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterEntry:
    """One adapter: its centroids (float32 [n, dimension], L2-normalised) and the words of its document.

    `available` is False for an adapter that must not be used although its document is the one asked about, such as
    one made for another base model.
    """

    adapter_id: str
    tenant_id: str
    document_id: str
    title: str
    centroids: Vectors = field(repr=False)
    words: frozenset[str] = field(repr=False)
    heading_words: frozenset[str] = field(repr=False)
    collection_id: str | None = None
    available: bool = True

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
        available: bool = True,
    ) -> AdapterEntry:
        """An entry with the words of a document's title and text."""
        return cls(
            adapter_id=adapter_id,
            tenant_id=tenant_id,
            document_id=document_id,
            title=title,
            centroids=centroids,
            words=words(f"{title}\n{text}"),
            heading_words=words(heading(title, text)),
            collection_id=collection_id,
            available=available,
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """What a search may see; None: everything of the tenant."""

    collection_id: str | None = None
    adapter_ids: Collection[str] | None = None

    def allows(self, entry: AdapterEntry) -> bool:
        """Whether an entry is within the scope."""
        if self.collection_id is not None and entry.collection_id != self.collection_id:
            return False
        return self.adapter_ids is None or entry.adapter_id in self.adapter_ids

    @property
    def everything(self) -> bool:
        """Whether no entry can be outside."""
        return self.collection_id is None and self.adapter_ids is None


@dataclass(frozen=True, slots=True)
class Scored:
    """A search result. `score` in -1..1 says how well query and document fit, and `rank` orders the results."""

    entry: AdapterEntry
    score: float
    similarity: float
    word_share: float
    rank: float


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """Never changed after it was built, so a search needs no lock."""

    entries: tuple[AdapterEntry, ...]
    owners: npt.NDArray[np.int64]
    rows: faiss.IndexFlatIP
    document_frequency: Counter[str]


class TenantIndex:
    """Searches run at any time on the snapshot that they find; changes build the next snapshot and swap it in."""

    def __init__(self, tenant_id: str, dimension: int) -> None:
        self.tenant_id = tenant_id
        self.dimension = dimension
        self._change = threading.Lock()
        self._snapshot = _build((), Counter(), dimension)

    def __len__(self) -> int:
        return len(self._snapshot.entries)

    def __contains__(self, adapter_id: str) -> bool:
        return any(entry.adapter_id == adapter_id for entry in self._snapshot.entries)

    def get(self, adapter_id: str) -> AdapterEntry | None:
        """The entry of an adapter."""
        return next((entry for entry in self._snapshot.entries if entry.adapter_id == adapter_id), None)

    def add(self, entry: AdapterEntry) -> None:
        """Put an adapter in, in place of the entry that it had. Raises ValueError, see `update`."""
        self.update([entry])

    def remove(self, adapter_id: str) -> None:
        """Take an adapter out; nothing happens when it is not there."""
        self.update(remove=[adapter_id])

    def update(self, add: Sequence[AdapterEntry] = (), remove: Iterable[str] = ()) -> None:
        """Take adapters out, then put others in, as one change: no search sees a part of it.

        Raises ValueError, and changes nothing, for an entry of another tenant and for centroids that are missing, not
        finite or of another dimension.
        """
        for entry in add:
            self._check(entry)
        with self._change:
            before = self._snapshot
            new = {entry.adapter_id: entry for entry in add}
            gone = new.keys() | set(remove)
            kept = [entry for entry in before.entries if entry.adapter_id not in gone]
            # Counted on from before: counting all documents' words anew would take most of a change's time.
            frequency = before.document_frequency.copy()
            for entry in before.entries:
                if entry.adapter_id in gone:
                    frequency.subtract(entry.words)
            for entry in new.values():
                frequency.update(entry.words)
            if len(kept) < len(before.entries):
                frequency = +frequency  # without words that no document holds any more
            self._snapshot = _build((*kept, *new.values()), frequency, self.dimension)

    def search(
        self, vector: Vectors, query_words: Collection[str], scope: Scope | None = None, limit: int = 5
    ) -> list[Scored]:
        """The best `limit` adapters within `scope`, best first, each scored by its best centroid.

        `vector` is float32 [dimension], L2-normalised. What lies outside the scope is filtered before the search and
        has no influence on results or scores. Raises ValueError for a vector that is not finite or of another shape.
        """
        vector = np.ascontiguousarray(vector, dtype=np.float32)
        if vector.shape != (self.dimension,) or not np.isfinite(vector).all():
            raise ValueError(f"a query vector must be {self.dimension} finite numbers")
        snapshot = self._snapshot
        scope = scope or Scope()
        if scope.everything:
            visible = np.ones(len(snapshot.entries), dtype=bool)
        else:
            visible = np.fromiter(map(scope.allows, snapshot.entries), dtype=bool, count=len(snapshot.entries))
        if not visible.any():
            return []
        nearest = [(snapshot.entries[i], value) for i, value in _nearest(snapshot, vector, visible).items()]
        if visible.all():
            weights = _WordWeights(query_words, snapshot.document_frequency, len(snapshot.entries))
        else:
            relevant = frozenset(query_words).union(*(entry.heading_words for entry, _ in nearest))
            seen = [snapshot.entries[i].words & relevant for i in np.flatnonzero(visible)]
            weights = _WordWeights(query_words, Counter(chain.from_iterable(seen)), len(seen))
        results = [_score(entry, similarity, weights) for entry, similarity in nearest]
        results.sort(key=lambda result: (-result.rank, result.entry.adapter_id))
        return results[:limit]

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
    return _Snapshot(entries, owners, rows, frequency)


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


class _WordWeights:
    """How much each word tells, for one query over `documents` documents."""

    def __init__(self, query_words: Collection[str], frequency: Counter[str], documents: int) -> None:
        self._frequency = frequency
        self._documents = documents
        self._known: dict[str, float] = {}
        self.query = {word: self.weight(word) for word in query_words}
        self.total = sum(self.query.values())

    def weight(self, word: str) -> float:
        # A word that no document holds weighs most: a name in the query that is unknown here speaks against all.
        weight = self._known.get(word)
        if weight is None:
            weight = self._known[word] = math.log1p(self._documents / (self._frequency.get(word) or 0.5))
        return weight

    def tells_apart(self, word: str) -> bool:
        return self._documents < 3 or 2 * self._frequency.get(word, 0) <= self._documents


def _score(entry: AdapterEntry, similarity: float, weights: _WordWeights) -> Scored:
    shared = sum(weight for word, weight in weights.query.items() if word in entry.words)
    word_share = shared / weights.total if weights.total else 0.0
    unsaid, named = 0.0, 0.0
    for word in entry.heading_words:
        if weights.tells_apart(word):
            weight = weights.weight(word)
            named += weight
            unsaid += 0.0 if word in weights.query else weight
    penalty = HEADING_WEIGHT * unsaid / named if named else 0.0
    score = (1 - WORD_WEIGHT) * similarity + WORD_WEIGHT * word_share
    return Scored(entry, score, similarity, word_share, score - WORD_WEIGHT * penalty)
