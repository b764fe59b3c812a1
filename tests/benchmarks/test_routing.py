"""The routing benchmark: pages out of HTML, questions by rules and by hand, the measures, and the systems on a small
set with an encoder that counts words."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.routing import systems
from benchmarks.routing.curve import line_plot
from benchmarks.routing.documents import OTHERS, OURS, Page, Source, choose, read_source
from benchmarks.routing.embeddings import CachedEncoder
from benchmarks.routing.html_text import read_html
from benchmarks.routing.metrics import Outcome, area_under_risk, auroc, ece, selective_risk
from benchmarks.routing.questions import (
    Question,
    Slice,
    by_hand,
    by_rules,
    from_heading,
    from_sentence,
    read_questions,
)
from benchmarks.routing.suites import Suite, generated, hand_written
from benchmarks.routing.systems import Bm25, Imprint, Prepared, System, nearest_centroid, nearest_chunk
from router.embed import Vectors


class WordCounts:
    """Vectors of hashed words: texts that share words are near each other."""

    id, dimension = "words", 64

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        rows = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()) or [""]:
                row[hashlib.sha256(word.encode()).digest()[0] % self.dimension] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Letters:
    """Counts four characters as a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(range(-(-len(text) // 4)))


def outcome(right: bool, confidence: float, answered: bool = True, routed: bool = True) -> Outcome:
    answers = frozenset(["a"] if answered else [])
    return Outcome(Slice.IN_DOCUMENT, answers, ("a" if right else "b", "c", "a"), confidence, routed)


def page(path: str, text: str, tenant: str = OURS, indexed: bool = True, product: str = "Pump 2") -> Page:
    return Page(path, product, tenant, f"{path.partition('/')[2]} - {product}", text, indexed)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_html_keeps_what_a_reader_reads() -> None:
    title, text = read_html(
        "<html><head><title>5.1. Pumps</title><style>p {}</style></head><body><div class='navheader'>Prev <p>Next</div>"
        "<h1>5.1.&nbsp;Pumps</h1><p>A pump\n moves <b>water</b>.<p>It hums.<ul><li>quiet<li>loud</ul>"
        "<pre>on\n  off</pre><script>let x</script><div id='footer'>2026</div></body></html>")
    assert title == "5.1. Pumps"
    assert text.split("\n") == ["# 5.1. Pumps", "", "A pump moves water.", "", "It hums.", "", "- quiet", "- loud", "",
                                "on", "  off", ""]


def test_pages_are_chosen_alike_in_all_versions(tmp_path: Path) -> None:
    chosen = {}
    for version in ("2", "3"):
        folder = tmp_path / version / "doc"
        folder.mkdir(parents=True)
        for number in range(60):
            (folder / f"{number}.html").write_text(f"<title>Page {number} - LLVM {version} documentation</title>"
                                                   f"<p>{'word ' * 300}{version}")
        (folder / "index.html").write_text(f"<title>All</title>{'word ' * 300}")
        (folder / "short.html").write_text("<title>Short</title><p>too short")
        source = Source("pump-doc", f"Pump {version}", "doc", OURS, 20, 5)
        chosen[version] = choose(read_source(source, tmp_path / version), source)
    two, three = chosen["2"], chosen["3"]
    assert [one.file for one in two] == [one.file for one in three]
    assert [one.indexed for one in two] == [one.indexed for one in three] == [True] * 20 + [False] * 5
    assert len({one.path for one in two + three}) == 50
    assert {"index.html", "short.html"}.isdisjoint(one.file for one in two)
    assert all(re.fullmatch(r"Page \d+ - Pump 2", one.title) for one in two)


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sentence", "question"), [
    ("To restore a deleted branch, run the command again.", "How do I restore a deleted branch?"),
    ("If the pump runs without water, the seal is damaged soon.", "What happens if the pump runs without water?"),
    ("The pressure gauge is used to watch the outlet.", "What is the pressure gauge used for?"),
    ("The outlet valve controls the flow of water.", "What is it that the outlet valve controls?"),
    ("To use it, press the button.", None),
    ("If this is not set, the default is used.", None),
    ("Water is wet.", None),
])
def test_sentences_become_the_questions_that_they_answer(sentence: str, question: str | None) -> None:
    assert from_sentence(sentence) == question


@pytest.mark.parametrize(("heading", "question"), [
    ("How to bleed the pump", "How do I bleed the pump?"),
    ("14.4.1. Changing the Seal", "What should I know about changing the Seal?"),
    ("Data Checksums", "Can you explain Data Checksums?"),
    ("DESCRIPTION", None),
    ("See Also", None),
    ("--force", None),
])
def test_headings_become_questions(heading: str, question: str | None) -> None:
    assert from_heading(heading) == question


def test_questions_by_rules_know_who_answers() -> None:
    text = "# Seals\n\n## Changing the {0} Seal\n\nTo change the {0} seal, close both valves of the pump.\n"
    pages = [page("pump-2/seal", text.format("inner")), page("pump-3/seal", text.format("inner"), product="Pump 3"),
             page("pump-2/valve", text.format("outer")), page("pump-2/gone", text.format("worn"), indexed=False),
             page("pump-2/copy-1", text.format("same")), page("pump-2/copy-2", text.format("same")),
             page("fan-1/seal", text.format("fan"), OTHERS, product="Fan 1")]
    found: dict[tuple[Slice, frozenset[str]], list[Question]] = {}
    for question in by_rules(pages):
        found.setdefault((question.slice, question.answers), []).append(question)
    assert {kind for kind, _ in found} == {Slice.NEAR_MISS, Slice.IN_DOCUMENT, Slice.UNANSWERED, Slice.OTHER_TENANT}
    two, three = (found[Slice.NEAR_MISS, frozenset([f"pump-{n}/seal"])] for n in (2, 3))
    assert [one.text for one in two] == ["In Pump 2, what should I know about changing the inner Seal?",
                                         "In Pump 2, how do I change the inner seal?"]
    assert [one.text.replace("Pump 3", "Pump 2") for one in three] == [one.text for one in two]
    assert {one.fold for one in two} == {one.fold for one in three} and len({one.fold for one in two}) == 1
    assert len(found[Slice.IN_DOCUMENT, frozenset(["pump-2/valve"])]) == 2
    assert all("worn" in one.text for one in found[Slice.UNANSWERED, frozenset()])
    assert all(one.text.startswith("In Fan 1, ") for one in found[Slice.OTHER_TENANT, frozenset()])
    again = {one.fold for one in by_rules(pages, frozenset(one.file for one in pages))}
    assert again == {"test"} != {one.fold for questions in found.values() for one in questions}
    assert not any("same" in one.text for questions in found.values() for one in questions), "two pages answer it"


def test_hand_written_questions_are_complete() -> None:
    rows = read_questions()
    assert len(rows) >= 200
    assert set(Counter(str(row["slice"]) for row in rows)) == set(Slice)
    assert len({row["question"] for row in rows}) == len(rows)
    pages = [Page(str(path), "", OURS, "", "") for row in rows for path in [row["page"], *(row.get("also") or [])]
             if row["slice"] in ("in_document", "near_miss")]
    found, missing = by_hand(pages)
    assert not missing and len(found) == len(rows)
    assert all(bool(one.answers) == (one.slice in ("in_document", "near_miss")) for one in found)
    assert {one.fold for one in found} == {"test"}, "nothing is fitted on them"
    assert any(len(one.answers) == 2 for one in found)


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    good = {"question": "Why?", "slice": "chat", "product": None, "page": None, "note": "short"}
    for wrong, message in (({"extra": 1}, "questions.jsonl:2: extra"), ({"note": " "}, "questions.jsonl:2: question"),
                           ({"slice": "near_miss"}, "questions.jsonl:2: 'near_miss' needs"),
                           ({"slice": "other"}, "other")):
        file.write_text(f"{json.dumps(good)}\n{json.dumps(good | wrong)}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_questions(file)


def test_questions_on_pages_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    row = {"question": "Why?", "slice": "in_document", "product": "Pump 2", "page": "pump-2/seal", "note": "short"}
    file.write_text(json.dumps(row) + "\n")
    assert by_hand([page("pump-2/seal", "text", indexed=False)], file) == ([], ["pump-2/seal"])


@pytest.mark.parametrize("suite", [generated(), hand_written()], ids=lambda suite: suite.name)
def test_nothing_is_fitted_on_what_is_tested(suite: Suite) -> None:
    by_fold = {fold: [one for one in suite.questions if one.fold == fold] for fold in ("calibration", "test")}
    documents = {fold: frozenset[str]().union(*(one.answers for one in some)) for fold, some in by_fold.items()}
    assert documents["calibration"] and documents["test"] and documents["calibration"].isdisjoint(documents["test"])
    texts = {fold: {one.text for one in some if one.slice == Slice.CHAT} for fold, some in by_fold.items()}
    assert texts["calibration"] and texts["test"] and texts["calibration"].isdisjoint(texts["test"])
    for some in by_fold.values():
        assert {Slice.IN_DOCUMENT, Slice.UNANSWERED, Slice.OTHER_TENANT, Slice.CHAT} <= {one.slice for one in some}
    owned = {one.path for one in suite.of(OURS)}
    assert documents["calibration"] | documents["test"] <= owned and len(suite.of(OTHERS)) >= 10


# --- measures ---------------------------------------------------------------------------------------------------------


def test_auroc_counts_pairs_in_order() -> None:
    found = [outcome(True, 0.9), outcome(False, 0.4), outcome(False, 0.5, answered=False),
             outcome(False, 0.1, answered=False)]
    assert auroc(found) == 0.75  # of four pairs, 0.4 against 0.5 is out of order
    assert auroc(found[:2]) is None


def test_ece_is_the_gap_of_confidence_and_right() -> None:
    # In the bin at .8 three of four are right, in the bin at .25 none of two is, and 1.0 falls into the last bin.
    found = [outcome(i < 3, 0.8) for i in range(4)] + [outcome(False, 0.25)] * 2 + [outcome(True, 1.0)] * 2
    assert ece(found) == pytest.approx(4 / 8 * 0.05 + 2 / 8 * 0.25)


def test_selective_risk_follows_the_confidence() -> None:
    found = [outcome(False, 0.5), outcome(True, 0.9), outcome(True, 0.7), outcome(True, 0.5)]
    coverage, risk = selective_risk(found)
    assert coverage.tolist() == [0.25, 0.5, 1.0], "equal confidences are routed together"
    assert risk.tolist() == [0, 0, 0.25]
    assert area_under_risk(found) == 0.5 * 0.25


def test_what_is_right_needs_an_answer() -> None:
    assert outcome(True, 0.5).within(1) and not outcome(False, 0.5).within(1) and outcome(False, 0.5).within(3)
    assert not outcome(True, 0.5, answered=False).right
    assert not Outcome(Slice.CHAT, frozenset(), (), 0.0, False).right


def test_the_plot_holds_a_line_for_each_system() -> None:
    svg = line_plot("a < b", "x", "y", {"one & two": ([0.0, 1.0], [0.0, 0.5]), "many": ([0.5] * 1000, [2.0] * 1000)})
    root = ElementTree.fromstring(svg)
    lines = [one.attrib["points"].split() for one in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == 2 and len(lines[0]) == 2 and 300 <= len(lines[1]) <= 400
    left, top = (float(part) for part in lines[1][0].split(","))
    assert 0 < left and top > 0, "cut off at the top"


# --- systems ----------------------------------------------------------------------------------------------------------

TOPICS = ("kettle boils water quickly", "lamp shines brightly tonight", "clock strikes twelve loudly",
          "garden grows purple beans", "bicycle needs fresh oil", "violin sounds rather sad", "bakery sells rye bread",
          "harbour closes during storms")


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    pages = [page(f"pump-2/{number}", f"The {topic}. " * 40) for number, topic in enumerate(TOPICS)]
    return Prepared.of(OURS, pages, WordCounts(), Letters())


@pytest.fixture
def asked() -> list[Question]:
    known = [Question(topic, Slice.IN_DOCUMENT, frozenset([f"pump-2/{i}"]), "hand") for i, topic in enumerate(TOPICS)]
    return known + [Question(text, Slice.CHAT, frozenset(), "list") for text in
                    ("who won", "sing along", "many thanks", "feeling bored", "how tall", "see you")]


@pytest.mark.parametrize("make", [lambda p: Imprint(p, fitted=True), nearest_centroid, nearest_chunk, Bm25])
def test_systems_find_the_document_and_learn_to_abstain(
    make: Callable[[Prepared], System], prepared: Prepared, asked: list[Question]
) -> None:
    system = make(prepared)
    system.fit(asked)
    found = system.find([question.text for question in asked])
    for one, question in zip(found, asked, strict=True):
        assert len(set(one.documents)) == len(one.documents) <= systems.LISTED
        if question.answers:
            assert one.documents[0] in question.answers
    answered = [one.confidence for one, question in zip(found, asked, strict=True) if question.answers]
    others = [one.confidence for one, question in zip(found, asked, strict=True) if not question.answers]
    assert min(answered) > max(others)
    assert all(one.routed == (one.confidence >= 0.5) for one in found)


def test_long_pages_have_parts(prepared: Prepared) -> None:
    long = page("pump-2/long", "\n\n".join(f"Sentence {i} tells of part {i} of the pump." for i in range(300)))
    router = Imprint(Prepared.of(OURS, [long, *prepared.pages], WordCounts(), Letters()), fitted=False)
    assert len(router.index.parts("pump-2/long")) > 1 and len(router.index) > len(TOPICS)
    assert router.tenants(["kettle"]) == [{OURS}]


def test_vectors_stay_on_disk(tmp_path: Path) -> None:
    encoder = WordCounts()
    first = CachedEncoder(encoder, tmp_path / "v.sqlite").embed(["b b", "a", "b b"])
    assert sorted(encoder.asked) == ["a", "b b"]
    again = CachedEncoder(encoder, tmp_path / "v.sqlite")
    assert np.array_equal(again.embed(["b b", "a", "b b"]), first) and again.computed == 0
    other = CachedEncoder(WordCounts("2"), tmp_path / "v.sqlite")
    assert other.embed(["a"]).shape == (1, 64) and other.computed == 1
    assert other.embed([]).shape == (0, 64)
