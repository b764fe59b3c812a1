"""The block structure of a text as CommonMark (with tables) sees it, as spans of its characters.

Plain text is paragraphs. Indented code and HTML count as paragraphs: in plain text an indent means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markdown_it import MarkdownIt

Kind = Literal["heading", "paragraph", "list", "item", "quote", "table", "row", "code", "rule"]

_NEWLINE = re.compile(r"\r\n?|\n")  # as markdown-it counts lines
_OPENINGS: dict[str, Kind] = {
    "heading_open": "heading", "paragraph_open": "paragraph", "bullet_list_open": "list", "ordered_list_open": "list",
    "list_item_open": "item", "blockquote_open": "quote", "table_open": "table"}
_LEAVES: dict[str, Kind] = {"fence": "code", "hr": "rule"}
_TABLE_HEADER_LINES = 2  # the header row and the line of dashes below it

_MARKDOWN = MarkdownIt("commonmark").enable("table").disable(["code", "html_block", "inline", "text_join"])


@dataclass(frozen=True)
class Block:
    """Characters `start:end` of the text; blank lines after a block belong to it.

    The blocks in `inner` cover the same span. `heading` is a heading's text, `level` its level (1..6). Of a table
    `header` is the header row with the line below it, and `inner` are its rows.
    """

    kind: Kind
    start: int
    end: int
    inner: tuple[Block, ...] = ()
    heading: str = ""
    level: int = 0
    header: str = ""


@dataclass
class _Open:
    """A block while its lines `first:last` and its inner blocks are collected."""

    kind: Kind
    first: int
    last: int
    level: int = 0
    heading: str = ""
    inner: list[_Open] = field(default_factory=list)


def parse(text: str) -> list[Block]:
    """The outermost blocks; together they cover all of the text, which must hold more than white space."""
    starts = [0, *(match.end() for match in _NEWLINE.finditer(text))]
    if starts[-1] < len(text):
        starts.append(len(text))
    root = _Open("quote", 0, len(starts) - 1)
    stack = [root]
    for token in _MARKDOWN.parse(text):
        if token.type in _OPENINGS or token.type in _LEAVES:
            first, last = token.map or (stack[-1].first, stack[-1].last)
            level = int(token.tag[1]) if token.type == "heading_open" else 0
            block = _Open(_OPENINGS.get(token.type) or _LEAVES[token.type], first, last, level)
            stack[-1].inner.append(block)
            if token.type in _OPENINGS:
                stack.append(block)
        elif token.type.removesuffix("_close") + "_open" in _OPENINGS:
            stack.pop()
        elif token.type == "inline" and stack[-1].kind == "heading":
            stack[-1].heading = token.content.strip()
    return _cover(text, starts, root.inner, 0, len(starts) - 1)


def _cover(text: str, starts: Sequence[int], inner: Sequence[_Open], first: int, last: int) -> list[Block]:
    """Blocks for the lines `first:last`: those found, and paragraphs for what lies between, such as link targets."""
    ranges: list[tuple[_Open | None, int, int]] = []
    at = first
    for block in inner:
        begin, end = max(block.first, at), min(block.last, last)
        if end <= begin:
            continue
        if text[starts[at]:starts[begin]].strip():
            ranges.append((None, at, begin))
        ranges.append((block, begin, end))
        at = end
    if text[starts[at]:starts[last]].strip():
        ranges.append((None, at, last))
    # What is left between them is blank and goes to the block before.
    edges = [first, *(begin for _, begin, _ in ranges[1:]), last]
    return [_close(text, starts, block, *lines) for (block, _, _), *lines
            in zip(ranges, edges[:-1], edges[1:], strict=True)]


def _close(text: str, starts: Sequence[int], block: _Open | None, first: int, last: int) -> Block:
    start, end = starts[first], starts[last]
    if block is None or (block.kind == "heading" and "\n" in block.heading):
        # A paragraph above a line of dashes is a heading to CommonMark even if it has several lines.
        return Block("paragraph", start, end)
    if block.kind == "table":
        body = min(first + _TABLE_HEADER_LINES, last)
        rows = [Block("row", starts[first], starts[min(body + 1, last)])]
        rows += [Block("row", starts[line], starts[line + 1]) for line in range(body + 1, last)]
        return Block("table", start, end, tuple(rows), header=text[start:starts[body]].strip())
    inner = tuple(_cover(text, starts, block.inner, first, last)) if block.kind in ("list", "item", "quote") else ()
    return Block(block.kind, start, end, inner, block.heading, block.level)
