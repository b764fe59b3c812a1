"""Questions made from a document's text: each template, wordings, spans, and text that holds nothing to ask."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.documents import DocumentText
from hypernet.encoder import load_base
from hypernet.nano import base_dir
from hypernet.probes import Probe, ask_base, find_facts, make_probes, text_answers

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


@pytest.mark.parametrize("text", ["x", "\x00\x01\x02", "....", "|", "|---|", "# ", "これは日本語の文章です。"])
def test_nothing_to_ask(text: str) -> None:
    assert make_probes(DocumentText("", text), None, 8) == []


@pytest.mark.parametrize("text", ["[" * 200_000, "a" * 200_000, "-" * 200_000, "Word " * 60_000, "1 " * 100_000])
def test_hostile_text_takes_no_time(text: str) -> None:
    begun = time.process_time()
    make_probes(DocumentText("", text), [(0, 4000)], 8)
    assert time.process_time() - begun < 2.0


class WritingBase:
    """Stands in for a large instruct base, which cannot run here: it writes the given lines."""

    device = "cpu"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: str) -> None:
        self.tokenizer, self.written = tokenizer, written

    def generate(self, input_ids, **_settings):  # type: ignore[no-untyped-def]
        ids = self.tokenizer.encode(self.written, add_special_tokens=False)
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)


@pytest.mark.parametrize(("written", "expected"), [
    ("1. When does the Harbour Pool open?\n2. Who is the lifeguard?\n",
     ["When does the Harbour Pool open?", "Who is the lifeguard?"]),
    ("7:15", []),
    ("Here is a long story.\nIt goes on.\nAnd on.\nWho is the lifeguard?", []),
    ("Shall we talk of zebras?\nWhat are quokkas like?", []),
])
def test_ask_base_keeps_questions_only(tokenizer: PreTrainedTokenizerFast, written: str, expected: list[str]) -> None:
    base = WritingBase(tokenizer, written)
    assert ask_base(base, tokenizer, POOL, 2) == [Probe(question) for question in expected]  # type: ignore[arg-type]


def test_nano_cannot_write_questions() -> None:
    base, tokenizer = load_base(base_dir())
    assert ask_base(base, tokenizer, POOL, 4) == []


def test_random_base_cannot_either(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert ask_base(llama, tokenizer, POOL, 2) == []
