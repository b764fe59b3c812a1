"""What a passage is about where it does not say so itself."""

from __future__ import annotations

import time

import pytest
from transformers import PreTrainedTokenizerFast

from hypernet.documents import DocumentText, chunk_document
from hypernet.names import context, is_first_of_several, is_naming_line, is_sentence, parts_at_names

PROSE = ("Corvo Mini weighs 3 kg. It costs 4 euros. The lifeguard is Marta Velde. Its door is red. "
         "Top speed of Lumen 2: 5 km/h. The item's next service: 26 January 2030. Borea is blue.")
LISTS = ("Corvo:\n- weight: 3 kg\n- colour: red\n**Lumen**\n- weight: 4 kg\n- colour: blue\nBorea\nweight: 5 kg\n"
         "colour: green\n\nAll are for sale.")


@pytest.mark.parametrize(("passage", "name"), [
    ("Corvo Mini weighs", ""), ("It costs", "Corvo Mini"), ("Its door", "Corvo Mini"), ("Top speed", ""),
    ("The item's", "Lumen 2"), ("Borea is", "")])
def test_the_name_that_a_sentence_refers_to(passage: str, name: str) -> None:
    assert context(PROSE, PROSE.index(passage)) == name


@pytest.mark.parametrize(("passage", "name"), [
    ("Corvo:", ""), ("- colour: red", "Corvo"), ("**Lumen**", ""), ("- colour: blue", "Lumen"),
    ("colour: green", "Borea")])
def test_the_line_that_names_what_is_listed(passage: str, name: str) -> None:
    assert context(LISTS, LISTS.index(passage)) == name
    at = LISTS.index(passage)
    end = LISTS.find("\n", at) + 1
    assert is_naming_line(LISTS, at, end) == (passage in ("Corvo:", "**Lumen**"))


def test_a_list_is_cut_before_each_line_that_names_a_subject() -> None:
    assert [LISTS[a:b].split("\n")[0] for a, b in parts_at_names(LISTS, 0, len(LISTS))] == [
        "Corvo:", "**Lumen**", "Borea"]
    assert parts_at_names(PROSE, 0, len(PROSE)) == [(0, len(PROSE))]


def test_titles_that_are_no_names_of_the_whole() -> None:
    assert is_sentence("The lamp is red.") and not is_sentence("Lamp prices")
    assert is_first_of_several(LISTS, "Corvo:") and not is_first_of_several(LISTS, "Lamps")
    assert not is_first_of_several("Corvo:\n- weight: 3 kg\n- colour: red", "Corvo:")


def test_each_chunk_names_its_subject(tokenizer: PreTrainedTokenizerFast) -> None:
    chunks = chunk_document(DocumentText("Corvo:", LISTS), tokenizer, 20, 100, 50)
    for chunk in chunks:
        for name, value in (("Corvo", "3 kg"), ("Corvo", "red"), ("Lumen", "4 kg"), ("Lumen", "blue"),
                            ("Borea", "5 kg"), ("Borea", "green")):
            assert value not in LISTS[chunk.start:chunk.end] or name in chunk.text
    assert len(chunks) >= 3
    assert not any(LISTS[chunk.start:chunk.end].strip() in ("Corvo:", "**Lumen**", "Borea") for chunk in chunks)
    text = "The lamp Kelvo is red. It stands in the first room. " + "It is dusted on Mondays and on Fridays. " * 4
    first, *others = chunk_document(DocumentText("", text), tokenizer, 30, 100, 50)
    assert others and all(chunk.text.startswith("Kelvo\nIt is") for chunk in others)


def test_a_title_taken_from_the_first_line_is_not_repeated(tokenizer: PreTrainedTokenizerFast) -> None:
    first = "The Kelvo is red."
    text = f"{first}\n" + "\n".join(f"Room {i} has {i} lamps and a door." for i in range(9))
    chunks = chunk_document(DocumentText(first, text), tokenizer, 40, 100, 50)
    assert len(chunks) > 1 and sum(first in chunk.text for chunk in chunks) == 1
    alone, = chunk_document(DocumentText(first, f"{first} It is old."), tokenizer, 90, 100, 50)
    assert alone.text.startswith(f"{first}\n\n{first}"), "a document of one chunk is as it was"


@pytest.mark.parametrize("unit", ["word ", " ", "A ", "a:", "- ", "It ", "\n", "X\na: b\n", "|", "*", "A the "])
def test_odd_texts_take_bounded_time(unit: str) -> None:
    text = "Corvo is red. " + unit * (100_000 // len(unit)) + ". It ends."
    begun = time.perf_counter()
    context(text, text.index("It ends"))
    parts_at_names(text, 0, len(text))
    assert time.perf_counter() - begun < 10
