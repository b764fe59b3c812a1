"""Documents as the hypernetwork reads them: checked, and cut into chunks of bounded token length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

_BREAK = re.compile(r"\n\s*\n|\n|(?<=[.!?])\s+")
_CHARACTERS_PER_TOKEN = 16  # more than any real text has on average; a span longer than that is cut uncounted
_FINER = (1, 4, 16)  # divisors of a chunk's room, tried in turn as the bound of one uncut sentence or line


class DocumentError(ValueError):
    """The document cannot become an adapter; the message says why and what is allowed."""


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
    """A part of a document: `text` as the hypernetwork reads it (the title before it), and the span
    `start:end` of the document's text, in characters, that it covers."""

    text: str
    start: int
    end: int


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Spans of sentences and lines that together cover the text."""
    start = 0
    for match in _BREAK.finditer(text):
        if text[start:match.end()].strip():
            yield start, match.end()
        start = match.end()
    if text[start:].strip():
        yield start, len(text)


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


def _measure(text: str, tokenizer: TokenCounter, limit: int,
             most: int | None) -> tuple[list[tuple[int, int]], list[int]]:
    """Spans of at most `limit` tokens that cover the text, and their lengths in tokens.

    Raises DocumentError as soon as they add up to more than `most`, without reading the rest.
    """
    spans: list[tuple[int, int]] = []
    lengths: list[int] = []
    total = 0
    for first, last in _pieces(text):
        for start, end, tokens in _split_long(text, first, last, tokenizer, limit):
            spans.append((start, end))
            lengths.append(tokens)
            total += tokens
            if most is not None and total > most:
                raise DocumentError(f"text: is too long: counted by sentences it has more than {most} tokens, the most "
                                    "that fit one adapter of this base")
    return spans, lengths


def chunk_document(document: DocumentText, tokenizer: TokenCounter, target_tokens: int, max_tokens: int,
                   max_chunks: int) -> list[Chunk]:
    """Cut at sentence and line ends into even chunks of about `target_tokens`, each headed by the title.

    No chunk is above `max_tokens`; where that would give more than `max_chunks`, chunks grow, and where that is still
    not enough, sentences are cut at spaces. Nothing is dropped. A text that is far too long is read only as far as it
    takes to know that. Raises DocumentError where the text is empty or does not fit `max_chunks` chunks of
    `max_tokens`.
    """
    text = document.text
    if not text.strip():
        raise DocumentError("text: is empty; at least one character other than white space is needed")
    head = f"{document.title.strip()}\n\n" if document.title.strip() else ""
    head_tokens = len(tokenizer.encode(head, add_special_tokens=False))
    if head_tokens > max_tokens // 2:
        raise DocumentError(f"title: has {head_tokens} tokens; at most {max_tokens // 2} are allowed")
    room = max_tokens - head_tokens
    for divisor in _FINER:
        # Finer cuts cost tokens of their own, so only the first, coarsest count says whether the text is too long.
        spans, lengths = _measure(text, tokenizer, max(1, room // divisor), room * max_chunks if divisor == 1 else None)
        total = sum(lengths)
        count = min(max(1, round(total / max(target_tokens - head_tokens, target_tokens // 2))), max_chunks)
        groups = _fill(lengths, min(room, -(-total // count)), room, max_chunks)
        if groups is not None:
            break
    else:
        raise DocumentError(f"text: is too long: its {total} tokens, even cut between words, do not fit {max_chunks} "
                            f"chunks of at most {room} tokens each")
    chunks = []
    for first, last in groups:
        start, end = spans[first][0], spans[last][1]
        chunks.append(Chunk(head + text[start:end].strip(), start, end))
    return chunks


def _fill(lengths: list[int], target: int, room: int, max_chunks: int) -> list[tuple[int, int]] | None:
    """Consecutive pieces packed to `target` tokens, or to more where that takes too many chunks; None if impossible."""
    while True:
        groups: list[tuple[int, int]] = []
        used, first = 0, 0
        for i, length in enumerate(lengths):
            # A piece joins where that brings the chunk nearer to the target than leaving it out.
            if used and (used + length > room or used + length / 2 > target):
                groups.append((first, i - 1))
                used, first = 0, i
            used += length
        groups.append((first, len(lengths) - 1))
        if len(groups) <= max_chunks:
            return groups
        if target >= room:
            return None
        target = min(room, target + max(8, target // 8))
