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

An index is a list of segments of falling size, as in a log-structured merge tree (O'Neil et al. 1996). A change writes
one more small segment, which is merged with those of its size, so a change costs little however many documents there
are. Small segments are searched entry by entry. What has grown past `FLAT_ROWS` is merged by `compact`, in the
background, into a segment with an index of nearest vectors, on disk where the index has a folder; there the nearest by
vector and the richest in rare words are candidates, and are then scored as exactly as all others.

What is deleted or replaced is out of every search at once, but stays in the files of its segment. `holds_gone` tells
what has been there for how long, and `compact` writes those segments anew without it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from router.embed import Vectors
from router.entries import AdapterEntry, IndexedAdapter, Scope, Scored, Span, State
from router.lexical import Words
from router.neighbours import Neighbours
from router.ragged import Positions
from router.search import Search
from router.segment import Columns, Segment
from router.storage import IndexDamaged, Listed, SegmentFolder, vectors_file
from router.views import View

__all__ = ["AdapterEntry", "IndexDamaged", "IndexedAdapter", "Scope", "Scored", "Span", "State", "TenantIndex"]
logger = logging.getLogger(__name__)

FLAT_ROWS = 8192
"""Rows that are compared one by one in a search, about a millisecond for 384 dimensions on one core."""
_TAIL_ROWS = 512
"""So few rows are always one segment."""
_GROWTH = 4
"""A segment is merged with the one before it unless that is more than so many times as large."""
_DEAD_SHARE = 0.25
"""A large segment is written anew when more of its entries than this are gone."""
_BASE_BYTES = 4096
"""An empty index."""


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """Never changed after it was built, so a search needs no lock. `seq` is the change that it is as new as."""

    views: tuple[View, ...] = ()
    seq: int = -1


class TenantIndex:
    """Searches run at any time on the snapshot that they find; changes build the next snapshot and swap it in."""

    def __init__(
        self,
        tenant_id: str,
        dimension: int,
        folder: Path | None = None,
        encoder: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Without a `folder` everything stays in memory. `encoder` names encoder and version of the centroids. `clock`
        gives seconds since the epoch."""
        self.tenant_id = tenant_id
        self.dimension = dimension
        self.encoder = encoder
        self._clock = clock
        self._folder = SegmentFolder(folder, tenant_id, encoder, dimension) if folder is not None else None
        self._change = threading.Lock()
        self._compaction = threading.Lock()
        self._snapshot = _Snapshot()
        self._compacting: frozenset[int] = frozenset()
        """Segments, by `id`, that `compact` merges or names in its state; changes merge them with no others."""
        self._gone: dict[str, float] = {}
        """Segments on disk, by name, that hold what is gone or has moved to another segment, and since when."""
        self._committed: frozenset[str] = frozenset()

    def __len__(self) -> int:
        """The number of adapters."""
        return sum(view.entries for view in self._snapshot.views)

    def __contains__(self, adapter_id: str) -> bool:
        return self.get(adapter_id) is not None

    @property
    def seq(self) -> int:
        """The change that the index is as new as; -1 before the first."""
        return self._snapshot.seq

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without what is mapped from files and can be read again."""
        return _BASE_BYTES + sum(view.nbytes for view in self._snapshot.views)

    @property
    def wants_compaction(self) -> bool:
        """Whether `compact` has something to do: searches slow down until it has."""
        return _grown(self._snapshot.views) < len(self._snapshot.views)

    @property
    def committed(self) -> frozenset[str]:
        """The segments that this index named in the last state that it wrote or read."""
        return self._committed

    def holds_gone(self, before: float) -> bool:
        """Whether files of this index still hold entries that went before this time (seconds since the epoch)."""
        with self._change:
            self._forget_removed_files()
            return any(since < before for since in self._gone.values())

    def check_files(self) -> None:
        """Raise IndexDamaged where a mapped file was changed from outside."""
        for view in self._snapshot.views:
            if view.files is not None:
                view.files.check()

    def get(self, adapter_id: str) -> IndexedAdapter | None:
        """The entry of an adapter."""
        for view in self._snapshot.views:
            at = view.adapter(adapter_id)
            if at is not None:
                return view.segment.entry(at)
        return None

    def parts(self, document_id: str) -> list[IndexedAdapter]:
        """A document's entries, in the order of its parts."""
        for view in self._snapshot.views:
            first, end = view.document_range(document_id)
            if first < end:
                return [view.segment.entry(at) for at in range(first, end)]
        return []

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
        seq: int | None = None,
    ) -> None:
        """Take out the adapters `remove` and all of the `documents`, then put others in: one change, which no search
        sees a part of. `seq` is the number of the change, where changes have numbers.

        Raises ValueError, and changes nothing, for an entry of another tenant, for centroids that are missing, not
        finite or of another dimension, and for parts of one document in several collections.
        """
        for entry in add:
            self._check(entry)
        new = {entry.adapter_id: entry for entry in add}
        gone, dropped = list(new.keys() | set(remove)), set(documents)
        with self._change:
            before = self._snapshot
            # A document is always in one segment, so what is left of a document that changes moves with it.
            touched = dropped | {entry.document_id for entry in new.values()}
            for view in before.views:
                touched.update(view.documents_of(gone))
            views, kept = [], []
            for view in before.views:
                numbers = view.document_numbers(touched)
                if not len(numbers):
                    views.append(view)
                    continue
                left = view.without(numbers)
                if left.entries:
                    views.append(left)
                survivors = view.survivors(numbers, gone, dropped)
                if len(survivors):
                    kept.append(view.segment.columns.take(survivors))
            if new:
                kept.append(Columns.of(list(new.values()), self.dimension))
            if kept:
                views.append(View.of(Segment.of(Columns.joined(kept), self.tenant_id)))
            self._snapshot = _Snapshot(self._merged(views), before.seq if seq is None else seq)
            kept_as_it_was = {id(view) for view in self._snapshot.views}
            for view in before.views:
                if view.name and id(view) not in kept_as_it_was:
                    self._gone.setdefault(view.name, self._clock())

    def search(
        self, vector: Vectors, query_words: Collection[str], scope: Scope | None = None, limit: int = 5
    ) -> list[Scored]:
        """The best `limit` documents within `scope`, best first, each with its adapter, or with that of the
        part that fits best among its parts. The score is the document's, that of its best adapter.

        `vector` is float32 [dimension], L2-normalised. What lies outside the scope is filtered before the search and
        has no influence on results or scores. Raises ValueError for a vector that is not finite or of another shape,
        and IndexDamaged where a mapped file was changed from outside.
        """
        search = self._search(vector, query_words, scope or Scope())
        return [replace(result, entry=search.answering_part(result)) for result in search.best(limit)]

    def search_parts(
        self, document_id: str, vector: Vectors, query_words: Collection[str], limit: int = 5
    ) -> list[Scored]:
        """The best `limit` parts of one document, best first, scored as if there were no other and ranked among
        themselves; empty where the document is not here. Raises as `search` does.
        """
        return self._search(vector, query_words, Scope(document_id=document_id)).parts(document_id)[:limit]

    def load(self, batches: Iterable[Sequence[AdapterEntry]], seq: int) -> None:
        """Put in many entries at once, in place of all there are, as of change `seq`; each batch is dropped before
        the next one is asked for, and a document must be within one batch. Raises ValueError as `update` does.
        """
        views: tuple[View, ...] = ()
        for batch in batches:
            for entry in batch:
                self._check(entry)
            if batch:
                made = Segment.of(Columns.of(batch, self.dimension), self.tenant_id)
                views = self._merged([*views, View.of(made)])
        with self._change:
            self._snapshot = _Snapshot(views, seq)

    def open(self) -> bool:
        """Take the state that is on disk; False where there is none. Raises IndexDamaged."""
        state = self._folder.read() if self._folder is not None else None
        if state is None:
            return False
        seq, stored = state
        with self._change:
            self._snapshot = _Snapshot(tuple(View.of_stored(one) for one in stored if one.alive.any()), seq)
            self._gone = {one.name: one.gone_since for one in stored if one.gone_since is not None}
            self._committed = frozenset(one.name for one in stored)
        return True

    def remove_files(self) -> None:
        """Delete what is on disk. Whoever has it mapped keeps it until he lets go."""
        if self._folder is not None:
            self._folder.remove()

    def compact(self, gone_before: float | None = None) -> None:
        """Merge what has grown past `FLAT_ROWS` rows, and with `gone_before` (seconds since the epoch) also write anew
        what `holds_gone` before that time. Searches and changes go on meanwhile. Raises OSError, and IndexDamaged where
        what is on disk was changed from outside.
        """
        with self._compaction:
            begun = self._clock()
            with self._change:
                before = self._snapshot
                self._forget_removed_files()
                gone = {name for name, since in self._gone.items() if gone_before is not None and since < gone_before}
                gone |= self._lost(before.views)
                merged = before.views[_to_compact(before.views, gone) :]
                if not merged and not gone:
                    return
                self._compacting = frozenset(id(view.segment) for view in before.views)
            try:
                made, places = self._written(merged) if merged else (None, [])
            except BaseException:
                self._compacting = frozenset()
                raise
            with self._change:
                self._compacting = frozenset()
                now = self._snapshot
                still = {id(view.segment): view for view in now.views}
                # What went away meanwhile must be gone in the merged segment too.
                for view, place in zip(merged, places, strict=True):
                    assert made is not None
                    later = still.get(id(view.segment))
                    lost = view.alive_mask() if later is None else view.alive_mask() & ~later.alive_mask()
                    made = made.without(np.unique(made.segment.document_of[place[lost]]))
                if made is not None and made.name and made.entries < len(made.segment):
                    self._gone[made.name] = begun
                known = {id(view.segment) for view in before.views}
                kept = before.views[: len(before.views) - len(merged)]
                larger = [still[i] for view in kept if (i := id(view.segment)) in still]
                newer = [view for view in now.views if id(view.segment) not in known]
                views = (*larger, *([made] if made is not None and made.entries else []), *newer)
                self._snapshot = replace(now, views=views)
                if self._folder is not None and before.seq >= 0:
                    self._commit(self._folder, before.seq)

    def _commit(self, folder: SegmentFolder, seq: int) -> None:
        """Write the state of segments that are on disk. Whoever opens it reads the changes since `seq` again, which
        does no harm. The snapshot must not change meanwhile."""
        named = [view for view in self._snapshot.views if view.name]
        if folder.commit(seq, [Listed(view.name, view.alive_mask(), self._gone.get(view.name)) for view in named]):
            self._committed = frozenset(view.name for view in named)
        else:
            logger.info("another replica keeps the index of %s on disk", self.tenant_id)
        self._forget_removed_files()

    def _lost(self, views: Sequence[View]) -> set[str]:
        """Segments that were removed from disk, unless the state of another replica is there instead: they have to be
        written again, for a state holds everything."""
        if self._folder is None or self._folder.has_state():
            return set()
        names = {view.name for view in views if view.name}
        return names - self._folder.existing(names)

    def _forget_removed_files(self) -> None:
        if self._gone:
            there = self._folder.existing(self._gone) if self._folder is not None else set()
            self._gone = {name: since for name, since in self._gone.items() if name in there}

    def _written(self, views: Sequence[View]) -> tuple[View, list[Positions]]:
        """One segment of several, and where in it each of their entries stands (-1 for what had gone)."""
        alive = [np.flatnonzero(view.alive_mask()) for view in views]
        rows = sum(view.rows for view in views)
        with ExitStack() as stack:
            staging = stack.enter_context(self._folder.staged()) if self._folder is not None else None
            columns = Columns.joined([_alive_columns(view) for view in views])
            columns = replace(columns, words=Words.joined([columns.words]))  # without words that only gone ones held
            vectors = vectors_file(staging, rows, self.dimension) if staging is not None else None
            segment, order = Segment.ordered(columns, self.tenant_id, vectors)
            del columns
            if rows > FLAT_ROWS:
                segment = replace(segment, neighbours=Neighbours.build(segment.columns.vectors))
            made = View.of(segment)
            if self._folder is not None and staging is not None:
                made = View.of_stored(self._folder.write(staging, segment))
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        places, start = [], 0
        for view, positions in zip(views, alive, strict=True):
            place = np.full(len(view.segment), -1, np.int64)
            place[positions] = position[start : start + len(positions)]
            places.append(place)
            start += len(positions)
        return made, places

    def _merged(self, views: Sequence[View]) -> tuple[View, ...]:
        """The same with small segments at the end merged, so that there are few."""
        merged = list(views)
        for i, view in enumerate(merged):
            if self._is_small(view) and view.entries < (1 - _DEAD_SHARE) * len(view.segment):
                merged[i] = self._joined([view])
        while len(merged) > 1 and all(map(self._is_small, merged[-2:])):
            large, small = merged[-2].rows, merged[-1].rows
            if large + small > _TAIL_ROWS and (large > _GROWTH * small or large + small > FLAT_ROWS):
                break
            merged[-2:] = [self._joined(merged[-2:])]
        return tuple(merged)

    def _is_small(self, view: View) -> bool:
        return view.segment.neighbours is None and id(view.segment) not in self._compacting

    def _joined(self, views: Sequence[View]) -> View:
        columns = Columns.joined([_alive_columns(view) for view in views])
        return View.of(Segment.of(columns, self.tenant_id))

    def _search(self, vector: Vectors, query_words: Collection[str], scope: Scope) -> Search:
        vector = np.ascontiguousarray(vector, dtype=np.float32)
        if vector.shape != (self.dimension,) or not np.isfinite(vector).all():
            raise ValueError(f"a query vector must be {self.dimension} finite numbers")
        return Search(self._snapshot.views, vector, query_words, scope)

    def _check(self, entry: AdapterEntry) -> None:
        if entry.tenant_id != self.tenant_id:
            raise ValueError(f"{entry.adapter_id} belongs to another tenant")
        shape = entry.centroids.shape
        if len(shape) != 2 or shape[0] == 0 or shape[1] != self.dimension:
            raise ValueError(f"{entry.adapter_id}: centroids must be [n, {self.dimension}], not {list(shape)}")
        if not np.isfinite(entry.centroids).all():
            raise ValueError(f"{entry.adapter_id}: centroids are not finite")


def _alive_columns(view: View) -> Columns:
    columns = view.segment.columns
    return columns if view.alive is None else columns.take(np.flatnonzero(view.alive))


def _to_compact(views: Sequence[View], gone: Collection[str] = ()) -> int:
    """The first of the views at the end that are to be merged; their number where none are. Among them are the
    segments `gone` by name, and then all that are not on disk: a state on disk holds everything."""
    first = _grown(views)
    if not gone:
        return first
    return min([first, *(i for i, view in enumerate(views) if not view.name or view.name in gone)])


def _grown(views: Sequence[View]) -> int:
    """The first of the views at the end that slow down searches; their number where none do."""
    first, rows = len(views), 0
    while first and views[first - 1].segment.neighbours is None:
        first -= 1
        rows += views[first].rows
    if rows <= FLAT_ROWS:
        first, rows = len(views), 0
    while first and rows and views[first - 1].rows <= _GROWTH * rows:
        first -= 1
        rows += views[first].rows
    for i, view in enumerate(views[:first]):
        if view.segment.neighbours is not None and view.entries < (1 - _DEAD_SHARE) * len(view.segment):
            return i
    return first
