"""Questions that a base writes itself: what is kept of them, and bases that can not."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.base_questions import ask_base, parse_questions
from hypernet.documents import DocumentText
from hypernet.encoder import load_base
from hypernet.nano import base_dir
from hypernet.probes import Probe

POOL = DocumentText("Harbour Pool: visitor notice",
                    "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde.")


def test_questions_are_parsed_from_what_a_base_writes() -> None:
    text = ("Questions:\n1. What does the lamp cost?\n- Who owns the lamp?\n2) \"What does the lamp cost?\""
            "\nWhy?\nQ3: Where is the lamp made?\nThe lamp costs 4 euros.\n**When is it shut?**")
    assert parse_questions(text, 9) == ["What does the lamp cost?", "Who owns the lamp?", "Where is the lamp made?",
                                       "When is it shut?"]
    assert len(parse_questions(text, 2)) == 2


class WritingBase:
    """Stands in for a large instruct base, which cannot run here: it writes the given lines."""

    device = "cpu"
    generation_config = GenerationConfig()

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
