"""Scores, and the sets that they are taken on. Never prints a text of the hand-written set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hypernet.evaluation.cases import FACT_COUNTS, QUESTIONS_A_DOCUMENT, hand_written_cases, held_out_cases
from hypernet.evaluation.scoring import abstains, contains_value, exact_match, normalise
from hypernet.training.corpus.documents import Split

HAND_WRITTEN = Path(__file__).parents[1] / "data" / "handwritten.jsonl"


@pytest.mark.parametrize(("answer", "normal"), [
    ("The Oak Room.", "oak room"), ("  a  copper   kettle ", "copper kettle"), ("$4.20", "$4.20"), ("9:30", "9:30"),
    ("1,250 euros!", "1,250 euros"), ("15%", "15%"), ("QX-417,", "qx-417"), ("info@kelvo.org", "info@kelvo.org"),
    ('"Zelnor"', "zelnor"), ("(room 214)", "room 214"), ("£8.", "£8"), ("", ""), ("the", ""),
])
def test_normalise(answer: str, normal: str) -> None:
    assert normalise(answer) == normal
    assert normalise(normal) == normal


@pytest.mark.parametrize(("answer", "accepted", "right"), [
    ("the Oak Room", ["Oak Room"], True), ("Oak Room", ["the oak room."], True), ("Oak", ["Oak Room"], False),
    ("In the Oak Room", ["Oak Room"], False), ("9:30", ["9:30 am", "9:30"], True), ("1250", ["1,250"], False),
    ("$4.20.", ["$4.20"], True), ("$4.2", ["$4.20"], False), ("4.20", ["$4.20"], False), ("", ["x"], False),
    ("anything", [], False),
])
def test_exact_match(answer: str, accepted: list[str], right: bool) -> None:
    assert exact_match(answer, accepted) is right


@pytest.mark.parametrize(("answer", "value", "inside"), [
    ("It is in the Oak Room.", "the oak room", True), ("Room 2145", "Room 214", False), ("14 March", "4 March", False),
    ("It costs $4.20!", "$4.20", True), ("", "x", False),
])
def test_contains_value(answer: str, value: str, inside: bool) -> None:
    assert contains_value(answer, value) is inside


@pytest.mark.parametrize(("answer", "abstained"), [
    ("The document does not say.", True), ("I do not know.", True), ("I DON'T KNOW", True), ("Oak Room", False),
])
def test_abstains(answer: str, abstained: bool) -> None:
    assert abstains(answer) is abstained


def test_hand_written_set() -> None:
    cases = hand_written_cases(HAND_WRITTEN)
    assert len(cases) >= 40
    assert sum(len(case.questions) for case in cases) >= 200
    unfit = []
    for i, case in enumerate(cases):
        answerable = [question for question in case.questions if question.answerable]
        fine = (case.title.strip() and case.text.strip() and case.facts == len(answerable) == len(case.values)
                and all(question.text.strip() for question in case.questions)
                and all(question.answers[0].lower() in case.text.lower() for question in answerable))
        if not fine:
            unfit.append(i)
    assert not unfit, f"lines {unfit}"
    assert any(not question.answerable for case in cases for question in case.questions)
    identifiers = [json.loads(line)["id"] for line in HAND_WRITTEN.read_text().splitlines()]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("facts", FACT_COUNTS)
@pytest.mark.parametrize("split", [Split.HELD_OUT, Split.UNSEEN_PHRASING])
def test_held_out_cases(facts: int, split: Split) -> None:
    cases = held_out_cases(15, facts, split)
    assert len(cases) == 15 and cases == held_out_cases(15, facts, split)
    for case in cases:
        assert case.facts == facts == len(case.values)
        answerable = [question for question in case.questions if question.answerable]
        assert len(answerable) == min(facts, QUESTIONS_A_DOCUMENT)
        assert all(question.answers[0].lower() in case.text.lower() for question in answerable)
        assert len(case.questions) <= len(answerable) + 1
    assert cases != held_out_cases(15, facts, split, seed=1)
