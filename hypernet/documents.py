"""Documents as the hypernetwork reads them: checked, and cut into chunks of bounded token length.

Cuts follow the text's structure: sections, then paragraphs, list items, table rows and lines of code, then sentences,
and words only where nothing else is left. A chunk is headed by what a reader of it alone would miss: the document's
title, the headings above it, the line that names what it lists, the header row of a table that it continues, and the
name that an "It" at its start stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hypernet.blocks import Block, parse
from hypernet.names import context, is_first_of_several, is_naming_line, is_sentence, parts_at_names

_BREAK = re.compile(r"\n\s*\n|\n|(?<=[.!?])\s+")
_CHARACTERS_PER_TOKEN = 16  # more than any real text has on average; a span longer than that is cut uncounted
_FINER = (1, 4, 16)  # divisors of a chunk's room, tried in turn as the bound of one uncut sentence or line
_MOST_PARSED = 400_000  # characters; the structure of a longer text is not looked for, since odd ones take long
_NAMED = ("paragraph", "list", "item")  # blocks in which a line may name those below it
_WHOLE = 2  # lists and tables of up to so many times the target length stay in one chunk


class DocumentError(ValueError):
    """The document cannot become an adapter; the message says why and what is allowed."""


class DocumentTooLong(DocumentError):
    """The document's text has more tokens than the adapters of one document can hold."""


class TokenCounter(Protocol):
    """What chunking needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Token IDs of `text`."""


@dataclass(frozen=True)
class DocumentText:
    """What a tenant posted."""

    title: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A part of a document: `text` as the hypernetwork reads it (title, headings and the like before it), and the
    span `start:end` of the document's text, in characters, that it covers."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class _Unit:
    """What is not cut any further: a span and its tokens; what goes before it where a chunk begins with it, and the
    tokens of that; whether a section begins here, and whether it only names what comes after it."""

    start: int
    end: int
    tokens: int
    lead: str = ""
    lead_tokens: int = 0
    section: bool = False
    opening: bool = False


def _pieces(text: str, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Spans of sentences and lines that together cover `first:last` of the text."""
    start = first
    for match in _BREAK.finditer(text, first, last):
        if text[start:match.end()].strip():
            yield start, match.end()
        start = match.end()
    if text[start:last].strip():
        yield start, last


def _split_long(text: str, start: int, end: int, tokenizer: TokenCounter,
                limit: int) -> Iterator[tuple[int, int, int]]:
    """Halve a span at a space until each part fits; a word longer than that is cut anywhere. Parts come in order,
    each as (start, end, tokens), and only as far as the caller reads."""
    # A span that cannot fit is not tokenised first: of a text in one line that would be all of it, at every halving.
    if end - start <= limit * _CHARACTERS_PER_TOKEN:
        tokens = len(tokenizer.encode(text[start:end], add_special_tokens=False))
        if tokens <= limit or end - start < 2:
            yield start, end, tokens
            return
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle + 1)
    cut = space + 1 if space > start else middle
    yield from _split_long(text, start, cut, tokenizer, limit)
    yield from _split_long(text, cut, end, tokenizer, limit)


class _Cutter:
    """Cuts one text into units, of which none has more than `room` tokens together with what goes before it.

    Paragraphs of up to `target` tokens, lists and tables of up to a few times that, and any code that has room stay
    whole.
    """

    def __init__(self, document: DocumentText, tokenizer: TokenCounter, target: int, room: int) -> None:
        self._title = document.title.strip()
        self._text = document.text
        self._tokenizer = tokenizer
        self._room = room
        paragraph, whole = min(target, room), min(_WHOLE * target, room)
        self._most = {"paragraph": paragraph, "heading": paragraph, "item": paragraph, "rule": paragraph,
                      "row": paragraph, "quote": whole, "list": whole, "table": whole, "code": room}
        self._most_lead = target // 2

    def plain(self, limit: int) -> Iterator[_Unit]:
        """Sentences and lines, whatever the structure, in pieces of at most `limit` tokens."""
        for first, last in _pieces(self._text, 0, len(self._text)):
            for span in _split_long(self._text, first, last, self._tokenizer, limit):
                yield self._unit(*span)

    def structured(self) -> Iterator[_Unit]:
        """Blocks that fit, and their parts, each led by the headings above it."""
        path: list[tuple[int, str]] = []
        heading_start: int | None = None  # of headings that wait for the text below them
        lead = above = ""
        for block in parse(self._text):
            if block.kind == "heading":
                path = [(level, text) for level, text in path if level < block.level]
                if heading_start is None:
                    heading_start, above = block.start, self._lead(path)
                path.append((block.level, block.heading))
                lead = self._lead(path)
                last = block
                continue
            units = self._of(block, lead, self._count(lead))
            if heading_start is not None:
                yield from self._headed(heading_start, above, block, next(units))
                heading_start = None
            yield from units
        if heading_start is not None:
            # Headings with nothing below them.
            whole = Block("heading", heading_start, last.end)
            yield from self._of(whole, above, self._count(above))

    def _headed(self, start: int, above: str, block: Block, first: _Unit) -> Iterator[_Unit]:
        """Headings from `start` on with the first unit of the block below them, in one where that has room."""
        above_tokens = self._count(above)
        tokens = self._count(self._text[start:first.end]) if self._near(start, first.end) else self._room + 1
        if tokens + above_tokens <= self._room:
            yield _Unit(start, first.end, tokens, above, above_tokens, section=True)
            return
        headings = self._of(Block("heading", start, block.start), above, above_tokens)
        yield replace(next(headings), section=True)
        yield from headings
        yield first

    def _of(self, block: Block, lead: str, lead_tokens: int) -> Iterator[_Unit]:
        """The block as one unit where it may stay whole, else its parts."""
        room = max(1, self._room - lead_tokens)
        most = min(self._most[block.kind], room)
        named = parts_at_names(self._text, block.start, block.end) if block.kind in _NAMED else []
        if len(named) > 1:
            # What lines such as "Corvo:" name are sections, even within what Markdown takes for one list.
            for start, end in named:
                yield from self._lines(start, end, lead, lead_tokens, room)
            return
        if self._near(block.start, block.end):
            tokens = self._count(self._text[block.start:block.end])
            if tokens <= most:
                yield self._unit(block.start, block.end, tokens, lead, lead_tokens)
                return
        if block.kind == "table":
            yield from self._rows(block, lead, lead_tokens)
        elif block.inner:
            for inner in block.inner:
                yield from self._of(inner, lead, lead_tokens)
        else:
            yield from self._lines(block.start, block.end, lead, lead_tokens, room)

    def _lines(self, start: int, end: int, lead: str, lead_tokens: int, room: int) -> Iterator[_Unit]:
        """Sentences and lines of the span `start:end`, each of at most `room` tokens."""
        for first, last in _pieces(self._text, start, end):
            for span in _split_long(self._text, first, last, self._tokenizer, room):
                yield self._unit(*span, lead, lead_tokens)

    def _unit(self, start: int, end: int, tokens: int, lead: str = "", lead_tokens: int = 0) -> _Unit:
        names = is_naming_line(self._text, start, end)
        return _Unit(start, end, tokens, lead, lead_tokens, section=names, opening=names)

    def _rows(self, table: Block, lead: str, lead_tokens: int) -> Iterator[_Unit]:
        """Rows; all but the first, which stands below the header as it is, are led by a copy of the header."""
        header = f"{table.header}\n"
        header_tokens = self._count(header)
        repeated = (lead + header, lead_tokens + header_tokens)
        if header_tokens > min(self._most["table"], self._room - lead_tokens) // 2:
            repeated = (lead, lead_tokens)
        for i, row in enumerate(table.inner):
            yield from self._of(row, *(repeated if i else (lead, lead_tokens)))

    def _lead(self, path: Sequence[tuple[int, str]]) -> str:
        """The headings as lines, the nearest last, with as many of the outer ones as have a place; without the title,
        which stands there anyway."""
        lines = [text for _, text in path if text and text.casefold() != self._title.casefold()]
        while lines:
            lead = "\n".join(lines) + "\n\n"
            if len(lead) <= self._most_lead * _CHARACTERS_PER_TOKEN and self._count(lead) <= self._most_lead:
                return lead
            del lines[0]
        return ""

    def _near(self, start: int, end: int) -> bool:
        """Whether a span could fit at all; what cannot is not counted."""
        return end - start <= self._room * _CHARACTERS_PER_TOKEN

    def _count(self, text: str) -> int:
        return _count(self._tokenizer, text)


def chunk_document(document: DocumentText, tokenizer: TokenCounter, target_tokens: int, max_tokens: int,
                   max_chunks: int) -> list[Chunk]:
    """Cut along the structure into even chunks of about `target_tokens`, each headed by the title and its headings.

    No chunk is above `max_tokens`; where that would give more than `max_chunks`, chunks grow, and where that is still
    not enough, structure gives way to sentences, and sentences are cut at spaces. Nothing of the text is dropped; a
    title of more than `target_tokens` is left out. A text that is far too long is read only as far as it takes to know
    that. Raises DocumentError where the text is empty or the title too long, and DocumentTooLong where the text does
    not fit `max_chunks` chunks of `max_tokens`.
    """
    text = document.text
    if not text.strip():
        raise DocumentError("text: is empty; at least one character other than white space is needed")
    head = f"{document.title.strip()}\n\n" if document.title.strip() else ""
    head_tokens = _count(tokenizer, head)
    if head_tokens > max_tokens // 2:
        raise DocumentError(f"title: has {head_tokens} tokens; at most {max_tokens // 2} are allowed")
    if head_tokens > target_tokens:
        # A whole sentence rather than a name, such as the first line of a text without a title: it stands in the text.
        head, head_tokens = "", 0
    elif is_first_of_several(text, document.title) or (
            is_sentence(document.title) and text.lstrip().startswith(document.title.strip())):
        if len(text) > 2 * target_tokens * _CHARACTERS_PER_TOKEN or _is_several(_count(tokenizer, text), target_tokens,
                                                                               head_tokens):
            # Taken from a text without a title: above all chunks it would state its fact, or name its subject, in each.
            head, head_tokens = "", 0
    room = max_tokens - head_tokens
    target = max(target_tokens - head_tokens, target_tokens // 2)
    cutter = _Cutter(document, tokenizer, target, room)
    ways = [cutter.plain(max(1, room // divisor)) for divisor in _FINER]
    if len(text) <= min(room * max_chunks * _CHARACTERS_PER_TOKEN, _MOST_PARSED):
        # Structure shows only in the whole text, so it is looked for where the text may fit.
        ways.insert(0, cutter.structured())
    for i, way in enumerate(ways):
        # Finer cuts cost tokens of their own, so only the first, coarsest count says whether the text is too long.
        units = _bounded(way, room, max_chunks) if i == 0 else list(way)
        total = sum(unit.tokens for unit in units)
        count = min(max(1, round(total / target)), max_chunks)
        groups = _fill(units, min(room, -(-total // count)), room, max_chunks, by_section=count > 1)
        if groups is not None:
            break
    else:
        raise DocumentTooLong(f"text: is too long: its {total} tokens, even cut between words, do not fit {max_chunks} "
                              f"chunks of at most {room} tokens each")
    chunks = []
    for first, last in groups:
        start, end = units[first].start, units[last].end
        lead, body = head + units[first].lead, text[start:end].strip()
        name = context(text, start)
        if name and name.casefold() not in lead.casefold():
            named = f"{lead}{name}\n{body}"
            lead = named.removesuffix(body) if _count(tokenizer, named) <= max_tokens else lead
        chunks.append(Chunk(lead + body, start, end))
    # Where units meet, tokens may come out otherwise than alone: then cut again with as much less room.
    over = max(_count(tokenizer, chunk.text) for chunk in chunks) - max_tokens
    if over > 0:
        return chunk_document(document, tokenizer, target_tokens, max_tokens - over, max_chunks)
    return chunks


def _count(tokenizer: TokenCounter, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False)) if text else 0


def _is_several(tokens: int, target: int, head_tokens: int) -> bool:
    """Whether a text of so many tokens takes more than one chunk, each with a title of `head_tokens`."""
    return round(tokens / max(target - head_tokens, target // 2)) > 1


def _bounded(units: Iterator[_Unit], room: int, max_chunks: int) -> list[_Unit]:
    """All units. Raises DocumentTooLong as soon as they have more tokens than all chunks, without reading the rest."""
    found, total = [], 0
    for unit in units:
        found.append(unit)
        total += unit.tokens
        if total > room * max_chunks:
            raise DocumentTooLong(f"text: is too long: it has more than {room * max_chunks} tokens, the most that fit "
                                  f"{max_chunks} chunks of at most {room} tokens each")
    return found


def _fill(units: Sequence[_Unit], target: int, room: int, max_chunks: int,
          by_section: bool) -> list[tuple[int, int]] | None:
    """Consecutive units packed to `target` tokens, or to more where that takes too many chunks; None if impossible.

    `by_section`: a chunk of half the target or more ends where a section begins. No chunk ends with a line that only
    names what comes after it, where there is room.
    """
    while True:
        groups: list[tuple[int, int]] = []
        used, first = units[0].lead_tokens + units[0].tokens, 0
        for i, unit in enumerate(units[1:], 1):
            # A unit joins where that brings the chunk nearer to the target than leaving it out.
            full = used + unit.tokens > room or used + unit.tokens / 2 > target
            if full or (by_section and unit.section and 2 * used >= target):
                last = i - 1
                if units[last].opening and last > first and units[last].tokens + unit.tokens + unit.lead_tokens <= room:
                    last -= 1
                groups.append((first, last))
                first = last + 1
                used = units[first].lead_tokens + sum(one.tokens for one in units[first:i])
            used += unit.tokens
        groups.append((first, len(units) - 1))
        if len(groups) <= max_chunks:
            return groups
        if target >= room:
            return None
        target = min(room, target + max(8, target // 8))
