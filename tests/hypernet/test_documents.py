"""Chunking: nothing lost, nothing too long, in order, headed by the title."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hypernet.documents import Chunk, DocumentError, DocumentText, chunk_document

WORDS = st.sampled_from(["The", "lamp", "costs", "$4.20", "x" * 90, "Kelvo", "é✓", "|", "-", "1,250", "Dr."])
GAPS = st.sampled_from([" ", "  ", ". ", "! ", "\n", "\n\n", "\n \n", "? "])
TEXTS = st.lists(st.tuples(WORDS, GAPS), min_size=1, max_size=150).map(lambda p: "".join(a + b for a, b in p))
ANY_TEXT = TEXTS | st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)
TITLES = st.sampled_from(["", "  ", "Lamp", " Price list of Kelvo lamps "])


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def assert_covered(document: DocumentText, chunks: Sequence[Chunk], tokenizer: PreTrainedTokenizerFast,
                   limit: int) -> None:
    """Spans in order that leave out nothing but white space; each chunk within the limit, headed, and ending with
    its span."""
    head = f"{document.title.strip()}\n\n" if document.title.strip() else ""
    at = 0
    for chunk in chunks:
        assert at <= chunk.start < chunk.end <= len(document.text)
        assert not document.text[at:chunk.start].strip(), "text between two chunks was dropped"
        assert chunk.text.startswith(head)
        assert chunk.text.removeprefix(head).endswith(document.text[chunk.start:chunk.end].strip())
        assert tokens(tokenizer, chunk.text) <= limit
        at = chunk.end
    assert not document.text[at:].strip()


@settings(max_examples=200, deadline=None)
@given(title=TITLES, text=ANY_TEXT, target=st.integers(16, 60), room=st.integers(0, 60))
def test_chunks_cover_the_text(tokenizer: PreTrainedTokenizerFast, title: str, text: str, target: int,
                               room: int) -> None:
    limit = max(target + room, 40)
    document = DocumentText(title, text)
    if not text.strip():
        with pytest.raises(DocumentError):
            chunk_document(document, tokenizer, target, limit, 400)
        return
    assert_covered(document, chunk_document(document, tokenizer, target, limit, 400), tokenizer, limit)


LINES = st.sampled_from([
    "# Lamps", "## Prices", "### Of 2024", "Notes", "=====", "---", "- red", "  - dark red", "1. first", "> quoted",
    "| lamp | price |", "|---|---|", "| Kelvo | $4.20 |", "```", "~~~ python", "cost = 1250", "    indented", "\t- tab",
    "[link]: http://example.org/a", "<div>", "The lamp is red. It costs $4.20.", "Kelvo " * 30, "", "", "\r", "\u2028x",
    "\x0c", "***", "a\r\nb"])


@settings(max_examples=300, deadline=None)
@given(title=TITLES, lines=st.lists(LINES, min_size=1, max_size=60), target=st.integers(16, 60))
def test_chunks_cover_markdown(tokenizer: PreTrainedTokenizerFast, title: str, lines: list[str], target: int) -> None:
    document = DocumentText(title, "\n".join(lines) + " end")
    assert_covered(document, chunk_document(document, tokenizer, target, 70, 400), tokenizer, 70)


@settings(max_examples=80, deadline=None)
@given(text=TEXTS, most=st.integers(1, 4))
def test_a_text_in_bounds_is_never_dropped(tokenizer: PreTrainedTokenizerFast, text: str, most: int) -> None:
    """Either all of it within the chunk count, or an error; never a part."""
    try:
        chunks = chunk_document(DocumentText("", text), tokenizer, 24, 64, most)
    except DocumentError as error:
        assert "text" in str(error)
        assert tokens(tokenizer, text) > 64 * most / 2
        return
    assert len(chunks) <= most
    joined = "".join(text[chunk.start:chunk.end] for chunk in chunks)
    assert "".join(joined.split()) == "".join(text.split())


def test_a_short_text_is_one_chunk(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The lamp costs $4.20. It is red."
    chunk, = chunk_document(DocumentText("Lamp", text), tokenizer, 96, 500, 4)
    assert chunk.text == f"Lamp\n\n{text}" and (chunk.start, chunk.end) == (0, len(text))


def test_chunks_are_even_and_end_at_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = [f"Lamp {i} stands in room {i}00 and costs {i} euros." for i in range(1, 30)]
    chunks = chunk_document(DocumentText("", " ".join(sentences)), tokenizer, 60, 200, 50)
    assert len(chunks) > 3
    assert all(chunk.text.endswith("euros.") for chunk in chunks)
    lengths = [tokens(tokenizer, chunk.text) for chunk in chunks]
    assert max(lengths) < 90 and min(lengths[:-1]) > 35


def test_chunks_grow_where_there_may_be_few(tokenizer: PreTrainedTokenizerFast) -> None:
    document = DocumentText("", " ".join(f"Lamp {i} costs {i} euros." for i in range(60)))
    assert len(chunk_document(document, tokenizer, 40, 400, 3)) <= 3 < len(
        chunk_document(document, tokenizer, 40, 400, 50))


@pytest.mark.parametrize("text", ["", "   ", "\n\n\t", "\u00a0"])
def test_an_empty_text_is_refused(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(DocumentError, match="text: is empty"):
        chunk_document(DocumentText("Lamp", text), tokenizer, 96, 500, 4)


class Counting:
    """A tokenizer that notes how many characters it was given in all."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def test_too_long_a_text_is_refused_with_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DocumentError, match="text: .* more than 200 tokens, the most that fit"):
        chunk_document(DocumentText("", "The lamp is red. " * 200), tokenizer, 40, 100, 2)


@pytest.mark.parametrize("unit", ["word ", "The lamp is red. ", "x", "The lamp is red\n", " ", "é"])
def test_a_huge_text_is_refused_without_tokenising_all_of_it(tokenizer: PreTrainedTokenizerFast, unit: str) -> None:
    counting = Counting(tokenizer)
    text = "A lamp" + unit * (900_000 // len(unit))
    with pytest.raises(DocumentError, match="more than 2000 tokens"):
        chunk_document(DocumentText("", text), counting, 100, 500, 4)
    assert counting.characters < 60_000


def test_a_few_long_lines_that_fit_in_sum_are_cut_to_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    """Three lines, each of more than half a chunk, for two chunks."""
    line = " ".join(f"lamp {i}" for i in range(30))
    size = tokens(tokenizer, line)
    limit = int(size * 1.7)
    text = "\n".join([line] * 3)
    chunks = chunk_document(DocumentText("", text), tokenizer, limit, limit, 2)
    assert len(chunks) == 2 and all(tokens(tokenizer, chunk.text) <= limit for chunk in chunks)
    assert "".join(text[chunk.start:chunk.end] for chunk in chunks) == text


def test_the_message_for_what_no_cut_can_fit_does_not_contradict_itself() -> None:
    """Single characters of three tokens each leave a token of every chunk unused."""

    class ThreeEach:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0] * (3 * len(text))

    with pytest.raises(DocumentError) as refused:
        chunk_document(DocumentText("", "abcdefg"), ThreeEach(), 10, 11, 2)
    assert str(refused.value) == (
        "text: is too long: its 21 tokens, even cut between words, do not fit 2 chunks of at most 11 tokens each")


def test_too_long_a_title_is_refused_with_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DocumentError, match="title: has .* at most 20"):
        chunk_document(DocumentText("lamp " * 60, "It is red."), tokenizer, 30, 40, 2)


GUIDE = """# Lamps

All lamps of the house stand in this guide. It is read from top to bottom, and nobody has found a mistake in it so far.

## Desk lamps

### Kelvo

The Kelvo stands on the desk of the director. It was bought in 1998 and costs 42 euros. It has a green shade of glass.
Its bulb takes 40 watts. Nobody may move it, since the foot is loose and the cable is short.

The second Kelvo stands in the store room. It has no shade. It was never paid for, as far as anybody knows today.

## Prices

| lamp | price in euros | room | bought in | colour |
|------|----------------|------|-----------|--------|
""" + "\n".join(f"| Lamp {i} | {i * 7} | room {i}01 | {1950 + i} | red |" for i in range(1, 13)) + """

## Script

```python
def price(lamp):
    # Twice the sum, and nothing else: the rest was paid for.
    total = sum(part.price for part in lamp.parts)
    return 2 * total
```

Run it once a year.
"""


@pytest.fixture(scope="module")
def guide(tokenizer: PreTrainedTokenizerFast) -> list[Chunk]:
    return chunk_document(DocumentText("House guide", GUIDE), tokenizer, 90, 240, 50)


def chunk_with(chunks: list[Chunk], text: str) -> Chunk:
    chunk, = (chunk for chunk in chunks if text in GUIDE[chunk.start:chunk.end])
    return chunk


def test_a_chunk_is_led_by_the_headings_above_it(guide: list[Chunk]) -> None:
    second = chunk_with(guide, "The second Kelvo")
    assert second.text.startswith("House guide\n\nLamps\nDesk lamps\nKelvo\n\n")
    first = chunk_with(guide, "### Kelvo")
    assert "### Kelvo\n\nThe Kelvo stands" in first.text, "a heading stays with what it heads"
    assert not first.text.startswith("House guide\n\nLamps\nDesk lamps\nKelvo")


def test_a_long_table_repeats_its_header(guide: list[Chunk]) -> None:
    header = "\n".join(line for line in GUIDE.splitlines() if line.startswith(("| lamp |", "|---")))
    assert header.count("\n") == 1
    rows = [chunk for chunk in guide if "| Lamp " in GUIDE[chunk.start:chunk.end]]
    assert len(rows) > 2
    assert all(chunk.text.count(header) == 1 for chunk in rows)
    assert all(chunk.text.startswith(f"House guide\n\nLamps\nPrices\n\n{header}\n| Lamp ") for chunk in rows[1:])
    for chunk in rows:
        own = GUIDE[chunk.start:chunk.end]
        assert all(line.endswith("| red |") for line in own.splitlines() if line.startswith("| Lamp "))


def test_a_short_table_and_code_stay_whole(tokenizer: PreTrainedTokenizerFast, guide: list[Chunk]) -> None:
    script = chunk_with(guide, "def price")
    assert "```python\ndef price" in script.text and "return 2 * total\n```" in script.text
    table = "| lamp | price |\n|---|---|\n" + "\n".join(f"| Lamp {i} | {i} |" for i in range(8))
    prose = "The lamp is red and stands here. " * 5
    text = f"{prose}\n\n{table}\n\n{prose}"
    chunks = chunk_document(DocumentText("", text), tokenizer, 60, 300, 50)
    assert len(chunks) > 2 and sum(table in chunk.text for chunk in chunks) == 1


def test_sections_do_not_share_a_chunk_where_they_need_not(tokenizer: PreTrainedTokenizerFast) -> None:
    body = " ".join(["The lamp is red and stands here."] * 6)
    text = "\n\n".join(f"## Room {i}\n\n{body}" for i in range(5))
    chunks = chunk_document(DocumentText("", text), tokenizer, tokens(tokenizer, body) + 20, 300, 50)
    assert [chunk.text.count("## Room") for chunk in chunks] == [1] * 5
    assert all(chunk.text.startswith("## Room") for chunk in chunks)


def test_paragraphs_stay_whole_where_they_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    paragraphs = [f"Lamp {i} is red. It stands in room {i}. It costs {i} euros." for i in range(12)]
    text = "\n\n".join(paragraphs)
    chunks = chunk_document(DocumentText("", text), tokenizer, 70, 200, 50)
    assert len(chunks) > 3
    assert all(chunk.text.split("\n\n") == [p for p in paragraphs if p in chunk.text] for chunk in chunks)


def test_a_heading_of_many_words_is_not_repeated(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "# " + "lamp " * 60 + "\n\n" + "The lamp is red and stands here. " * 20
    chunks = chunk_document(DocumentText("", text), tokenizer, 50, 100, 50)
    assert sum(chunk.text.count("lamp lamp") > 3 for chunk in chunks) == 2
    assert_covered(DocumentText("", text), chunks, tokenizer, 100)


@pytest.mark.parametrize("unit", ["> ", "- ", "* * ", "[", "| a ", "# \n", "- a\n  ", ">>\n", "`", "[a]: <\n", "\\"])
def test_odd_markdown_takes_bounded_time(tokenizer: PreTrainedTokenizerFast, unit: str) -> None:
    text = "A lamp.\n\n" + unit * (20_000 // len(unit)) + "end"
    begun = time.perf_counter()
    try:
        chunks = chunk_document(DocumentText("", text), tokenizer, 90, 500, 400)
    except DocumentError as error:
        assert "too long" in str(error)
    else:
        assert_covered(DocumentText("", text), chunks, tokenizer, 500)
    assert time.perf_counter() - begun < 30
