"""Which words stand in which entries: the lexical half of an index.

The words of an entry are a set, so this is BM25 (Robertson and Zaragoza 2009) with k1 = 0: a word counts by its rarity
alone, since a data sheet of ten lines names its product as surely as a manual does. Written here and not taken from a
library: `bm25s` and `rank-bm25` build an index for a fixed set of texts, have no updates, no filter before the search,
and count chunks where a document of many parts has to count once.

A word is its 64-bit hash, so that an index on disk holds numbers only; among the million words of a large tenant two
fall together with a probability of 3 in 100 million.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from router.ragged import Positions, Ragged, starts_of

Terms = npt.NDArray[np.uint64]


@lru_cache(maxsize=1 << 17)
def term(word: str) -> int:
    """The number that stands for a word, the same in every process."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def terms(words: Iterable[str]) -> Terms:
    """The distinct terms of words, ascending."""
    return np.unique(np.fromiter(map(term, words), np.uint64))


def find(sorted_keys: Terms, wanted: Terms) -> Positions:
    """Where each of `wanted` stands in ascending keys (the first of equal ones); -1 where it does not."""
    if not len(sorted_keys):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == wanted, at, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Sets of words of entries: rows of indices into `terms` (uint64, ascending), each row ascending.

    `held` are an entry's words, `headings` those of its document's heading, `title_only` those of `held` that stand
    in its title alone and say nothing about which part of the document it is.
    """

    terms: Terms
    held: Ragged
    headings: Ragged
    title_only: Ragged

    def take(self, entries: Positions) -> Words:
        """The words of some entries, in this order."""
        return Words(self.terms, self.held.take(entries), self.headings.take(entries), self.title_only.take(entries))

    @staticmethod
    def of(entries: Iterable[tuple[Terms, Terms, Terms]]) -> Words:
        """From each entry's terms: held, heading, title only; all ascending."""
        rows = list(entries)
        known = np.unique(np.concatenate([part for row in rows for part in row])) if rows else np.empty(0, np.uint64)
        columns = [
            Ragged.of([np.searchsorted(known, row[column]) for row in rows], np.int32) for column in range(3)
        ]
        return Words(known, *columns)

    @staticmethod
    def joined(parts: Iterable[Words]) -> Words:
        """The entries of all parts, over the terms that they use."""
        parts = list(parts)
        known = np.unique(np.concatenate([part.terms[part.used()] for part in parts]))
        columns = []
        for name in ("held", "headings", "title_only"):
            rows = []
            for part in parts:
                old: Ragged = getattr(part, name)
                # Terms that no entry uses any more get a number that nothing refers to.
                renumbered = np.searchsorted(known, part.terms).astype(np.int32)
                rows.append(Ragged(old.starts, renumbered[old.values]))
            columns.append(Ragged.joined(rows))
        return Words(known, *columns)

    def used(self) -> npt.NDArray[np.bool_]:
        """Which terms stand in any row: bool [terms]."""
        used = np.zeros(len(self.terms), bool)
        for column in (self.held, self.headings, self.title_only):
            used[column.values] = True
        return used


def postings(held: Ragged, terms_count: int) -> Ragged:
    """Term -> the entries that hold it, ascending (int32): the rows of `held` transposed."""
    entries = np.repeat(np.arange(len(held), dtype=np.int32), np.diff(held.starts))
    counts = np.bincount(held.values, minlength=terms_count)
    return Ragged(starts_of(counts), entries[np.argsort(held.values, kind="stable")])


def documents_holding(found: Ragged, document_of: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Of each term, in how many documents it stands: int32 [terms]. Entries of a document must be neighbours."""
    documents = document_of[found.values]
    first = np.ones(len(documents), bool)
    np.not_equal(documents[1:], documents[:-1], out=first[1:])
    begins = found.starts[:-1]
    first[begins[begins < len(first)]] = True
    return np.diff(starts_of(first)[found.starts]).astype(np.int32)
