"""Texts as words and sentences, for comparing questions with documents by the words that they share."""

from __future__ import annotations

import re

MAX_WORDS = 20_000
"""Distinct words kept of one document: a bound on memory that a text of a megabyte may reach."""

MAX_NAME = 160
"""Characters of a title that is a name."""

_WORD = re.compile(r"[^\W_]+(?:['’.,][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_MARKUP = " \t-*+#|>:"
# Words of questions that say nothing about which document is meant.
_COMMON = frozenset(
    """a about an and are as at be by can could did do does for from get give had has have how i if in is it its long
    many me much my need of old on or our please should state tell that the their there these they this those to us was
    we were what when where which who whom whose why will with would you your""".split()
)


def words(text: str) -> frozenset[str]:
    """The distinct words and numbers of a text in lower case, without plural endings and without very common words."""
    found: set[str] = set()
    for match in _WORD.finditer(text.casefold()):
        word = match.group()
        if word.endswith(("'s", "’s")):
            word = word[:-2]
        if word not in _COMMON:
            found.add(_singular(word))
            if len(found) == MAX_WORDS:
                break
    return frozenset(found)


def sentences(text: str) -> list[str]:
    """Sentences, list items and table rows, without their markup; pieces without a word are left out."""
    pieces = (piece.strip(_MARKUP) for piece in _SENTENCE_END.split(text))
    return [piece for piece in pieces if _WORD.search(piece)]


def heading(title: str, text: str) -> str:
    """What names a document: its title, or where it has none its first line or sentence; empty for an empty text."""
    if title.strip():
        return title.strip()
    # Only the start is looked at, since texts may be long.
    return next(iter(sentences(text[:2000])), "")


def part_title(title: str) -> str:
    """The title as far as it tells what a part is about: empty where it is a sentence, taken from the first part."""
    title = title.strip()
    return "" if title.endswith((".", "!", "?")) or len(title) > MAX_NAME else title


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
