"""The benchmarks' own arithmetic, and that they select and ask as the server does, on the shipped pair."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from benchmarks.composition import Asked, Composed, by_chunks, sample
from benchmarks.interference import Setting, exchanges
from benchmarks.interference import tables as interference_tables
from benchmarks.internalisation import Answered, Outcome, corpus_items, token_f1
from benchmarks.nano_pair import Pair, Prompt
from benchmarks.parts import Divided, PartRouter
from hypernet.documents import DocumentText
from hypernet.evaluation.cases import held_out_cases
from hypernet.evaluation.scoring import contains_value
from hypernet.training.corpus.documents import Split
from router.embed import MiniLmEncoder

TEXT = "The Corvo pump weighs 14 kg.\n\nThe night ferry leaves at 22:40.\n\nThe head cook is Marta Velde."


@pytest.fixture(scope="module")
def encoder() -> MiniLmEncoder:
    return MiniLmEncoder.load(threads=1)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_a_documents_parts_are_selected_by_question(encoder: MiniLmEncoder) -> None:
    places = [(TEXT.index(part), TEXT.index(part) + len(part)) for part in TEXT.split("\n\n")]
    divided = Divided(DocumentText("", TEXT), [[place] for place in places])
    router = PartRouter(encoder, [divided, Divided(DocumentText("", "Bread costs 3 euros."), [[(0, 20)]])])
    asked = ("What does the Corvo pump weigh?", "When does the night ferry leave?", "Who is the head cook?")
    for part, question in enumerate(asked):
        assert router.within(0, question) == part
        assert router.among(question) == (0, part)
    assert router.among("What does bread cost?") == (1, 0)
    assert divided.text(1) == "The night ferry leaves at 22:40."


def test_chunks_of_a_composed_text_keep_their_places() -> None:
    composed = Composed(("one", "two", "three"), (Asked("?", "two", 1),))
    divided = by_chunks(composed, 2)
    assert [divided.text(part) for part in range(len(divided.parts))] == ["one\ntwo", "three"]


@pytest.mark.parametrize("one_domain", [True, False])
def test_a_composed_texts_questions_are_on_the_chunk_that_they_name(one_domain: bool) -> None:
    composed = sample(Random(3), 4, 1, one_domain, 4)
    assert len(composed.chunks) == 4
    assert sorted(asked.chunk for asked in composed.asked) == [0, 1, 2, 3]
    for asked in composed.asked:
        assert contains_value(composed.chunks[asked.chunk], asked.answer)


def test_the_pair_answers_each_prompt_with_the_adapter_beside_it(pair: Pair) -> None:
    """In one call as one by one, with and without adapters, closed book and in context."""
    items = corpus_items(4, (1,))
    _, loras = pair.documents([item.document for item in items])
    questions = [item.questions[0].text for item in items]
    prompts: list[Prompt] = [*questions, *questions, (items[0].text, questions[0]), "Hello"]
    adapters = [*(parts[0] for parts in loras), None, None, None, None, None, loras[1][0]]
    together = pair.ask(prompts, adapters)
    assert together == [pair.ask([prompt], [lora])[0] for prompt, lora in zip(prompts, adapters, strict=True)]
    assert together[:4] != together[4:8]


def test_interference_is_measured_on_every_table(pair: Pair, encoder: MiniLmEncoder) -> None:
    cases = held_out_cases(3, 4, Split.HELD_OUT, 7)
    setting = Setting(pair, encoder, cases)
    asked = exchanges(4)
    alone = {name: pair.ask([question for question, _ in some], [None] * len(some)) for name, some in asked.items()}
    talk = {name: setting.small_talk(some, alone[name]) for name, some in asked.items()}
    row: dict[str, Any] = {"facts": 4, "small_talk": talk, "reading": setting.reading(), "own": setting.own(),
                           "elsewhere": setting.elsewhere()}
    questions = sum(question.answerable for case in cases for question in case.questions)
    assert row["reading"]["all"]["asked"] == row["own"]["asked"] == row["elsewhere"]["asked"] == questions == 12
    assert row["own"]["closed_book"] > row["own"]["other_in_prompt_without_adapter"]
    assert row["reading"]["read_well"]["right_without"] >= 0.8 or row["reading"]["read_well"]["asked"] == 0
    assert row["elsewhere"]["without"]["right_by_chance"] < row["own"]["closed_book"]
    assert sum(line.startswith("| 4 |") for line in interference_tables([row])) == 2 + 2 + 1 + 2


def test_f1_counts_shared_words() -> None:
    assert token_f1("the red barn", ["red barn"]) == 1.0
    assert token_f1("red", ["red barn"]) == pytest.approx(2 / 3)
    assert token_f1("blue", ["red barn", "blue"]) == 1.0
    assert token_f1("green", ["red barn"]) == 0.0


def test_a_method_is_compared_on_the_documents_that_it_had() -> None:
    full = Outcome("document in context", [Answered(0, 1, True, 1.0, 20), Answered(1, 2, False, 0.5, 30)], [0.1])
    half = Outcome("refined", [Answered(1, 2, True, 1.0, 0)], [0.1], [2.0])
    row = half.row(full)
    assert row["scores"] == {"all": 1.0, "2": 1.0, "f1": 1.0}
    assert row["in_context_on_the_same"] == {"all": 0.0, "2": 0.0, "f1": 0.5}
    assert row["ratios"] == {"all": None, "2": None, "f1": 2.0}
    assert full.row(full)["ratios"] == {"all": 1.0, "1": 1.0, "2": None, "f1": 1.0}
