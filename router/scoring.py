"""How well a question and a text fit, by the words that they share.

Each word counts by the logarithm of its rarity among the documents searched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

WORD_WEIGHT = 0.4
HEADING_WEIGHT = 0.3


class WordWeights:
    """How much each word of one query tells, over `documents` of which `frequency[word]` hold a word."""

    def __init__(self, query_words: Collection[str], frequency: Counter[str], documents: int) -> None:
        self._frequency = frequency
        self._documents = documents
        self._known: dict[str, float] = {}
        self.query = {word: self.weight(word) for word in query_words}
        self.total = sum(self.query.values())

    def weight(self, word: str) -> float:
        """The word's weight, above 0."""
        # A word that no document holds weighs most: a name in the query that is unknown here speaks against all.
        weight = self._known.get(word)
        if weight is None:
            weight = self._known[word] = math.log1p(self._documents / (self._frequency.get(word) or 0.5))
        return weight

    def share(self, words: Collection[str]) -> float:
        """The share, 0..1, of the query's words that a text with these words holds, by weight."""
        if not self.total:
            return 0.0
        return sum(weight for word, weight in self.query.items() if word in words) / self.total

    def unsaid(self, heading_words: Collection[str]) -> float:
        """The share, 0..1, of a heading that the query leaves unsaid; words of most headings do not count."""
        unsaid, named = 0.0, 0.0
        for word in heading_words:
            if self._tells_apart(word):
                weight = self.weight(word)
                named += weight
                unsaid += 0.0 if word in self.query else weight
        return unsaid / named if named else 0.0

    def _tells_apart(self, word: str) -> bool:
        return self._documents < 3 or 2 * self._frequency.get(word, 0) <= self._documents


class PartWeights:
    """How much each word of one query tells between the parts of one document: nothing where all or none hold it."""

    def __init__(self, query_words: Collection[str], parts: Sequence[Collection[str]]) -> None:
        held = {word: sum(word in part for part in parts) for word in query_words}
        self._query = {word: math.log(len(parts) / count) for word, count in held.items() if count}
        self._total = sum(self._query.values())

    def share(self, words: Collection[str]) -> float:
        """The share, 0..1, of what the query's words tell that a part with these words holds."""
        if not self._total:
            return 0.0
        return sum(weight for word, weight in self._query.items() if word in words) / self._total


def relevance(similarity: float, word_share: float) -> float:
    """The score, in -1..1, of a cosine and a share of words."""
    return (1 - WORD_WEIGHT) * similarity + WORD_WEIGHT * word_share


def rank(score: float, unsaid: float) -> float:
    """The score less what the heading says and the query does not; results are ordered by it."""
    return score - WORD_WEIGHT * HEADING_WEIGHT * unsaid
