"""What a passage is about where it does not say so itself: the line that names its subject, or the nearest name before
a passage that begins with "It".

"Corvo:" or "**Corvo**" above lines such as "weight: 3 kg" is a heading in effect, though not to Markdown. In prose a
name is a run of capitalised words before the verb: in "The lifeguard is Marta Velde" it would be a value.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache

_MOST_NAME = 80  # characters
_MOST_SENTENCE = 400  # characters; a sentence's subject is looked for that far
_MOST_LOOKED_AT = 400_000  # characters; longer texts have no names here
_LINE = re.compile(r"[^\r\n]+")
_LABELLED = re.compile(r"\s*(?:[-*+]\s+)?[^\W\d_][^:.!?|]{0,40}:\s+\S")
_BULLET = re.compile(r"\s*[-*+]\s+\S")
_BARE = re.compile(r"\s*(?:\*\*(?P<bold>[^*|]+)\*\*:?|(?P<colon>[^\W_][^:|.!?]*):|(?P<plain>[^\W_][^:|.!?]*))\s*")
_SENTENCE = re.compile(r"[^\s](?:[^.!?\r\n]|[.!?](?!\s))*[.!?]*")
_NAME = re.compile(r"\b[A-Z][\w'’-]*(?:(?: (?:of|the|and|de|van))? (?:[A-Z][\w'’-]*|\d[\w-]*))*")
_REFERS = re.compile(r"(?:It|Its|They|Their|He|His|She|Her|This|These)\b")
_PRONOUN = re.compile(r"\b(?:it|its|they|their|them|his|her)\b")
_VERB = re.compile(r":|\b(?:is|are|was|were|has|have|had|comes|takes|costs|will|can|must)\b")
_NO_NAMES = frozenset(
    """A All An And As At By Each Every For From Here How If In It Its Most No On One Or Since Some That The Their There
    These They This Those To Under What When Where While With He His She Her You Your We Our I January February March
    April May June July August September October November December Monday Tuesday Wednesday Thursday Friday Saturday
    Sunday""".split()
)


def context(text: str, start: int) -> str:
    """What names the subject of the passage that begins at character `start`; empty where the passage says it itself,
    where it begins the text, or where nothing above it does."""
    return _names(text).at(start) if 0 < start < len(text) <= _MOST_LOOKED_AT else ""


def named_passages(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text of each span, `start:end` in characters, behind the name of what it is about (see `context`)."""
    return [f"{context(text, start)}\n{text[start:end]}".strip() for start, end in spans]


def is_naming_line(text: str, start: int, end: int) -> bool:
    """Whether characters `start:end` are a line that names what the lines below it are about, and no more."""
    if end - start > 2 * _MOST_NAME or len(text) > _MOST_LOOKED_AT:
        return False
    first = start + len(text[start:end]) - len(text[start:end].lstrip())
    return first in _names(text).naming


def is_sentence(title: str) -> bool:
    """Whether a title is the first sentence of a text rather than a name."""
    return title.rstrip().endswith((".", "!", "?")) or len(title) > 2 * _MOST_NAME


def is_first_of_several(text: str, title: str) -> bool:
    """Whether a title is the first of several lines in the text that each name what comes below them."""
    if len(text) > _MOST_LOOKED_AT:
        return False
    first = text.lstrip().split("\n", 1)[0]
    naming = _names(text).naming
    at = len(text) - len(text.lstrip())
    return bool(title.strip("#*: ")) and first.strip("#*: \r") == title.strip("#*: ") and len(naming) > (at in naming)


def parts_at_names(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The span `start:end` cut before each line in it that names what comes below."""
    ordered = _names(text).ordered if len(text) <= _MOST_LOOKED_AT else []
    cuts = ordered[bisect_right(ordered, start):bisect_left(ordered, end)]
    edges = [start, *cuts, end]
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if text[a:b].strip()]


def without_article(name: str) -> str:
    """The name less a word at its start that only stands there because a sentence begins."""
    parts = name.split(" ")
    while parts and parts[0] in _NO_NAMES:
        del parts[0]
    return " ".join(parts)


class _Names:
    """The names of one text, by place."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.naming: set[int] = set()
        """Where a naming line begins."""
        self._line_starts: list[int] = []
        self._subjects: list[str] = []  # of each of these lines, from the line that names it
        self._read_lines()
        self.ordered = sorted(self.naming)
        self._name_ends: list[int] = []
        self._found: list[str] = []
        self._read_names()

    def at(self, start: int) -> str:
        """The subject of the passage at `start`, as `context` gives it."""
        while start < len(self._text) and self._text[start].isspace():
            start += 1
        if start in self.naming or self._text.startswith("#", start):
            return ""  # it says itself what it is about
        line = bisect_right(self._line_starts, start) - 1
        if line >= 0 and self._subjects[line]:
            return self._subjects[line]
        sentence = _SENTENCE.match(self._text, start, start + _MOST_SENTENCE)
        if sentence is None or _subject(sentence[0]):
            return ""
        before = bisect_right(self._name_ends, start) - 1
        return self._found[before] if before >= 0 else ""

    def _read_lines(self) -> None:
        lines = list(_LINE.finditer(self._text))
        subject = ""
        for i, line in enumerate(lines):
            following = lines[i + 1][0] if i + 1 < len(lines) else ""
            name = _bare_name(line[0], following)
            at = line.start() + len(line[0]) - len(line[0].lstrip())
            self._line_starts.append(at)
            if name:
                subject = name
                self.naming.add(at)
                self._subjects.append("")
            elif _LABELLED.match(line[0]) or _BULLET.match(line[0]) or "|" in line[0]:
                self._subjects.append(subject)
            else:
                subject = ""
                self._subjects.append("")

    def _read_names(self) -> None:
        for sentence in _SENTENCE.finditer(self._text):
            name = _subject(sentence[0])
            if name:
                self._name_ends.append(sentence.end())
                self._found.append(name)


@lru_cache(maxsize=4)
def _names(text: str) -> _Names:
    return _Names(text)


def _bare_name(line: str, following: str) -> str:
    """The name that a line consists of; empty where it is no naming line."""
    match = _BARE.fullmatch(line) if len(line) <= _MOST_NAME and following else None
    if match is None:
        return ""
    name = (match["bold"] or match["colon"] or match["plain"] or "").strip()
    listed = bool(_LABELLED.match(following) or _BULLET.match(following) or following.lstrip().startswith("|"))
    return name if listed and not _BULLET.match(line) else ""


def _subject(sentence: str) -> str:
    """The first name before the verb or colon of a sentence; empty where there is none, or a pronoun stands for it."""
    sentence = sentence[:_MOST_SENTENCE].lstrip("-*+ ")
    if _REFERS.match(sentence) or _PRONOUN.search(sentence):
        return ""
    verb = _VERB.search(sentence)
    initial = ""
    for match in _NAME.finditer(sentence, 0, verb.start() if verb else len(sentence)):
        name = without_article(match[0])
        owned = name.endswith(("'s", "’s"))
        name = name[:-2] if owned else name
        if not 2 < len(name) <= _MOST_NAME:
            continue
        if match.start() or " " in name or owned:
            return name
        # One capitalised word at the beginning may be any word, unless it is the whole subject.
        after = sentence[match.end():].split(maxsplit=1)
        if verb and not sentence[match.end():verb.start()].strip():
            initial = name
        elif not verb and after and after[0].endswith("s"):
            initial = name
    return initial
