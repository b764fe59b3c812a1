"""What an adapter spoils: small talk, reading another document, and being asked about what it does not hold.

    python -m benchmarks.interference

On the shipped nano pair, in torch alone, greedily, on held-out documents of 1, 2, 4 and 8 facts. As the server does, a
document becomes the parts that the generator plans, and of its parts the router's scoring selects the one that is on
for a question, as when a client names the document. Four tables:

- small talk and general questions, with no adapter and with that of a document (through the router most of these go to
  the base instead)
- a document in the prompt and questions on it, with no adapter and with that of another document (the wrong one): over
  all documents, and over those that the base alone reads well
- questions on the adapter's own document: closed book, and with another document in the prompt
- closed book questions on other documents: what the wrong adapter says, beside the base alone

The wrong document is the next one of as many facts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.nano_pair import Pair, Prompt
from benchmarks.parts import PartRouter
from benchmarks.server import machine
from hypernet.documents import DocumentText
from hypernet.evaluation.cases import Case, held_out_cases
from hypernet.evaluation.scoring import abstains, contains_value, exact_match
from hypernet.lora import LoraAdapter
from hypernet.training.corpus.documents import NOT_KNOWN, Split
from hypernet.training.corpus.small_talk import GENERAL_QUESTIONS, SMALL_TALK
from router.embed import MiniLmEncoder

FACTS, SEED = (1, 2, 4, 8), 61_283
READ_WELL = 0.8
"""Share of a document's questions that the base alone must answer right with it in the prompt, to have read it well."""
GOAL_OWN, GOAL_POINTS = 0.9, 1.0
"""Own document with another in the prompt against closed book; and points (hundredths) that interference may cost."""


@dataclass(frozen=True)
class Asked:
    """A question on document `of` (its place in the list), and its answer."""

    of: int
    question: str
    answer: str


class Setting:
    """Documents of one number of facts, their adapters, and what is asked about them."""

    def __init__(self, pair: Pair, encoder: MiniLmEncoder, cases: Sequence[Case]) -> None:
        self._pair = pair
        self._cases = cases
        divided, self._loras = pair.documents([DocumentText(case.title, case.text) for case in cases])
        self._router = PartRouter(encoder, divided)
        self.parts = statistics.mean(map(len, self._loras))
        self._asked = [Asked(i, question.text, question.answers[0]) for i, case in enumerate(cases)
                       for question in case.questions if question.answerable]

    def small_talk(self, exchanges: Sequence[tuple[str, str]], alone: Sequence[str]) -> dict[str, Any]:
        """`exchanges` are questions with replies, and `alone` what the base says to them; each meets one document."""
        on = [self._on(i % len(self._cases), question) for i, (question, _) in enumerate(exchanges)]
        answers = self._pair.ask([question for question, _ in exchanges], on)
        return {"asked": len(exchanges),
                "right_without": _mean(exact_match(a, [reply]) for a, (_, reply) in zip(alone, exchanges, strict=True)),
                "right_with": _mean(exact_match(a, [reply]) for a, (_, reply) in zip(answers, exchanges, strict=True)),
                "unchanged": _mean(a == b for a, b in zip(answers, alone, strict=True)),
                "names_a_value": _mean(self._names_value(answer, i % len(self._cases))
                                       for i, answer in enumerate(answers))}

    def reading(self) -> dict[str, Any]:
        """A document in the prompt, with no adapter and with the wrong one."""
        prompts: list[Prompt] = [(self._cases[asked.of].text, asked.question) for asked in self._asked]
        alone = self._right(prompts, [None] * len(prompts))
        wrong = self._right(prompts, [self._on(self._other(asked.of), asked.question) for asked in self._asked])
        by_document: dict[int, list[bool]] = {}
        for asked, right in zip(self._asked, alone, strict=True):
            by_document.setdefault(asked.of, []).append(right)
        well = {i for i, rights in by_document.items() if sum(rights) / len(rights) >= READ_WELL}
        kept = [j for j, asked in enumerate(self._asked) if asked.of in well]
        return {"all": _against(alone, wrong, len(self._cases)),
                "read_well": _against([alone[j] for j in kept], [wrong[j] for j in kept], len(well))}

    def own(self) -> dict[str, Any]:
        """The adapter's own questions: closed book, and with another document in the prompt, with and without it."""
        on = [self._on(asked.of, asked.question) for asked in self._asked]
        closed = self._right([asked.question for asked in self._asked], on)
        prompts: list[Prompt] = [(self._cases[self._other(asked.of)].text, asked.question) for asked in self._asked]
        beside = self._right(prompts, on)
        return {"asked": len(self._asked), "closed_book": _mean(closed), "other_in_prompt": _mean(beside),
                "ratio": _ratio(_mean(beside), _mean(closed)),
                "other_in_prompt_without_adapter": _mean(self._right(prompts, [None] * len(prompts)))}

    def elsewhere(self) -> dict[str, Any]:
        """Closed book about a document with the adapter of another one, and with none."""
        questions = [asked.question for asked in self._asked]
        found: dict[str, Any] = {"asked": len(questions)}
        wrong = [self._on(self._other(asked.of), asked.question) for asked in self._asked]
        for name, adapters in (("without", [None] * len(questions)), ("with", wrong)):
            answers = self._pair.ask(questions, adapters)
            leaks = [not exact_match(answer, [asked.answer]) and self._names_value(answer, self._other(asked.of))
                     for answer, asked in zip(answers, self._asked, strict=True)]
            quiet = [abstains(answer) for answer in answers]
            found[name] = {"abstains": _mean(quiet), "names_a_value": _mean(leaks),
                           "abstains_or_names_none": _mean(q or not leak for q, leak in zip(quiet, leaks, strict=True)),
                           "right_by_chance": _mean(exact_match(answer, [asked.answer])
                                                    for answer, asked in zip(answers, self._asked, strict=True))}
        return found

    def _other(self, i: int) -> int:
        return (i + 1) % len(self._cases)

    def _on(self, i: int, question: str) -> LoraAdapter:
        """The adapter of document `i` that is on for the question."""
        return self._loras[i][self._router.within(i, question)]

    def _right(self, prompts: Sequence[Prompt], adapters: Sequence[LoraAdapter | None]) -> list[bool]:
        answers = self._pair.ask(prompts, adapters)
        return [exact_match(answer, [asked.answer]) for answer, asked in zip(answers, self._asked, strict=True)]

    def _names_value(self, answer: str, i: int) -> bool:
        """Whether the answer states a value of document `i`."""
        return any(contains_value(answer, value) for value in self._cases[i].values)


def _mean(values: Iterable[bool]) -> float:
    found = list(values)
    return round(sum(found) / len(found), 4) if found else 0.0


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _against(without: Sequence[bool], adapted: Sequence[bool], documents: int) -> dict[str, Any]:
    """Shares right, their ratio, and the loss in points."""
    before, after = _mean(without), _mean(adapted)
    return {"documents": documents, "asked": len(without), "right_without": before, "right_with": after,
            "ratio": _ratio(after, before), "points_lost": round(100 * (before - after), 2)}


def exchanges(count: int) -> dict[str, list[tuple[str, str]]]:
    """Up to `count` of each kind, as questions with the reply that the base was trained to give."""
    rng = Random(SEED)
    talk = [(way, reply) for ways, reply in SMALL_TALK for way in ways]
    general = [(question, NOT_KNOWN) for question in GENERAL_QUESTIONS]
    return {"small talk": rng.sample(talk, min(count, len(talk))),
            "general questions": rng.sample(general, min(count, len(general)))}


def measure(documents: int, talk: int) -> list[dict[str, Any]]:
    """A row for each number of facts."""
    pair, encoder = Pair(), MiniLmEncoder.load(threads=torch.get_num_threads())
    asked = exchanges(talk)
    alone = {name: pair.ask([question for question, _ in some], [None] * len(some)) for name, some in asked.items()}
    rows = []
    for facts in FACTS:
        begun = time.perf_counter()
        setting = Setting(pair, encoder, held_out_cases(documents, facts, Split.HELD_OUT, SEED))
        rows.append({"facts": facts, "documents": documents, "parts_per_document": setting.parts,
                     "small_talk": {name: setting.small_talk(some, alone[name]) for name, some in asked.items()},
                     "reading": setting.reading(), "own": setting.own(), "elsewhere": setting.elsewhere(),
                     "seconds": round(time.perf_counter() - begun, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["## Small talk and general questions", "",
             "| facts | asked about | questions | right without adapter | right with adapter | answers unchanged | "
             "names a value of the adapter's document |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, one in row["small_talk"].items():
            lines.append(f"| {row['facts']} | {name} | {one['asked']} | {one['right_without']:.3f} | "
                         f"{one['right_with']:.3f} | {one['unchanged']:.3f} | {one['names_a_value']:.3f} |")
    lines += ["", "## A document in the prompt, the adapter of another one on", "",
              f"Goal: at most {GOAL_POINTS:g} point lost where the base alone reads the document well (at least "
              f"{READ_WELL:g} of its questions right).", "",
              "| facts | documents | questions | right without | right with wrong adapter | ratio | points lost |",
              "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, label in (("read_well", "read well"), ("all", "all")):
            one = row["reading"][name]
            shares = (f"{one['right_without']:.3f} | {one['right_with']:.3f} | {_shown(one['ratio'])} | "
                      f"{one['points_lost']:.1f}") if one["asked"] else "- | - | - | -"
            lines.append(f"| {row['facts']} | {label}: {one['documents']} | {one['asked']} | {shares} |")
    lines += ["", "## The adapter's own document, another one in the prompt", "",
              f"Goal: {GOAL_OWN:g} of closed book.", "",
              "| facts | questions | closed book | another document in the prompt | ratio | the same without adapter |",
              "|---|---|---|---|---|---|"]
    for row in rows:
        one = row["own"]
        lines.append(f"| {row['facts']} | {one['asked']} | {one['closed_book']:.3f} | {one['other_in_prompt']:.3f} | "
                     f"{_shown(one['ratio'])} | {one['other_in_prompt_without_adapter']:.3f} |")
    lines += ["", "## Closed book about other documents", "",
              "Wanted: it abstains, or at least names no value of the adapter's document. Values such as weekdays are "
              "named by chance too; the base alone shows how often.", "",
              "| facts | questions | adapter | abstains | names a value of the adapter's document | abstains or names "
              "none | right by chance |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for name, label in (("without", "none"), ("with", "wrong")):
            one = row["elsewhere"][name]
            lines.append(f"| {row['facts']} | {row['elsewhere']['asked']} | {label} | {one['abstains']:.3f} | "
                         f"{one['names_a_value']:.3f} | {one['abstains_or_names_none']:.3f} | "
                         f"{one['right_by_chance']:.3f} |")
    return lines


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def main() -> None:
    """Measure and write `interference.md` and `interference.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100, help="of each number of facts, at least two")
    parser.add_argument("--small-talk", type=int, default=200, help="questions of each kind, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.documents < 2 or options.small_talk < 1:
        parser.error("--documents: at least 2 are needed, and --small-talk at least 1")
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    rows = measure(options.documents, options.small_talk)
    lines = ["Exact match of the whole answer, greedy. Held-out documents; facts is how many each states.",
             f"Machine: {machine()}, {options.threads} thread(s) of torch. Model: nano. "
             f"{options.documents} documents of each number of facts. Took {time.perf_counter() - begun:.0f} s.", "",
             *tables(rows)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "interference.md").write_text("\n".join(lines) + "\n")
    (options.output / "interference.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
