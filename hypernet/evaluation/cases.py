"""The sets that an adapter is evaluated on: held-out documents of the generator, and the hand-written ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypernet.training.corpus.documents import Split, ask, ask_unanswerable, sample_document

FACT_COUNTS = (1, 2, 4, 8, 12)
QUESTIONS_A_DOCUMENT = 4


@dataclass(frozen=True)
class CaseQuestion:
    """A question and its accepted answers, none where the document does not answer it."""

    text: str
    answers: tuple[str, ...]

    @property
    def answerable(self) -> bool:
        """Whether the document states the answer."""
        return bool(self.answers)


@dataclass(frozen=True)
class Case:
    """A document, what is asked about it, and every value that it states (for the chance rate)."""

    title: str
    text: str
    facts: int
    questions: tuple[CaseQuestion, ...]
    values: tuple[str, ...]


def held_out_cases(count: int, facts: int, split: Split, seed: int = 90_001) -> list[Case]:
    """`count` documents of exactly `facts` facts, with names and values never trained on."""
    rng = Random(f"{seed}-{facts}-{split}")
    cases: list[Case] = []
    while len(cases) < count:
        document = sample_document(rng, facts, split)
        if len(document.facts) != facts:
            continue
        asked = rng.sample(document.facts, min(facts, QUESTIONS_A_DOCUMENT))
        questions = [ask(fact, document, rng, split) for fact in asked]
        found = [CaseQuestion(question.text, (question.answer,)) for question in questions]
        absent = ask_unanswerable(document, rng, split)
        if absent is not None:
            found.append(CaseQuestion(absent.text, ()))
        cases.append(Case("", document.text, facts, tuple(found), tuple(fact.value for fact in document.facts)))
    return cases


def hand_written_cases(path: Path) -> list[Case]:
    """The hand-written set, one JSON object a line (see its README)."""
    cases = []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        questions = tuple(CaseQuestion(q["question"], tuple(q["answers"])) for q in item["questions"])
        values = tuple(q.answers[0] for q in questions if q.answerable)
        cases.append(Case(item["title"], item["text"], item["facts"], questions, values))
    return cases
