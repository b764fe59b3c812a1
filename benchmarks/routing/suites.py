"""Document sets with questions: manuals, generated documents, hand-written documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

from benchmarks.routing.documents import OTHERS, OURS, Page
from benchmarks.routing.questions import Question, Slice, by_hand, by_rules, fold_of
from hypernet.training.corpus.documents import SampledDocument, Split, ask, ask_unanswerable, sample_document
from hypernet.training.corpus.small_talk import SMALL_TALK
from router.shipped import general_chat

HAND_WRITTEN = Path("tests/data/handwritten.jsonl")
DOCUMENTS, FACTS, SEED = 60, 4, 4


@dataclass(frozen=True)
class Suite:
    """Documents (those of other tenants too) and what tenant-a is asked. `notes` say what a reader must know."""

    name: str
    pages: tuple[Page, ...]
    questions: tuple[Question, ...]
    notes: tuple[str, ...] = ()

    def of(self, tenant: str) -> list[Page]:
        """The tenant's documents."""
        return [page for page in self.pages if page.tenant == tenant and page.indexed]


def manuals(pages: Sequence[Page]) -> Suite:
    """Pages of manuals, asked about by hand and by rules; general chat besides."""
    hand, missing = by_hand(pages)
    notes = [f"{len(missing)} hand-written questions are left out, as their pages are not there"] if missing else []
    answered = frozenset[str]().union(*(question.answers for question in hand))
    tested = frozenset(page.file for page in pages if page.path in answered)
    return Suite("manuals", tuple(pages), (*hand, *by_rules(pages, tested), *_chat(Random(SEED), 100)), tuple(notes))


def generated() -> Suite:
    """Documents of the nano model's generator that it was not trained on: each tenant has `DOCUMENTS` of `FACTS` facts,
    and asks for a fact of each and for one that it does not state."""
    rng = Random(SEED)
    pages: list[Page] = []
    questions: list[Question] = []
    for tenant in (OURS, OTHERS):
        for number in range(DOCUMENTS):
            document = sample_document(rng, FACTS, Split.HELD_OUT)
            page = Page(f"generated/{tenant}/{number}", "generated", tenant, "", document.text)
            pages.append(page)
            questions += _on_generated(page, document, rng)
    return Suite("generated", tuple(pages), (*questions, *_chat(rng, 40)))


def _on_generated(page: Page, document: SampledDocument, rng: Random) -> list[Question]:
    fold = fold_of(page.path)
    asked = [ask(fact, document, rng, Split.HELD_OUT).text for fact in rng.sample(document.facts, 2)]
    if page.tenant != OURS:
        return [Question(asked[0], Slice.OTHER_TENANT, frozenset(), "generator", fold)]
    found = [Question(text, Slice.IN_DOCUMENT, frozenset([page.path]), "generator", fold) for text in asked]
    if unanswered := ask_unanswerable(document, rng, Split.HELD_OUT):
        found.append(Question(unanswered.text, Slice.UNANSWERED, frozenset(), "generator", fold))
    return found


def hand_written(file: Path = HAND_WRITTEN) -> Suite:
    """Short documents and their questions, all written by hand; every fourth document is another tenant's."""
    pages, questions = [], []
    for number, row in enumerate(map(json.loads, file.read_text(encoding="utf-8").splitlines())):
        tenant = OTHERS if number % 4 == 3 else OURS
        page = Page(f"handwritten/{row['id']}", "handwritten", tenant, row["title"], row["text"])
        pages.append(page)
        for question in row["questions"]:
            kind, answers = Slice.IN_DOCUMENT, frozenset([page.path])
            if tenant != OURS:
                kind, answers = Slice.OTHER_TENANT, frozenset()
            elif not question["answers"]:
                kind, answers = Slice.UNANSWERED, frozenset()
            questions.append(Question(question["question"], kind, answers, "hand", fold_of(page.path)))
    return Suite("hand-written", tuple(pages), (*questions, *_chat(Random(SEED), 40)))


def _chat(rng: Random, count: int) -> list[Question]:
    """General chat that no document answers: to fit on what the router ships for that, to test on other chat."""
    small_talk = sorted(set(chain.from_iterable(wordings for wordings, _ in SMALL_TALK)))
    known = set(general_chat())
    return [Question(text, Slice.CHAT, frozenset(), "list", fold)
            for fold, texts in (("calibration", list(general_chat())),
                                ("test", [text for text in small_talk if text not in known]))
            for text in rng.sample(texts, min(count, len(texts)))]
