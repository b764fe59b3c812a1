"""Chunking: nothing lost, nothing too long, in order, headed by the title."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hypernet.documents import DocumentError, DocumentText, chunk_document

WORDS = st.sampled_from(["The", "lamp", "costs", "$4.20", "x" * 90, "Kelvo", "é✓", "|", "-", "1,250", "Dr."])
GAPS = st.sampled_from([" ", "  ", ". ", "! ", "\n", "\n\n", "\n \n", "? "])
TEXTS = st.lists(st.tuples(WORDS, GAPS), min_size=1, max_size=150).map(lambda p: "".join(a + b for a, b in p))
ANY_TEXT = TEXTS | st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)
TITLES = st.sampled_from(["", "  ", "Lamp", " Price list of Kelvo lamps "])


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@settings(max_examples=200, deadline=None)
@given(title=TITLES, text=ANY_TEXT, target=st.integers(16, 60), room=st.integers(0, 60))
def test_chunks_cover_the_text(tokenizer: PreTrainedTokenizerFast, title: str, text: str, target: int,
                               room: int) -> None:
    limit = max(target + room, 40)
    if not text.strip():
        with pytest.raises(DocumentError):
            chunk_document(DocumentText(title, text), tokenizer, target, limit, 400)
        return
    chunks = chunk_document(DocumentText(title, text), tokenizer, target, limit, 400)
    head = f"{title.strip()}\n\n" if title.strip() else ""
    at = 0
    for chunk in chunks:
        assert at <= chunk.start < chunk.end <= len(text)
        assert not text[at:chunk.start].strip(), "text between two chunks was dropped"
        assert chunk.text == head + text[chunk.start:chunk.end].strip()
        assert tokens(tokenizer, chunk.text) <= limit
        at = chunk.end
    assert not text[at:].strip()


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
