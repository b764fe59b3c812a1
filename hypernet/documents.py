"""Documents as the hypernetwork reads them: checked, and cut into chunks of bounded token length."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

_BREAK = re.compile(r"\n\s*\n|\n|(?<=[.!?])\s+")


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


def _pieces(text: str) -> list[tuple[int, int]]:
    """Spans of sentences and lines that together cover the text."""
    cuts = [match.end() for match in _BREAK.finditer(text)]
    bounds = [0, *cuts, len(text)]
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if text[a:b].strip()]


def _split_long(text: str, start: int, end: int, tokenizer: TokenCounter, limit: int) -> list[tuple[int, int]]:
    """Halve a span at a space until each part fits; a word longer than that is cut anywhere."""
    if len(tokenizer.encode(text[start:end], add_special_tokens=False)) <= limit or end - start < 2:
        return [(start, end)]
    middle = (start + end) // 2
    space = text.rfind(" ", start + 1, middle + 1)
    cut = space + 1 if space > start else middle
    return [*_split_long(text, start, cut, tokenizer, limit), *_split_long(text, cut, end, tokenizer, limit)]


def chunk_document(document: DocumentText, tokenizer: TokenCounter, target_tokens: int, max_tokens: int,
                   max_chunks: int) -> list[Chunk]:
    """Cut at sentence and line ends into even chunks of about `target_tokens`, each headed by the title.

    No chunk is above `max_tokens`; where that would give more than `max_chunks`, chunks grow. Nothing is dropped.
    Raises DocumentError where the text is empty or needs more than `max_chunks` chunks of `max_tokens`.
    """
    text = document.text
    if not text.strip():
        raise DocumentError("text: is empty; at least one character other than white space is needed")
    head = f"{document.title.strip()}\n\n" if document.title.strip() else ""
    head_tokens = len(tokenizer.encode(head, add_special_tokens=False))
    if head_tokens > max_tokens // 2:
        raise DocumentError(f"title: has {head_tokens} tokens; at most {max_tokens // 2} are allowed")
    room = max_tokens - head_tokens
    spans = [part for a, b in _pieces(text) for part in _split_long(text, a, b, tokenizer, room)]
    lengths = [len(tokenizer.encode(text[a:b], add_special_tokens=False)) for a, b in spans]
    total = sum(lengths)
    count = min(max(1, round(total / max(target_tokens - head_tokens, target_tokens // 2))), max_chunks)
    groups = _fill(lengths, min(room, -(-total // count)), room, max_chunks)
    if groups is None:
        raise DocumentError(f"text: has about {total} tokens; at most {room * max_chunks} fit one adapter of this base")
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
