"""Questions on each passage and the base's own answers to them, kept in files so that no run asks twice.

As in Doc-to-LoRA (arXiv 2602.15902) nothing but the base is needed: it writes the questions with the passage in its
prompt, and answers each in the same way, greedily. Where it writes too few, templates (`hypernet.probes`) make them
from the passage's own facts, worded otherwise than the quality gate's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypernet.adaptation.base import FrozenBase, Row
from hypernet.adaptation.corpus import Passage
from hypernet.base_questions import parse_questions
from hypernet.documents import DocumentText
from hypernet.probes import make_probes
from hypernet.prompts import closed_book, in_context

INSTRUCTION = ("Write {count} different questions that the text above answers. Ask for facts, name what each question "
               "is about, and do not mention the text. One question a line, without answers.")
QUESTION_TOKENS = 40
"""Room for one written question."""


@dataclass(frozen=True)
class QuestionAnswer:
    """A question, and the tokens of the base's answer to it with the passage in its prompt."""

    question: str
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A passage and what was asked of it."""

    passage: Passage
    questions: tuple[QuestionAnswer, ...]

    def closed(self, base: FrozenBase, i: int) -> Row:
        """Question `i` alone, and its answer."""
        return Row(closed_book(base.tokenizer, self.questions[i].question), list(self.questions[i].answer))

    def in_context(self, base: FrozenBase, i: int) -> Row:
        """Question `i` behind the passage, and its answer."""
        prompt = in_context(base.tokenizer, self.passage.text, self.questions[i].question)
        return Row(prompt, list(self.questions[i].answer))


def _questions(base: FrozenBase, passages: Sequence[Passage], count: int, source: str) -> list[list[tuple[str, str]]]:
    """For each passage, questions with who wrote them: "base" or "templates"."""
    found: list[list[tuple[str, str]]] = [[] for _ in passages]
    if source != "templates":
        room = count * QUESTION_TOKENS
        prompts = [in_context(base.tokenizer, passage.text, INSTRUCTION.format(count=count)) for passage in passages]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + room <= base.positions]
        for i, written in zip(fitting, base.write([prompts[i] for i in fitting], room), strict=True):
            text = base.tokenizer.decode(written, skip_special_tokens=True)
            found[i] = [(question, "base") for question in parse_questions(text, count)]
    if source != "base":
        for i, passage in enumerate(passages):
            if len(found[i]) < count:
                probes = make_probes(DocumentText("", passage.text), None, count, wording=1)
                known = {question for question, _ in found[i]}
                more = [(probe.question, "templates") for probe in probes if probe.question not in known]
                found[i] += more[:count - len(found[i])]
    return found


class QuestionStore:
    """The questions of a training, one JSON object for each passage, in files of a folder, one file a worker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[QuestionAnswer, ...]] = {}
        self.sources: dict[str, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read all files again; a last line that a kill cut off counts as not written."""
        self._known.clear()
        self.sources = {"base": 0, "templates": 0}
        for path in sorted(self._folder.glob("questions-*.jsonl")):
            for line in path.read_text().split("\n")[:-1]:
                item = json.loads(line)
                self._known[item["passage"]] = tuple(
                    QuestionAnswer(q["question"], tuple(q["answer_ids"])) for q in item["questions"])
                for question in item["questions"]:
                    self.sources[question["source"]] += 1

    def missing(self, passages: Sequence[Passage]) -> list[Passage]:
        """Those that nothing was asked of yet."""
        return [passage for passage in passages if passage.key not in self._known]

    def asked(self, passages: Sequence[Passage]) -> list[Asked]:
        """Passages with their questions, without those that no question was found for."""
        return [Asked(passage, self._known[passage.key]) for passage in passages if self._known.get(passage.key)]

    def ask(self, base: FrozenBase, passages: Sequence[Passage], count: int, answer_tokens: int, source: str,
            worker: int = 0, advance: Callable[[int], None] = lambda _done: None, together: int = 16) -> None:
        """Write and answer questions on passages that have none, `together` at a time; `advance` hears how many."""
        path = self._folder / f"questions-{worker}.jsonl"
        whole = path.read_text() if path.exists() else ""
        if whole and not whole.endswith("\n"):
            path.write_text(whole[:whole.rfind("\n") + 1])
        for start in range(0, len(passages), together):
            part = passages[start:start + together]
            questions = _questions(base, part, count, source)
            places = [(i, question, writer) for i, some in enumerate(questions) for question, writer in some]
            prompts = [in_context(base.tokenizer, part[i].text, question) for i, question, _ in places]
            answers = base.write(prompts, answer_tokens)
            lines: list[list[dict]] = [[] for _ in part]
            for (i, question, writer), prompt, answer in zip(places, prompts, answers, strict=True):
                text = base.tokenizer.decode(answer, skip_special_tokens=True).strip()
                if text and len(prompt) + len(answer) <= base.positions:
                    lines[i].append({"question": question, "answer": text, "answer_ids": answer, "source": writer})
            with path.open("a") as file:
                for passage, items in zip(part, lines, strict=True):
                    file.write(json.dumps({"passage": passage.key, "questions": items}) + "\n")
            advance(len(part))
        self.refresh()
