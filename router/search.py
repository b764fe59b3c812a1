"""One search over the segments of an index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from router.embed import Vectors
from router.entries import IndexedAdapter, Scope, Scored
from router.lexical import Terms, find, terms
from router.ragged import Positions, Ragged
from router.scoring import Numbers, part_weights, rank, relevance, tells_apart, word_weights
from router.views import View

NEAREST_ROWS = 256
"""Rows that are taken from an index of neighbours."""
RICHEST_ENTRIES = 128
"""Entries of a large segment that are taken for the rare words that they share with the query."""
MAX_POSTINGS = 10_000
"""Postings that are read for that, of the rarest words first: common ones tell little."""
MAX_EXACT_ROWS = 8192
"""Within a scope of a large segment, so many rows or fewer are compared one by one."""
_BATCH = 64
_ROUNDING = 1e-5
"""More than scores of float32 are off."""


@dataclass(frozen=True, slots=True, eq=False)
class _Visible:
    """The entries [first, end) of a segment, or of those the ones in `mask` (bool [end - first])."""

    view: View
    first: int
    end: int
    mask: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, view: View, scope: Scope) -> _Visible | None:
        segment = view.segment
        first, end = 0, len(segment)
        if scope.collection_id is not None:
            if scope.collection_id not in segment.columns.collection_ids:
                return None
            number = segment.columns.collection_ids.index(scope.collection_id)
            first, end = (int(at) for at in segment.collection_starts[number : number + 2])
        if scope.document_id is not None:
            here = view.document_range(scope.document_id)
            first, end = max(first, here[0]), min(end, here[1])
        if first >= end:
            return None
        mask = None if view.alive is None else view.alive[first:end]
        if scope.adapter_ids is not None:
            listed = np.zeros(end - first, bool)
            positions = segment.adapters(list(scope.adapter_ids))
            listed[positions[(positions >= first) & (positions < end)] - first] = True
            mask = listed if mask is None else listed & mask
        if mask is not None and not mask.any():
            return None
        return cls(view, first, end, None if mask is None or mask.all() else mask)

    @property
    def everything(self) -> bool:
        """Whether all that is alive is visible."""
        return (self.mask is None and self.end - self.first == self.view.entries
                or self.mask is not None and int(self.mask.sum()) == self.view.entries)

    def positions(self) -> Positions:
        """All visible entries."""
        return np.arange(self.first, self.end) if self.mask is None else self.first + np.flatnonzero(self.mask)

    def holding(self, term: int) -> npt.NDArray[np.int32]:
        """The visible entries that hold the term with this index."""
        found = self.view.segment.found.row(term)
        if self.end - self.first < len(self.view.segment):
            low, high = np.searchsorted(found, (self.first, self.end))
            found = found[low:high]
        return found if self.mask is None else found[self.mask[found - self.first]]

    def documents_among(self, positions: npt.NDArray[np.int32] | Positions) -> int:
        """How many documents ascending positions belong to."""
        documents = self.view.segment.document_of[positions]
        return int(np.count_nonzero(documents[1:] != documents[:-1])) + 1 if len(documents) else 0

    def documents(self) -> int:
        """How many documents are visible."""
        return self.view.documents if self.everything else self.documents_among(self.positions())

    def frequencies(self, wanted: Terms) -> npt.NDArray[np.int64]:
        """In how many visible documents each term stands."""
        if self.everything:
            return self.view.frequencies(wanted)
        at = find(self.view.segment.columns.words.terms, wanted).tolist()
        return np.array([self.documents_among(self.holding(i)) if i >= 0 else 0 for i in at], np.int64)


class Search:
    """What one query finds. Makes no change and takes no lock."""

    def __init__(self, views: Sequence[View], vector: Vectors, query_words: Collection[str], scope: Scope) -> None:
        """`vector` is float32 [dimension] and finite. Raises IndexDamaged where a mapped file has changed."""
        for view in views:
            if view.files is not None:
                view.files.check()
        self._vector = vector
        self._wide = vector.astype(np.float64)
        self._terms = terms(query_words)
        self._visible = [one for view in views if (one := _Visible.of(view, scope)) is not None]
        self._documents = sum(one.documents() for one in self._visible)
        self._weights = word_weights(self._frequencies(self._terms), self._documents)
        self._total = float(self._weights.sum())
        self._found = [find(one.view.segment.columns.words.terms, self._terms) for one in self._visible]

    def best(self, limit: int) -> list[Scored]:
        """The best `limit` documents, best first, each with its best adapter."""
        if limit < 1:
            return []
        owners, positions, shares, scores = self._candidates()
        ranks = np.full(len(scores), -np.inf)
        best: dict[tuple[int, int], float] = {}
        """Of each document, by segment and number, the best rank."""
        least, start, size = -np.inf, 0, _BATCH
        order = np.argsort(-scores, kind="stable")
        # No rank is above its score.
        while start < len(order) and scores[order[start]] >= least:
            batch = order[start : start + size]
            start, size = start + size, 2 * size
            for number in np.unique(owners[batch]).tolist():
                mine = batch[owners[batch] == number]
                ranks[mine] = rank(scores[mine], self._unsaid(number, positions[mine]))
                documents = self._visible[number].view.segment.document_of[positions[mine]]
                for document, value in zip(documents.tolist(), ranks[mine].tolist(), strict=True):
                    best[number, document] = max(value, best.get((number, document), -np.inf))
            if len(best) >= limit:
                least = sorted(best.values(), reverse=True)[limit - 1] - _ROUNDING
        chosen = np.flatnonzero(ranks >= least)
        results: dict[str, Scored] = {}
        for result in sorted(self._score(owners[chosen], positions[chosen], shares[chosen]), key=_place):
            results.setdefault(result.entry.document_id, result)
        return list(results.values())[:limit]

    def parts(self, document_id: str) -> list[Scored]:
        """All visible parts of a document, best first, ranked by what tells them apart."""
        for number, one in enumerate(self._visible):
            first, end = one.view.document_range(document_id)
            if first < end:
                positions = one.positions()
                positions = positions[(positions >= first) & (positions < end)]
                return self._ranked_parts(number, positions)
        return []

    def answering_part(self, result: Scored) -> IndexedAdapter:
        """The part of a result's document that fits best among its parts."""
        if result.entry.parts < 2:
            return result.entry
        return self.parts(result.entry.document_id)[0].entry

    def _frequencies(self, wanted: Terms) -> npt.NDArray[np.int64]:
        counted = np.zeros(len(wanted), np.int64)
        for one in self._visible:
            counted += one.frequencies(wanted)
        return counted

    def _candidates(self) -> tuple[Positions, Positions, Numbers, Numbers]:
        """Of each candidate: which visible segment, which entry of it, share of the query's words, score."""
        owners, found, shares, scores = [], [], [], []
        for number, one in enumerate(self._visible):
            positions, similarity = self._near(number, one)
            share = self._shares(number, positions)
            owners.append(np.full(len(positions), number))
            found.append(positions)
            shares.append(share)
            scores.append(relevance(similarity.astype(np.float64), share))
        if not owners:
            nothing, none = np.empty(0, np.int64), np.empty(0, np.float64)
            return nothing, nothing, none, none
        return np.concatenate(owners), np.concatenate(found), np.concatenate(shares), np.concatenate(scores)

    def _near(self, number: int, one: _Visible) -> tuple[Positions, Vectors]:
        """Candidates of a segment, ascending, and the cosine of the nearest centroid of each: all that is visible, or
        of very many those that are nearest or richest in rare words."""
        segment = one.view.segment
        columns = segment.columns
        if one.mask is None and self._is_flat(one, int(columns.row_starts[one.end] - columns.row_starts[one.first])):
            low, high = int(columns.row_starts[one.first]), int(columns.row_starts[one.end])
            cosines = columns.vectors[low:high] @ self._vector
            return one.positions(), np.maximum.reduceat(cosines, columns.row_starts[one.first : one.end] - low)
        positions = one.positions()
        rows = Ragged(columns.row_starts, columns.vectors)
        if not self._is_flat(one, int(rows.lengths(positions).sum())):
            positions = np.unique(np.concatenate([self._nearest(one), self._richest(number, one)]))
        starts = np.zeros(len(positions), np.int64)
        np.cumsum(rows.lengths(positions)[:-1], out=starts[1:])
        cosines = columns.vectors[rows.places(positions)] @ self._vector
        return positions, np.maximum.reduceat(cosines, starts)

    def _is_flat(self, one: _Visible, rows: int) -> bool:
        return one.view.segment.neighbours is None or rows <= MAX_EXACT_ROWS

    def _nearest(self, one: _Visible) -> Positions:
        segment = one.view.segment
        assert segment.neighbours is not None
        if one.everything:
            bits = one.view.row_bits
        else:
            allowed = np.zeros(len(segment), bool)
            allowed[one.first : one.end] = True if one.mask is None else one.mask
            bits = np.packbits(allowed[segment.row_owner], bitorder="little")
        return segment.row_owner[segment.neighbours.search(self._vector, NEAREST_ROWS, bits)].astype(np.int64)

    def _richest(self, number: int, one: _Visible) -> Positions:
        """Entries that hold most of the query's rare words, by weight."""
        lists, left = [], MAX_POSTINGS
        sums = np.zeros(one.end - one.first, np.float32)
        for term in np.argsort(-self._weights, kind="stable").tolist():
            at = int(self._found[number][term])
            if at < 0:
                continue
            holding = one.holding(at)
            left -= len(holding)
            if left < 0:
                break
            sums[holding - one.first] += self._weights[term]
            lists.append(holding)
        if not lists:
            return np.empty(0, np.int64)
        entries = np.concatenate(lists).astype(np.int64)
        if len(entries) > RICHEST_ENTRIES:
            entries = entries[np.argpartition(-sums[entries - one.first], RICHEST_ENTRIES)[:RICHEST_ENTRIES]]
        return entries

    def _shares(self, number: int, positions: Positions) -> Numbers:
        """The share, 0..1, of the query's words that each of these entries (ascending) holds, by weight."""
        shares = np.zeros(len(positions))
        if not len(positions) or not self._total:
            return shares
        found = self._visible[number].view.segment.found
        first, dense = int(positions[0]), int(positions[-1] - positions[0]) + 1 == len(positions)
        for weight, at in zip(self._weights.tolist(), self._found[number].tolist(), strict=True):
            if at < 0:
                continue
            holding = found.row(at)
            if dense:
                low, high = np.searchsorted(holding, (first, first + len(positions)))
                shares[holding[low:high] - first] += weight
            elif len(holding):
                near = np.minimum(np.searchsorted(holding, positions), len(holding) - 1)
                shares[holding[near] == positions] += weight
        return shares / self._total

    def _similarities(self, number: int, positions: Positions) -> Numbers:
        """Cosines of the nearest centroids, the same to the last digit wherever an entry stands."""
        columns = self._visible[number].view.segment.columns
        rows = Ragged(columns.row_starts, columns.vectors)
        starts = np.zeros(len(positions), np.int64)
        np.cumsum(rows.lengths(positions)[:-1], out=starts[1:])
        # Sums of float32 depend on where a row stands; those of float64 do not once they are rounded.
        cosines = columns.vectors[rows.places(positions)].astype(np.float64) @ self._wide
        return np.maximum.reduceat(cosines.astype(np.float32), starts).astype(np.float64)

    def _score(self, owners: Positions, positions: Positions, shares: Numbers) -> list[Scored]:
        results = []
        for number in np.unique(owners).tolist():
            chosen = owners == number
            mine, share = positions[chosen], shares[chosen]
            segment = self._visible[number].view.segment
            similarity = self._similarities(number, mine)
            score = relevance(similarity, share)
            unsaid = self._unsaid(number, mine)
            for i, position in enumerate(mine.tolist()):
                one = float(score[i])
                results.append(Scored(segment.entry(position), one, float(similarity[i]), float(share[i]),
                                      rank(one, float(unsaid[i]))))
        return results

    def _unsaid(self, number: int, positions: Positions) -> Numbers:
        """The share, 0..1, of each entry's heading that the query leaves unsaid."""
        words = self._visible[number].view.segment.columns.words
        headings = words.headings.take(positions)
        used, at = np.unique(headings.values, return_inverse=True)
        heading_terms = words.terms[used]
        frequency = self._frequencies(heading_terms)
        weights = word_weights(frequency, self._documents) * tells_apart(frequency, self._documents)
        unsaid_weights = np.where(find(self._terms, heading_terms) >= 0, 0.0, weights)
        rows = np.repeat(np.arange(len(positions)), np.diff(headings.starts))
        named = np.bincount(rows, weights[at], len(positions))
        unsaid = np.bincount(rows, unsaid_weights[at], len(positions))
        return np.divide(unsaid, named, out=np.zeros(len(positions)), where=named > 0)

    def _ranked_parts(self, number: int, positions: Positions) -> list[Scored]:
        results = self._score(np.full(len(positions), number), positions, self._shares(number, positions))
        if len(results) < 2:
            return results
        words = self._visible[number].view.segment.columns.words
        at = self._found[number]
        held = np.array([
            np.isin(at, words.held.row(position)) & ~np.isin(at, words.title_only.row(position))
            for position in positions.tolist()
        ]) & (at >= 0)
        weights = part_weights(held.sum(axis=0), len(positions))
        total = weights.sum()
        shares = held @ weights / total if total else np.zeros(len(positions))
        ranked = [
            replace(result, rank=relevance(result.similarity, float(share)))
            for result, share in zip(results, shares, strict=True)
        ]
        return sorted(ranked, key=_place)


def _place(result: Scored) -> tuple[float, int, str]:
    return -result.rank, result.entry.part, result.entry.adapter_id
