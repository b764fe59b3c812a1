"""Questions made from a document's text: each template, wordings, spans, and text that holds nothing to ask."""

from __future__ import annotations

import time

import pytest

from hypernet import probes
from hypernet.documents import DocumentText
from hypernet.probes import find_facts, make_probes, text_answers

POOL = DocumentText("Harbour Pool: visitor notice",
                    "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde.")


def questions(text: str, title: str = "", wording: int = 0) -> list[str]:
    return [probe.question for probe in make_probes(DocumentText(title, text), None, 20, wording)]


@pytest.mark.parametrize(("text", "expected"), [
    ("# Kestrel 40\n\nWeight: 14 kg", "What is the weight of Kestrel 40?"),
    ("Kestrel 40:\n- Weight: 14 kg", "What is the weight of Kestrel 40?"),
    ("# Kestrel 40\n\n* **Service manager**: Ines Okafor", "Who is the service manager of Kestrel 40?"),
    ("# Kestrel 40\n\n1. Sold at: the old mill", "Kestrel 40: sold at what?"),
    ("# Kestrel 40\n\n| | |\n|---|---|\n| Weight | 14 kg |", "What is the weight of Kestrel 40?"),
    ("| Parameter | Default |\n|---|---|\n| work_mem | 4 MB |", "What is the default of work_mem?"),
    ("The warranty of Kestrel 40 is 3 years.", "What is the warranty of Kestrel 40?"),
    ("Kestrel 40's tank is steel.", "What is Kestrel 40's tank?"),
    ("Weight of Kestrel 40: 14 kg.", "What is the weight of Kestrel 40?"),
    ("Ines Okafor is the manager of the mill.", "Who is the manager of the mill?"),
    ("A day ticket costs 6 euros.", "How much does a day ticket cost?"),
    ("The Mill Bakery closes at 18:30.", "When does the Mill Bakery close?"),
    ("The ferry leaves at 22:40.", "When does the ferry leave?"),
    ("The concert starts at 8 pm.", "When does the concert start?"),
    ("The season ends at Easter.", "When does the season end?"),
    ("The tram arrives at dawn.", "When does the tram arrive?"),
    ("The shop opens from 7 to 9.", "When does the shop open?"),
    ("Bus 14 leaves from Castle Square at 9:15.", "When does Bus 14 leave?"),
    ("Bus 14 leaves from Castle Square.", "Where does Bus 14 leave from?"),
    ("The ferry departs daily from platform 3.", "Where does the ferry depart from?"),
    ("The walk starts at the Old Mill.", "Where does the walk start?"),
    ("The code is 1.", "What is the code?"),
    ("You will find the desk in room B17.", "You will find the desk in room what?"),
    ("Until the bridge was rebuilt, traders paid 12 coins there.",
     "Until the bridge was rebuilt, traders paid how many coins there?"),
])
def test_template(text: str, expected: str) -> None:
    assert questions(text) == [expected]


def test_title_is_the_entity() -> None:
    assert questions("Depth: 3 m", "Harbour Pool: visitor notice") == ["What is the depth of Harbour Pool?"]


def test_pronoun_becomes_the_last_name() -> None:
    assert questions("We like Otter Mill. Its owner is Ines Okafor.")[-1] == "Who is Otter Mill's owner?"


def test_wordings_ask_the_same_in_other_words() -> None:
    first, second = (make_probes(POOL, None, 8, wording) for wording in (0, 1))
    assert len(first) == len(second) == 2
    assert not {probe.question for probe in first} & {probe.question for probe in second}
    assert all(probe.answer is None for probe in first + second)
    with pytest.raises(ValueError, match="wording: is 2"):
        make_probes(POOL, None, 8, 2)


def test_a_place_is_the_answer_to_where_in_both_wordings() -> None:
    text = "Bus 14 leaves from Castle Square."
    assert questions(text, wording=1) == ["Bus 14 leaves from where?"]
    assert set(text_answers(DocumentText("", text), None).values()) == {"Castle Square"}


def test_the_text_answers_its_own_questions() -> None:
    answers = text_answers(POOL, None)
    for wording in (0, 1):
        asked = make_probes(POOL, None, 8, wording)
        assert [answers[probe.question] for probe in asked] == ["7:15 in the morning", "Marta Velde"]
    text = "\n".join(f"Item {i}: {i}0 grams" for i in range(40))
    span = (text.index("Item 10:"), text.index("Item 11:"))
    assert set(text_answers(DocumentText("Shelf", text), [span]).values()) == {"100 grams"}
    assert text_answers(DocumentText("", "?"), None) == {}


def test_values_are_the_documents_own() -> None:
    assert [fact.value for fact in find_facts(POOL)] == ["7:15 in the morning", "Marta Velde"]


def test_limit_is_spread_over_the_text_and_spans_bound_it() -> None:
    text = "\n".join(f"Item {i}: {i}0 grams" for i in range(40))
    document = DocumentText("Shelf", text)
    asked = make_probes(document, None, 4)
    assert [probe.question for probe in asked] == [f"What is the item {i} of Shelf?" for i in (5, 15, 25, 35)]
    start, end = text.index("Item 10:"), text.index("Item 12:")
    assert [probe.question for probe in make_probes(document, [(start, end)], 8)] == [
        "What is the item 10 of Shelf?", "What is the item 11 of Shelf?"]
    assert [find_facts(document)[i].start for i in (10, 12)] == [start, end]


def test_heading_outside_the_span_still_names_the_entity() -> None:
    text = "# Kestrel 40\n\nWeight: 14 kg\nColour: red"
    assert [p.question for p in make_probes(DocumentText("", text), [(text.index("Colour"), len(text))], 8)] == [
        "What is the colour of Kestrel 40?"]


def test_parts_have_the_facts_of_their_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order they are asked for, and with the document's lines read once."""
    text = "\n\n".join(f"# Lamp {i}\n\nMarta likes it. Its price is {i} euros.\n\n| | |\n|---|---|\n| Weight | {i} kg |"
                       for i in range(30))
    document = DocumentText("Lamps", text)
    starts = [text.index(f"# Lamp {i}\n") for i in range(30)] + [len(text)]
    reads: list[str] = []
    monkeypatch.setattr(probes, "_lines", lambda text, real=probes._lines: reads.append(text) or real(text))
    for i in reversed(range(30)):
        facts = find_facts(document, [(starts[i], starts[i + 1])])
        assert [fact.start - starts[i] for fact in facts] == [
            fact.start for fact in find_facts(DocumentText("Lamps", text[starts[i]:starts[i + 1]]))]
        assert {f"{i} euros", f"{i} kg"} <= {fact.value for fact in facts}
        assert f"What is the weight of Lamp {i}?" in [fact.questions[0] for fact in facts]
    assert reads.count(text) == 1


@pytest.mark.parametrize("text", ["x", "\x00\x01\x02", "....", "|", "|---|", "# ", "これは日本語の文章です。"])
def test_nothing_to_ask(text: str) -> None:
    assert make_probes(DocumentText("", text), None, 8) == []


@pytest.mark.parametrize("text", ["[" * 200_000, "a" * 200_000, "-" * 200_000, "Word " * 60_000, "1 " * 100_000])
def test_hostile_text_takes_no_time(text: str) -> None:
    begun = time.process_time()
    make_probes(DocumentText("", text), [(0, 4000)], 8)
    assert time.process_time() - begun < 2.0
