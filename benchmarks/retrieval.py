"""Retrieval to compare adapters with: BM25 over words and nearest vectors, over chunks of text."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence

from router.embed import MiniLmEncoder


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza 2009) with k1 1.5 and b 0.75."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = [Counter(_words(text)) for text in texts]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean = statistics.mean(self._lengths)
        held = Counter(word for counts in self._counts for word in counts)
        self._weights = {word: math.log(1 + (len(texts) - number + 0.5) / (number + 0.5))
                         for word, number in held.items()}
        self.bytes = sum(len(word.encode()) + 8 for counts in self._counts for word in counts)

    def best(self, question: str, count: int) -> list[int]:
        """Indices of the `count` best texts, best first."""
        words = [word for word in set(_words(question)) if word in self._weights]
        scores = []
        for counts, length in zip(self._counts, self._lengths, strict=True):
            norm = 1.5 * (0.25 + 0.75 * length / self._mean)
            scores.append(sum(self._weights[word] * counts[word] * 2.5 / (counts[word] + norm) for word in words))
        return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Dense:
    """Nearest chunks by all-MiniLM-L6-v2, exact search."""

    def __init__(self, texts: Sequence[str], encoder: MiniLmEncoder) -> None:
        self._encoder = encoder
        self._vectors = encoder.embed(texts)
        self.bytes = int(self._vectors.nbytes)

    def best(self, question: str, count: int) -> list[int]:
        """Indices of the `count` best texts, best first."""
        scores = self._vectors @ self._encoder.embed([question])[0]
        return [int(i) for i in (-scores).argsort()[:count]]
