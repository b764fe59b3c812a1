"""A fixed set of entries in columns, which may lie in memory or be mapped from a file.

Entries are ordered by collection, document and part. So what a collection or a document holds is one range, of the
entries, of their vectors and of each word's postings, and a search within it touches nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.entries import AdapterEntry, IndexedAdapter, State
from router.lexical import Terms, Words, documents_holding, find, postings, term, terms
from router.neighbours import Neighbours
from router.ragged import Positions, Ragged, starts_of

STATES = tuple(State)
_BLOCK = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Entries in any order. `vectors` are the rows of all centroids (float32 [rows, dimension]), entry after entry;
    `states` index `STATES`, `collections` index `collection_ids`."""

    adapter_ids: Ragged
    document_ids: Ragged
    titles: Ragged
    collection_ids: tuple[str | None, ...]
    collections: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint8]
    part: npt.NDArray[np.int32]
    parts: npt.NDArray[np.int32]
    row_starts: Positions
    vectors: Vectors
    words: Words

    def __len__(self) -> int:
        return len(self.states)

    @classmethod
    def of(cls, entries: Sequence[AdapterEntry], dimension: int) -> Columns:
        """Of entries with good centroids."""
        collection_ids = tuple(dict.fromkeys(entry.collection_id for entry in entries))
        numbers = {name: number for number, name in enumerate(collection_ids)}
        none = np.empty(0, np.uint64)
        return cls(
            adapter_ids=Ragged.of_texts([entry.adapter_id for entry in entries]),
            document_ids=Ragged.of_texts([entry.document_id for entry in entries]),
            titles=Ragged.of_texts([entry.title for entry in entries]),
            collection_ids=collection_ids,
            collections=np.array([numbers[entry.collection_id] for entry in entries], np.int32),
            states=np.array([STATES.index(entry.state) for entry in entries], np.uint8),
            part=np.array([entry.part for entry in entries], np.int32),
            parts=np.array([entry.parts for entry in entries], np.int32),
            row_starts=starts_of(np.array([len(entry.centroids) for entry in entries], np.int64)),
            vectors=np.concatenate([np.empty((0, dimension), np.float32), *(entry.centroids for entry in entries)]),
            words=Words.of(
                (
                    terms(entry.words),
                    terms(entry.heading_words),
                    terms(entry.words - entry.part_words) if entry.parts > 1 else none,
                )
                for entry in entries
            ),
        )

    @classmethod
    def joined(cls, parts: Sequence[Columns]) -> Columns:
        """The entries of all parts."""
        if len(parts) == 1:
            return parts[0]
        collection_ids = tuple(dict.fromkeys(chain.from_iterable(part.collection_ids for part in parts)))
        numbers = {name: number for number, name in enumerate(collection_ids)}
        return cls(
            adapter_ids=Ragged.joined([part.adapter_ids for part in parts]),
            document_ids=Ragged.joined([part.document_ids for part in parts]),
            titles=Ragged.joined([part.titles for part in parts]),
            collection_ids=collection_ids,
            collections=np.concatenate([
                np.array([numbers[name] for name in part.collection_ids], np.int32)[part.collections] for part in parts
            ]),
            states=np.concatenate([part.states for part in parts]),
            part=np.concatenate([part.part for part in parts]),
            parts=np.concatenate([part.parts for part in parts]),
            row_starts=starts_of(np.concatenate([np.diff(part.row_starts) for part in parts])),
            vectors=np.concatenate([part.vectors for part in parts]),
            words=Words.joined([part.words for part in parts]),
        )

    def order(self) -> tuple[Positions, npt.NDArray[np.int32]]:
        """The entries in order of collection, document and part, and the number of each one's document there.

        Raises ValueError for a document that lies in two collections.
        """
        numbers: dict[bytes, int] = {}
        documents = np.fromiter(
            (numbers.setdefault(self.document_ids.row(i).tobytes(), len(numbers)) for i in range(len(self))),
            np.int64,
            len(self),
        )
        order = np.lexsort((self.part, documents, self.collections))
        changes = np.diff(documents[order]) != 0
        document_of = np.concatenate([np.zeros(1, np.int32), np.cumsum(changes, dtype=np.int32)])[: len(order)]
        if len(order) and document_of[-1] + 1 != len(numbers):
            raise ValueError("a document's parts must be in one collection")
        return order, document_of

    def take(self, entries: Positions, vectors: Vectors | None = None) -> Columns:
        """Some entries, in this order, copied; their vectors into `vectors` where it is given."""
        rows = Ragged(self.row_starts, self.vectors).lengths(entries)
        starts = starts_of(rows)
        if vectors is None:
            vectors = np.empty((starts[-1], self.vectors.shape[1]), np.float32)
        places = Ragged(self.row_starts, self.vectors).places(entries)
        for start in range(0, len(places), _BLOCK):
            vectors[start : start + _BLOCK] = self.vectors[places[start : start + _BLOCK]]
        return Columns(
            adapter_ids=self.adapter_ids.take(entries),
            document_ids=self.document_ids.take(entries),
            titles=self.titles.take(entries),
            collection_ids=self.collection_ids,
            collections=self.collections[entries],
            states=self.states[entries],
            part=self.part[entries],
            parts=self.parts[entries],
            row_starts=starts,
            vectors=vectors,
            words=self.words.take(entries),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Entries in order, with what searching them takes. Never changed.

    `document_of` numbers documents from 0 in order. `adapter_keys` and `document_keys` are ascending terms of IDs, and
    `adapter_at` and `document_at` the entry, or the document, that each stands for. `frequency` says in how many
    documents each term of `columns.words.terms` stands, `found` in which entries. `neighbours` is there where there are
    many rows; fewer are compared one by one.
    """

    columns: Columns
    document_of: npt.NDArray[np.int32]
    document_starts: Positions
    collection_starts: Positions
    adapter_keys: Terms
    adapter_at: npt.NDArray[np.int32]
    document_keys: Terms
    document_at: npt.NDArray[np.int32]
    row_owner: npt.NDArray[np.int32]
    found: Ragged
    frequency: npt.NDArray[np.int32]
    neighbours: Neighbours | None = None
    tenant_id: str = field(default="")

    def __len__(self) -> int:
        return len(self.columns)

    @classmethod
    def of(cls, columns: Columns, tenant_id: str) -> Segment:
        """Put entries in order. Raises ValueError, see `Columns.order`."""
        return cls.ordered(columns, tenant_id)[0]

    @classmethod
    def ordered(
        cls, columns: Columns, tenant_id: str, vectors: Vectors | None = None
    ) -> tuple[Segment, Positions]:
        """`of` with the order: which entry of `columns` stands at each position. Vectors are written into `vectors`
        where it is given, which may be a file."""
        order, document_of = columns.order()
        columns = columns.take(order, vectors)
        document_starts = np.concatenate([
            np.flatnonzero(np.diff(document_of, prepend=-1)), np.array([len(order)])
        ]).astype(np.int64)
        adapter_keys, adapter_at = _keys(columns.adapter_ids, np.arange(len(order)))
        document_keys, document_at = _keys(columns.document_ids, document_starts[:-1])
        found = postings(columns.words.held, len(columns.words.terms))
        made = cls(
            columns=columns,
            document_of=document_of,
            document_starts=document_starts,
            collection_starts=np.searchsorted(columns.collections, np.arange(len(columns.collection_ids) + 1)),
            adapter_keys=adapter_keys,
            adapter_at=adapter_at,
            document_keys=document_keys,
            document_at=document_at,
            row_owner=np.repeat(np.arange(len(order), dtype=np.int32), np.diff(columns.row_starts)),
            found=found,
            frequency=documents_holding(found, document_of),
            tenant_id=tenant_id,
        )
        return made, order

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_starts) - 1

    def adapter(self, adapter_id: str) -> int | None:
        """The position of an adapter."""
        return self._at(self.adapter_keys, self.adapter_at, self.columns.adapter_ids, adapter_id, None)

    def document(self, document_id: str) -> int | None:
        """The number of a document."""
        return self._at(self.document_keys, self.document_at, self.columns.document_ids, document_id,
                        self.document_starts)

    def adapters(self, adapter_ids: Sequence[str]) -> Positions:
        """The positions of those of the adapters that are here."""
        wanted = np.fromiter(map(term, adapter_ids), np.uint64, len(adapter_ids))
        known = np.flatnonzero(find(self.adapter_keys, wanted) >= 0).tolist()
        return np.array([at for i in known if (at := self.adapter(adapter_ids[i])) is not None], np.int64)

    def entry(self, position: int) -> IndexedAdapter:
        """One entry."""
        columns = self.columns
        return IndexedAdapter(
            adapter_id=columns.adapter_ids.text(position),
            tenant_id=self.tenant_id,
            document_id=columns.document_ids.text(position),
            title=columns.titles.text(position),
            collection_id=columns.collection_ids[columns.collections[position]],
            state=STATES[columns.states[position]],
            part=int(columns.part[position]),
            parts=int(columns.parts[position]),
        )

    def words_of(self, document: int) -> npt.NDArray[np.int32]:
        """The distinct indices of the terms of a document, over all its parts."""
        first, end = self.document_starts[document], self.document_starts[document + 1]
        held = self.columns.words.held
        return np.unique(held.values[held.starts[first] : held.starts[end]])

    @staticmethod
    def _at(
        keys: Terms, places: npt.NDArray[np.int32], names: Ragged, name: str, starts: Positions | None
    ) -> int | None:
        at = int(find(keys, np.array([term(name)], np.uint64))[0])
        # Equal keys are neighbours; the name itself decides.
        while 0 <= at < len(keys) and keys[at] == term(name):
            place = int(places[at])
            if names.text(place if starts is None else int(starts[place])) == name:
                return place
            at += 1
        return None


def _keys(names: Ragged, entries: Positions) -> tuple[Terms, npt.NDArray[np.int32]]:
    keys = np.fromiter((term(names.text(int(i))) for i in entries), np.uint64, len(entries))
    order = np.argsort(keys, kind="stable").astype(np.int32)
    return keys[order], order
