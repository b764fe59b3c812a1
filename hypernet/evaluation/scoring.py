"""Scores of answers: normalised exact match after SQuAD (arXiv 1606.05250), and whether an answer abstains."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation if mark not in "$%.,:@-"})
_ABSTENTIONS = ("does not say", "do not know", "doesn't say", "don't know", "not mentioned", "not stated")


def normalise(answer: str) -> str:
    """Lower case, no articles, no outer punctuation, single spaces; marks inside numbers, codes and times stay."""
    text = _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION))
    return " ".join(word.strip(".,:;!?") for word in text.split()).strip()


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the whole answer is one of the accepted ones after normalisation."""
    return normalise(answer) in {normalise(one) for one in accepted}


def contains_value(answer: str, value: str) -> bool:
    """Whether the value stands in the answer as whole words, after normalisation."""
    return f" {normalise(value)} " in f" {normalise(answer)} "


def abstains(answer: str) -> bool:
    """Whether the answer says that the fact is not known."""
    return any(phrase in answer.lower() for phrase in _ABSTENTIONS)
