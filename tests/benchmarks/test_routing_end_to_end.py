"""The end-to-end benchmark of routing: its questions, its arithmetic, and its files. It asks a server only when run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import routing_end_to_end
from benchmarks.routing_end_to_end import (
    BASE,
    FIRST,
    NEAREST,
    ON_DOCUMENTS,
    ORACLE,
    ROUTED,
    Outcome,
    Question,
    Slice,
    answered_row,
    cause,
    choice_row,
    figures,
    interval,
    main,
    report,
    sample,
    sweep_row,
    with_calibration,
    write,
)
from hypernet.evaluation.scoring import contains_value
from hypernet.training.corpus.documents import SampledDocument
from router.calibrate import FEATURES, Calibration

UNKNOWN = "I do not know."
Sampled = tuple[list[SampledDocument], list[Question]]


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return sample(16, 7)


def outcome(document: int | None, best: int, confidence: float, *, kind: Slice = Slice.SINGLE,
            chosen: int | None = None, usable: bool = True, own_part: bool = True, threshold: float = 0.5,
            **right: bool) -> Outcome:
    """`right` says of the conditions by their first words whether they answer right; else they say that they do not
    know, or something wrong where an adapter answers."""
    answer = "14 kg" if kind in (*ON_DOCUMENTS, Slice.SMALL_TALK) else None
    answers = {ROUTED: UNKNOWN if chosen is None else "2 kg", ORACLE: "2 kg", NEAREST: "2 kg", FIRST: "2 kg",
               BASE: UNKNOWN}
    answers.update({name: "14 kg" for name in answers if right.get(name.split()[0])})
    return Outcome(Question(kind, "How heavy is it?", answer, document), chosen, own_part,
                   "matched" if chosen is not None else "below_threshold", best, confidence, threshold, usable,
                   (0.0,) * len(FEATURES), answers)


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_are_of_the_seed(sampled: Sampled) -> None:
    assert sample(16, 7) == sampled
    assert sample(16, 8)[1] != sampled[1]


def test_questions_on_documents_name_what_they_are_about(sampled: Sampled) -> None:
    documents, questions = sampled
    asked = [one for one in questions if one.slice in ON_DOCUMENTS]
    assert len(documents) == 16 and len(asked) == sum(len(document.facts) for document in documents)
    for question in asked:
        assert question.document is not None and question.answer is not None
        document = documents[question.document]
        assert contains_value(document.text, question.answer)
        assert any(fact.entity.lower() in question.text.lower() and fact.value == question.answer
                   for fact in document.facts)


def test_no_two_documents_share_a_name(sampled: Sampled) -> None:
    names = Counter(name for document in sampled[0] for name in {fact.entity for fact in document.facts})
    assert set(names.values()) == {1}


@pytest.mark.parametrize("kind", [Slice.SAME_KIND, Slice.ALIKE])
def test_near_misses_are_asked_in_the_same_words(sampled: Sampled, kind: Slice) -> None:
    documents, questions = sampled
    places = sorted({one.document for one in questions if one.slice is kind and one.document is not None})
    assert len(places) == 4
    for first, second in zip(places[::2], places[1::2], strict=True):
        names = [documents[place].facts[0].entity for place in (first, second)]
        assert names[1].startswith(names[0]) == (kind is Slice.ALIKE)
        assert documents[first].facts[0].domain is documents[second].facts[0].domain
        asked = [{one.text.replace(name, "X"): one.answer for one in questions if one.document == place}
                 for place, name in zip((first, second), names, strict=True)]
        assert asked[0].keys() == asked[1].keys()
        assert not any(asked[0][text] == asked[1][text] for text in asked[0])


def test_nobody_answers_the_other_questions(sampled: Sampled) -> None:
    documents, questions = sampled
    kinds = Counter(one.slice for one in questions)
    assert all(kinds[kind] > 0 for kind in Slice)
    names = {fact.entity for document in documents for fact in document.facts}
    known = {one.text for one in questions if one.slice in ON_DOCUMENTS}
    for question in questions:
        if question.slice in (Slice.ABSENT, Slice.UNKNOWN):
            assert question.answer is None and question.document is None
            assert question.text not in known
        if question.slice is Slice.ABSENT:
            assert any(name.lower() in question.text.lower() for name in names)
        if question.slice is Slice.SMALL_TALK:
            assert question.answer and question.document is None
    alike = [documents[one.document].facts[0].entity for one in questions
             if one.slice is Slice.ALIKE and one.document is not None]
    unknown = [one.text for one in questions if one.slice is Slice.UNKNOWN]
    assert any(name in text for name in alike for text in unknown), "a third name that differs by a word"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_right_answers_and_their_ratio_to_the_oracle() -> None:
    some = [outcome(0, 0, 0.9, chosen=0, routed=True, oracle=True, nearest=True, first=True),
            outcome(0, 0, 0.2, oracle=True, nearest=True, first=True),
            outcome(1, 1, 0.9, chosen=1, oracle=True),
            outcome(1, 0, 0.9, chosen=0),
            outcome(2, 2, 0.9, chosen=2, routed=True, oracle=True)]
    row = answered_row("some", some)
    assert row[ROUTED] == pytest.approx(0.4) and row[ORACLE] == pytest.approx(0.8) and row[BASE] == 0
    assert row["ratio_routed"] == row["ratio_nearest"] == row["ratio_first"] == pytest.approx(0.5)
    low, high = row["interval_routed"]
    assert 0 <= low < 0.5 < high <= 1


def test_the_interval_is_over_documents() -> None:
    right = [outcome(0, 0, 0.9, routed=True, oracle=True)] * 20
    wrong = [outcome(1, 1, 0.1, oracle=True)] * 20
    together = interval([*right, *wrong], ROUTED)
    assert together == (0, 1), "two documents only, however many questions"
    apart = interval([replace(one, question=replace(one.question, document=place))
                      for place, one in enumerate([*right, *wrong])], ROUTED)
    assert apart is not None and 0.3 < apart[0] < 0.5 < apart[1] < 0.7
    assert interval([], ROUTED) is None and interval(wrong[:1], BASE) == (0, 0)
    assert interval([outcome(0, 0, 0.9, routed=True)], ROUTED) is None, "the oracle has nothing right"


def test_who_answered() -> None:
    row = choice_row("some", [outcome(0, 0, 0.9, chosen=0), outcome(0, 0, 0.9, chosen=0, own_part=False),
                              outcome(0, 1, 0.9, chosen=1), outcome(0, 0, 0.1)])
    assert [row[name] for name in ("own_part", "other_part", "other_document", "base")] == [0.25] * 4
    assert row["right_first"] == 0.75
    assert row["right_left_to_base"] == pytest.approx(1 / 3) and row["wrong_of_used"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("one", "said"), [
    (outcome(0, 0, 0.9, chosen=0), "the same adapter"),
    (outcome(0, 0, 0.9, chosen=0, own_part=False), "another part of the document"),
    (outcome(0, 1, 0.9, chosen=1), "another document"),
    (outcome(0, 0, 0.1), "left to the base (below_threshold), first candidate right"),
    (outcome(0, 1, 0.1), "left to the base (below_threshold), first candidate wrong"),
    (outcome(None, 1, 0.9, kind=Slice.SMALL_TALK, chosen=1), "an adapter answered, none should"),
    (outcome(None, 1, 0.1, kind=Slice.SMALL_TALK), "the base, as it should"),
])
def test_causes(one: Outcome, said: str) -> None:
    assert cause(one) == said


def test_other_settings() -> None:
    some = [outcome(0, 0, 0.6, oracle=True, first=True), outcome(1, 0, 0.4, oracle=True),
            outcome(2, 2, 0.95, usable=False, oracle=True, first=True),
            outcome(None, 0, 0.3, kind=Slice.SMALL_TALK, oracle=True, base=True),
            outcome(None, 0, 0.7, kind=Slice.UNKNOWN), outcome(None, 0, 0.2, kind=Slice.CHAT)]
    low, middle, high = (sweep_row(some, setting, 0.5) for setting in (0.25, 0.5, 0.65))
    assert [row["right"] for row in (low, middle, high)] == [0.25, 0.5, 0.25]
    assert [row["ratio"] for row in (low, middle, high)] == [0.25, 0.5, 0.25]
    assert [row["right_left_to_base"] for row in (low, middle, high)] == [0.5, 0.5, 1]
    assert [row["wrong_document"] for row in (low, middle, high)] == [pytest.approx(1 / 3), 0, 0]
    assert [row["small_talk_to_adapter"] for row in (low, middle, high)] == [1, 0, 0]
    assert [row["unanswerable_to_adapter"] for row in (low, middle, high)] == [0.5, 0.5, 0.5]
    assert [row["unanswerable_stated"] for row in (low, middle, high)] == [1, 1, 1]
    # One right, one wrong statement on documents, one on an unknown name; the degraded one says nothing.
    assert [row["net"] for row in (low, middle, high)] == [-0.25, 0, -0.25]


def test_an_adapters_own_threshold_moves_along() -> None:
    strict = outcome(0, 0, 0.6, threshold=0.8)
    assert not strict.taken(0.5, 0.5) and strict.taken(0.25, 0.5)
    # 0.8 instead of 0.5 is the odds times four, so 0.25 becomes 4/7.
    assert not replace(strict, confidence=0.57).taken(0.25, 0.5) and replace(strict, confidence=0.572).taken(0.25, 0.5)
    assert outcome(0, 0, 0.8, threshold=0.8).taken(0.8, 0.8)


def test_another_calibration_judges_the_same_candidates() -> None:
    weights = (4.0, *(0.0,) * (len(FEATURES) - 1))
    calibration = Calibration("words", "1", "", weights, -2.0)
    some = [replace(outcome(0, 0, 0.9, threshold=0.8), features=(similarity, *(0.0,) * (len(FEATURES) - 1)))
            for similarity in (0.25, 0.75)]
    found = with_calibration(some, calibration, 0.5)
    assert [one.taken(0.5, 0.5) for one in found] == [False, True]
    assert [one.threshold for one in found] == [0.5, 0.5]


def some_result() -> dict[str, object]:
    outcomes = [outcome(0, 0, 0.9, chosen=0, routed=True, oracle=True, first=True),
                outcome(1, 1, 0.3, kind=Slice.ALIKE, oracle=True),
                outcome(None, 0, 0.1, kind=Slice.SMALL_TALK, routed=True, oracle=True, base=True),
                outcome(None, 0, 0.7, kind=Slice.UNKNOWN, chosen=0), outcome(None, 0, 0.1, kind=Slice.CHAT)]
    return {"machine": "one core", "documents": 2, "parts": 2, "calibration": 1, "confidence": 0.5, "seed": 1,
            "seconds": {"post": 1.0, "calibrate": 0.0, "ask": 2.0}, "figures": figures(outcomes, 0.5),
            "outcomes": [{"first": 1}, {"first": 2}]}


def test_files_and_tables(tmp_path: Path) -> None:
    result = some_result()
    table = write(result, tmp_path)
    assert (tmp_path / "routing_end_to_end.md").read_text() == table == report(result)
    assert json.loads((tmp_path / "routing_end_to_end.json").read_text()) == json.loads(json.dumps(result))
    assert "Routed / oracle: 0.667 (goal: at least 0.97; not reached)." in table
    assert "| left to the base (below_threshold), first candidate right | 1 | 0 |" in table
    assert f"| {Slice.UNKNOWN} | 1 | 1.000 | 1.000 |" in table
    tables = [part.splitlines() for part in table.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1, rows


@pytest.mark.parametrize("arguments", [["--documents", "7"], ["--confidence", "1"], ["--confidence", "0"]])
def test_bad_options_start_nothing(arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    def start(*_: object) -> None:
        raise AssertionError("a server was started")
    monkeypatch.setattr(routing_end_to_end, "Server", start)
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and arguments[0] in capsys.readouterr().err
