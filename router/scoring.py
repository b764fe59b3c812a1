"""How well a question and a text fit, by the cosine of vectors and by the words that they share.

Each word counts by the logarithm of its rarity among the documents searched.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

WORD_WEIGHT = 0.4
HEADING_WEIGHT = 0.3
Numbers = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Numbers)


def word_weights(frequency: npt.NDArray[np.int64], documents: int) -> Numbers:
    """How much each word tells, above 0: `frequency[i]` of the `documents` hold it.

    A word that no document holds weighs most: a name in the query that is unknown here speaks against all.
    """
    return np.log1p(documents / np.where(frequency > 0, frequency, 0.5))


def tells_apart(frequency: npt.NDArray[np.int64], documents: int) -> npt.NDArray[np.bool_]:
    """Which words of headings count: words of most headings do not."""
    return (2 * frequency <= documents) | (documents < 3)


def part_weights(frequency: npt.NDArray[np.int64], parts: int) -> Numbers:
    """How much each word tells between the parts of one document: nothing where all or none hold it."""
    return np.where(frequency > 0, np.log(parts / np.maximum(frequency, 1)), 0.0)


def relevance(similarity: Number, word_share: Number) -> Number:
    """The score, in -1..1, of a cosine and a share of words."""
    return (1 - WORD_WEIGHT) * similarity + WORD_WEIGHT * word_share


def rank(score: Number, unsaid: Number) -> Number:
    """The score less what the heading says and the query does not; results are ordered by it.

    `unsaid` is the share of the heading, 0..1.
    """
    return score - WORD_WEIGHT * HEADING_WEIGHT * unsaid
