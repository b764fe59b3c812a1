"""How recall holds when one adapter carries more: chunks of a long document, and several documents, composed.

    python -m benchmarks.composition

On the shipped nano pair, in torch alone: closed book, greedy, exact match of the whole answer. A long document is
about several entities of one kind, one chunk for each; documents composed are of any kinds. Methods:

- concatenated: one adapter, the ranks of all chunks side by side (above the rank cap no engine would serve it)
- merged: the same, cut down to the rank cap by a truncated SVD
- as served: the text divided into parts as the server does (documents each for itself), an adapter for each part, the
  one for a question selected by the router's own scoring
- parts of k: an adapter for every k chunks, selected in the same way
- right part: an adapter for every chunk, the one that holds the answer
- in context: the whole text in the prompt, no adapter

A question is asked once for each distinct adapter: where methods agree (one chunk, no cut), so do their answers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.nano_pair import RANK_CAP, Pair
from benchmarks.parts import Divided, PartRouter
from benchmarks.server import machine
from hypernet.documents import DocumentText
from hypernet.evaluation.scoring import contains_value, exact_match
from hypernet.lora import LoraAdapter, concatenate
from hypernet.merge import truncate
from hypernet.training.corpus.documents import Fact, SampledDocument, Split, ask, render, sample_facts
from router.embed import MiniLmEncoder

SEED = 30_117
CHUNKS, DOCUMENTS, FACTS = (1, 2, 4, 8, 16), (2, 4, 8), (1, 2)
QUESTIONS_A_TEXT = 8
PARTS = (1, 2, 4)
BETWEEN = "\n\n"

Key = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and the chunk that states it."""

    question: str
    answer: str
    chunk: int


@dataclass(frozen=True)
class Composed:
    """Chunks of one long document, or documents, that are composed, and what is asked of them."""

    chunks: tuple[str, ...]
    asked: tuple[Asked, ...]


def sample(rng: Random, chunks: int, facts: int, one_domain: bool, questions: int) -> Composed:
    """Held-out texts of `facts` facts, each on entities of its own; of one domain where they are one document."""
    parts: list[SampledDocument] = []
    names: set[str] = set()
    domain = sample_facts(rng, facts, Split.HELD_OUT)[0].domain
    while len(parts) < chunks:
        drawn = sample_facts(rng, facts, Split.HELD_OUT)
        own = {fact.entity for fact in drawn}
        if len(drawn) == facts and not own & names and (drawn[0].domain is domain or not one_domain):
            names |= own
            parts.append(render(drawn, rng, Split.HELD_OUT))
    stated: list[tuple[int, Fact]] = [(i, fact) for i, part in enumerate(parts) for fact in part.facts]
    whole = SampledDocument("", tuple(fact for _, fact in stated))
    asked = []
    for i, fact in rng.sample(stated, min(questions, len(stated))):
        question = ask(fact, whole, rng, Split.HELD_OUT)
        asked.append(Asked(question.text, question.answer, i))
    return Composed(tuple(part.text for part in parts), tuple(asked))


def by_chunks(composed: Composed, size: int) -> Divided:
    """All of the text as one document, whose parts are `size` of the chunks each."""
    spans, at = [], 0
    for chunk in composed.chunks:
        spans.append((at, at + len(chunk)))
        at += len(chunk) + len(BETWEEN)
    parts = [spans[first:first + size] for first in range(0, len(spans), size)]
    return Divided(DocumentText("", BETWEEN.join(composed.chunks)), parts)


@dataclass
class Recall:
    """By method, the share of right answers, and of questions whose adapter was of text that holds the answer; and how
    many part adapters a text has as served, on average."""

    right: dict[str, float]
    selected: dict[str, float]
    parts: float


class Setting:
    """Texts of one size, asked by every method."""

    def __init__(self, pair: Pair, encoder: MiniLmEncoder, texts: Sequence[Composed], one_document: bool) -> None:
        self._pair = pair
        self._encoder = encoder
        self._texts = texts
        self._one_document = one_document
        adapters = iter(pair.adapters([chunk for text in texts for chunk in text.chunks]))
        self._adapters = [[next(adapters) for _ in text.chunks] for text in texts]
        self._rank = self._adapters[0][0].rank
        self._known: dict[tuple[int, Key, bool, int], bool] = {}  # of text, chunks, whether cut down, question

    def recall(self) -> Recall:
        """What each method answered right."""
        chunks = len(self._texts[0].chunks)
        everything = tuple(range(chunks))
        found = Recall({}, {}, 0.0)
        self._as_served(found)
        found.right["concatenated"] = self._share([[everything] * len(text.asked) for text in self._texts], cut=False)
        found.right["merged"] = self._share([[everything] * len(text.asked) for text in self._texts], cut=True)
        for size in PARTS:
            chosen = []
            for text in self._texts:
                router = PartRouter(self._encoder, [by_chunks(text, size)])
                chosen.append([router.within(0, asked.question) for asked in text.asked])
            keys = [[everything[part * size:(part + 1) * size] for part in parts] for parts in chosen]
            found.right[f"parts of {size}"] = self._share(keys, cut=False)
            found.selected[f"parts of {size}"] = _mean(
                asked.chunk in key for text, wanted in zip(self._texts, keys, strict=True)
                for asked, key in zip(text.asked, wanted, strict=True))
        found.right["right part"] = self._share([[(asked.chunk,) for asked in text.asked] for text in self._texts],
                                                cut=False)
        prompts = [(BETWEEN.join(text.chunks), asked.question) for text in self._texts for asked in text.asked]
        answers = iter(self._pair.ask(prompts, [None] * len(prompts)))
        found.right["in context"] = _mean(exact_match(next(answers), [asked.answer]) for text in self._texts
                                          for asked in text.asked)
        return found

    def _as_served(self, found: Recall) -> None:
        """The generator's own parts; with documents, the router chooses among the parts of all of them."""
        questions, adapters, held, count = [], [], [], 0
        for text in self._texts:
            posted = [BETWEEN.join(text.chunks)] if self._one_document else text.chunks
            divided, loras = self._pair.documents([DocumentText("", one) for one in posted])
            router = PartRouter(self._encoder, divided)
            count += sum(map(len, loras))
            for asked in text.asked:
                i, part = router.among(asked.question)
                questions.append(asked)
                adapters.append(loras[i][part])
                held.append(contains_value(divided[i].text(part), asked.answer))
        answers = self._pair.ask([asked.question for asked in questions], adapters)
        found.right["as served"] = _mean(exact_match(answer, [asked.answer])
                                         for answer, asked in zip(answers, questions, strict=True))
        found.selected["as served"] = _mean(held)
        found.parts = round(count / len(self._texts), 2)

    def _share(self, keys: Sequence[Sequence[Key]], cut: bool) -> float:
        """Share of right answers where each question is asked with the adapter of the chunks in its key."""
        wanted = [(i, key, cut and len(key) * self._rank > RANK_CAP, j)
                  for i, one in enumerate(keys) for j, key in enumerate(one)]
        todo = [one for one in dict.fromkeys(wanted) if one not in self._known]
        made: dict[tuple[int, Key, bool], LoraAdapter] = {}
        for i, key, is_cut, _ in todo:
            if (i, key, is_cut) not in made:
                whole = concatenate([self._adapters[i][chunk] for chunk in key])
                made[i, key, is_cut] = truncate(whole, RANK_CAP)[0] if is_cut else whole
        asked = [self._texts[i].asked[j] for i, _, _, j in todo]
        answers = self._pair.ask([one.question for one in asked], [made[i, key, is_cut] for i, key, is_cut, _ in todo])
        for one, question, answer in zip(todo, asked, answers, strict=True):
            self._known[one] = exact_match(answer, [question.answer])
        return _mean(self._known[one] for one in wanted)


def _mean(values: Iterable[bool]) -> float:
    found = list(values)
    return round(sum(found) / len(found), 4)


def measure(questions: int) -> list[dict[str, Any]]:
    """A row for each number of chunks or documents and of facts in each, over about so many questions."""
    pair, encoder = Pair(), MiniLmEncoder.load(threads=torch.get_num_threads())
    cells = [("chunks of one document", count, facts) for facts in FACTS for count in CHUNKS]
    cells += [("documents", count, facts) for facts in FACTS for count in DOCUMENTS]
    rows: list[dict[str, Any]] = []
    ones: dict[int, dict[str, float]] = {}
    for kind, count, facts in cells:
        begun = time.perf_counter()
        rng = Random(f"{SEED}-{kind}-{count}-{facts}")
        each = min(QUESTIONS_A_TEXT, count * facts)
        one_document = kind != "documents"
        texts = [sample(rng, count, facts, one_document, each) for _ in range(-(-questions // each))]
        recall = Setting(pair, encoder, texts, one_document).recall()
        one = ones.setdefault(facts, recall.right)  # one chunk comes first
        ratios = {name: round(share / one[name], 4) for name, share in recall.right.items() if one[name]}
        rows.append({"composed": kind, "count": count, "facts_each": facts, "texts": len(texts),
                     "questions": sum(len(text.asked) for text in texts), "parts_as_served": recall.parts,
                     "recall": recall.right, "ratio_to_one": ratios, "selected": recall.selected,
                     "seconds": round(time.perf_counter() - begun, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: recall, with the ratio to one chunk of as many facts in brackets, and how often the part was right."""
    names = list(rows[0]["recall"])
    lines = ["| composed | number | facts in each | questions | " + " | ".join(names) + " |",
             "|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = []
        for name in names:
            ratio = row["ratio_to_one"].get(name)
            cells.append(f"{row['recall'][name]:.3f} ({'-' if ratio is None else format(ratio, '.2f')})")
        lines.append(f"| {row['composed']} | {row['count']} | {row['facts_each']} | {row['questions']} | "
                     + " | ".join(cells) + " |")
    names = list(rows[0]["selected"])
    lines += ["", "How often the selected adapter is of text that holds the answer, and how many part adapters a text "
              "has as served:", "",
              "| composed | number | facts in each | " + " | ".join(names) + " | parts as served |",
              "|---" * (len(names) + 4) + "|"]
    for row in rows:
        lines.append(f"| {row['composed']} | {row['count']} | {row['facts_each']} | "
                     + " | ".join(f"{row['selected'][name]:.3f}" for name in names)
                     + f" | {row['parts_as_served']:.1f} |")
    return lines


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--questions", type=int, default=96, help="questions in each row, about")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options.questions)
    lines = ["Recall (exact match of the whole answer) by how much is composed; in brackets the ratio to one chunk. "
             "Methods: see benchmarks/composition.py.",
             f"Machine: {machine()}. Model: nano. Rank cap {RANK_CAP}.", "", *table(rows)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "composition.md").write_text("\n".join(lines) + "\n")
    (options.output / "composition.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
