"""Thirty pages of real documentation as one document: the generator plans its parts, and the router finds the part that
a question is about. No server; tests/e2e/test_long_document.py does the same through HTTP."""

from __future__ import annotations

from collections import Counter

import pytest

from hypernet import nano
from hypernet.documents import DocumentText
from hypernet.generate import HypernetGenerator
from router.centroids import document_centroids
from router.decide import Reason, RouterSettings, decide
from router.embed import MiniLmEncoder
from router.index import AdapterEntry, TenantIndex
from router.text import words
from tests import reference_pages
from tests.reference_pages import QUESTIONS, TITLE, place

OTHER_TITLE = "Harbour Pool: visitor notice"
OTHER = "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."
Spans = list[tuple[int, int]]


@pytest.fixture(scope="module")
def text() -> str:
    return reference_pages.text()


@pytest.fixture(scope="module")
def plan(text: str) -> list[tuple[Spans, list[str]]]:
    """Of each part, the spans that it covers and its chunks as the hypernetwork reads them."""
    generator = HypernetGenerator.load(nano.hypernet_dir(), nano.base_dir(), threads=1)
    parts = generator.plan(DocumentText(TITLE, text))
    return [([(chunk.start, chunk.end) for chunk in part], [chunk.text for chunk in part]) for part in parts]


@pytest.fixture(scope="module")
def index(encoder: MiniLmEncoder, plan: list[tuple[Spans, list[str]]], text: str) -> TenantIndex:
    """The document's parts, and another document beside it."""
    made = TenantIndex("ten_a", encoder.dimension)
    entries = [
        AdapterEntry.of_document(
            f"part{number}", "ten_a", "doc_pages", TITLE, text, document_centroids(encoder, TITLE, chunks, 4),
            spans=spans, part=number, parts=len(plan),
        )
        for number, (spans, chunks) in enumerate(plan)
    ]
    centroids = document_centroids(encoder, OTHER_TITLE, [OTHER], 4)
    made.update([*entries, AdapterEntry.of_document("pool", "ten_a", "doc_pool", OTHER_TITLE, OTHER, centroids)])
    return made


def test_the_pages_are_long_and_the_questions_are_about_many_places(
    text: str, plan: list[tuple[Spans, list[str]]]
) -> None:
    assert len(reference_pages.PAGES) == 30 and len(text) > 90_000
    assert len(plan) > 10 and len(QUESTIONS) >= 20
    places = [place(question, text) for question in QUESTIONS]
    asked = Counter(next(i for i, (spans, _) in enumerate(plan) if covers(spans, at)) for at in places)
    assert len(asked) >= len(QUESTIONS) * 3 // 4


def test_the_parts_cover_the_whole_text_in_order(text: str, plan: list[tuple[Spans, list[str]]]) -> None:
    spans = [span for part, _ in plan for span in part]
    assert spans == sorted(spans)
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    gaps = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    assert not "".join(gaps).strip(), gaps
    assert all(end <= start for end, start in zip(ends, starts, strict=True)), "spans overlap"


def test_questions_find_the_part_that_covers_their_place(
    index: TenantIndex, encoder: MiniLmEncoder, plan: list[tuple[Spans, list[str]]], text: str
) -> None:
    right, right_when_named, wrong = 0, 0, []
    for question in QUESTIONS:
        vector, query_words = encoder.embed([question.text])[0], words(question.text)
        decision = decide(index.search(vector, query_words), RouterSettings())
        assert (decision.reason, decision.document_id) == (Reason.MATCHED, "doc_pages"), question
        # The other document is the only rival, not the other parts.
        assert [c.document_id for c in decision.candidates] == ["doc_pages", "doc_pool"]
        at = place(question, text)
        found = decision.part is not None and covers(plan[decision.part][0], at)
        right += found
        wrong += [] if found else [question.text]
        named = index.search_parts("doc_pages", vector, query_words)
        right_when_named += covers(plan[named[0].entry.part][0], at)
    assert right >= 0.8 * len(QUESTIONS), wrong
    assert right_when_named >= 0.8 * len(QUESTIONS)


def test_questions_about_the_other_document_do_not_go_to_a_part(index: TenantIndex, encoder: MiniLmEncoder) -> None:
    for question in ("When does the Harbour Pool open?", "Who is the lifeguard on duty?"):
        decision = decide(index.search(encoder.embed([question])[0], words(question)), RouterSettings())
        assert decision.document_id == "doc_pool" and decision.parts == 1


def covers(spans: Spans, place: int) -> bool:
    return any(start <= place < end for start, end in spans)
