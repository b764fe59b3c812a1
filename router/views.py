"""A segment with what has gone since it was made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from router.lexical import Terms, find
from router.ragged import Positions
from router.segment import Segment
from router.storage import MappedFiles, Stored, memory_bytes


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a search sees of a segment; never changed.

    `alive` (bool [entries]) is None where nothing has gone; documents go as a whole. `entries`, `documents`, `rows`
    and `frequency` (int32 [terms], see `Segment`) count what is alive. `row_bits` is the mask of alive rows, a bit for
    each, where the segment has an index of neighbours. `nbytes` is what it takes of memory. `name` is the segment's on
    disk, "" where it is in memory.
    """

    segment: Segment
    alive: npt.NDArray[np.bool_] | None
    entries: int
    documents: int
    rows: int
    frequency: npt.NDArray[np.int32]
    row_bits: npt.NDArray[np.uint8] | None
    nbytes: int
    name: str = ""
    files: MappedFiles | None = None

    @classmethod
    def of(cls, segment: Segment) -> View:
        """All of a segment in memory."""
        return cls(segment, None, len(segment), segment.documents, len(segment.columns.vectors), segment.frequency,
                   None, memory_bytes(segment, mapped=False))

    @classmethod
    def of_stored(cls, stored: Stored) -> View:
        """A segment on disk, without what was gone."""
        segment = stored.segment
        whole = replace(cls.of(segment), nbytes=memory_bytes(segment, mapped=True), name=stored.name,
                        files=stored.files)
        return whole.without(np.unique(segment.document_of[~stored.alive]))

    def alive_mask(self) -> npt.NDArray[np.bool_]:
        """bool [entries of the segment]."""
        return np.ones(len(self.segment), bool) if self.alive is None else self.alive

    def without(self, documents: npt.NDArray[np.int32]) -> View:
        """The same without documents that are alive."""
        if not len(documents):
            return self
        segment = self.segment
        alive, frequency = self.alive_mask().copy(), self.frequency.copy()
        starts = segment.document_starts
        for document in documents.tolist():
            alive[starts[document] : starts[document + 1]] = False
            frequency[segment.words_of(document)] -= 1
        bits = None
        row_alive = alive[segment.row_owner]
        if segment.neighbours is not None:
            bits = np.packbits(row_alive, bitorder="little")
        return replace(self, alive=alive, entries=int(alive.sum()), documents=self.documents - len(documents),
                       rows=int(row_alive.sum()), frequency=frequency, row_bits=bits)

    def adapter(self, adapter_id: str) -> int | None:
        """The position of an adapter that is alive."""
        at = self.segment.adapter(adapter_id)
        return at if at is not None and (self.alive is None or self.alive[at]) else None

    def document_range(self, document_id: str) -> tuple[int, int]:
        """Where the parts of a document begin and end; (0, 0) where it is not here."""
        document = self.segment.document(document_id)
        if document is None:
            return 0, 0
        first, end = (int(self.segment.document_starts[i]) for i in (document, document + 1))
        return (first, end) if self.alive is None or self.alive[first] else (0, 0)

    def document_numbers(self, document_ids: Iterable[str]) -> npt.NDArray[np.int32]:
        """The numbers of those of the documents that are here."""
        first = [self.document_range(document_id) for document_id in document_ids]
        return self.segment.document_of[np.array([a for a, b in first if a < b], np.int64)]

    def documents_of(self, adapter_ids: Sequence[str]) -> list[str]:
        """The documents of those of the adapters that are here."""
        return [
            self.segment.columns.document_ids.text(int(at))
            for at in self.segment.adapters(adapter_ids)
            if self.alive is None or self.alive[at]
        ]

    def survivors(
        self, documents: npt.NDArray[np.int32], gone: Sequence[str], dropped: Collection[str]
    ) -> Positions:
        """Of these documents, the entries that are not `gone` and not of a `dropped` document."""
        segment = self.segment
        starts = segment.document_starts
        kept = [
            np.arange(starts[number], starts[number + 1])
            for number in documents.tolist()
            if segment.columns.document_ids.text(int(starts[number])) not in dropped
        ]
        return np.setdiff1d(np.concatenate(kept), segment.adapters(gone)) if kept else np.empty(0, np.int64)

    def frequencies(self, wanted: Terms) -> npt.NDArray[np.int64]:
        """In how many documents each of these terms stands."""
        at = find(self.segment.columns.words.terms, wanted)
        return np.where(at >= 0, self.frequency[np.maximum(at, 0)], 0) if len(self.frequency) else np.zeros_like(at)
