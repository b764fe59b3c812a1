"""How recall holds when one adapter carries more: chunks of a long document, and several documents, composed.

    python -m benchmarks.composition

On the shipped nano pair, in torch alone: closed book, greedy, exact match of the whole answer. A long document is
about several entities of one kind, one chunk for each; documents composed are of any kinds. Methods:

- concatenated: one adapter, the ranks of all chunks side by side (above the rank cap no engine would serve it)
- merged: the same, cut down to the rank cap by a truncated SVD
- parts of k: an adapter for every k chunks, the one for a question selected by the router's own scoring
- right part: an adapter for every chunk, the one that holds the answer
- in context: the whole text in the prompt, no adapter

A question is asked once for each distinct adapter: where methods agree (one chunk, no cut), so do their answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.server import machine
from hypernet.evaluation.scoring import exact_match
from hypernet.generate import HypernetGenerator
from hypernet.inject import adapted
from hypernet.lora import LoraAdapter, concatenate, factors_of
from hypernet.merge import truncate
from hypernet.nano import base_dir, hypernet_dir
from hypernet.prompts import closed_book, in_context
from hypernet.training.corpus.documents import Fact, SampledDocument, Split, ask, render, sample_facts
from router.centroids import document_centroids
from router.embed import MiniLmEncoder
from router.index import AdapterEntry, TenantIndex
from router.text import words
from serve.config import RouterConfig

SEED = 30_117
CHUNKS, DOCUMENTS, FACTS = (1, 2, 4, 8, 16), (2, 4, 8), (1, 2)
RANK_CAP = 64
QUESTIONS_A_TEXT = 8
BATCH = 32
ANSWER_TOKENS = 40
PARTS = (1, 2, 4)

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


class Pair:
    """The shipped pair: an adapter for any text, and greedy answers with any adapters in one batch."""

    def __init__(self) -> None:
        self._generator = HypernetGenerator.load(hypernet_dir(), base_dir(), max_rank=RANK_CAP)

    def adapters(self, texts: Sequence[str]) -> list[LoraAdapter]:
        """The adapter of each text read as one chunk."""
        reader = self._generator.reader
        ids = [reader.frame(text) for text in texts]
        return [adapter for first in range(0, len(ids), BATCH) for adapter in reader.adapters(ids[first:first + BATCH])]

    def ask(self, prompts: Sequence[str | tuple[str, str]], adapters: Sequence[LoraAdapter | None]) -> list[str]:
        """Greedy answers to questions, alone or each with a document before it; either all or none have adapters."""
        tokenizer = self._generator.tokenizer
        ids = [closed_book(tokenizer, prompt) if isinstance(prompt, str) else in_context(tokenizer, *prompt)
               for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of a batch are of like length
        answers: dict[int, str] = {}
        for first in range(0, len(order), BATCH):
            rows = order[first:first + BATCH]
            on = [adapter for i in rows if (adapter := adapters[i]) is not None]
            found = self._batch([ids[i] for i in rows], on)
            answers.update(zip(rows, found, strict=True))
        return [answers[i] for i in range(len(ids))]

    @torch.no_grad()
    def _batch(self, ids: Sequence[list[int]], adapters: Sequence[LoraAdapter]) -> list[str]:
        tokenizer, base = self._generator.tokenizer, self._generator.base
        length = max(map(len, ids))
        tokens = torch.full((len(ids), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(ids):
            tokens[i, length - len(row):] = torch.tensor(row)
            mask[i, length - len(row):] = 1
        with adapted(base, factors_of(adapters)) if adapters else nullcontext():
            made: Any = base.generate(input_ids=tokens, attention_mask=mask, do_sample=False,
                                      max_new_tokens=ANSWER_TOKENS)
        return [text.strip() for text in tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)]


def select_parts(encoder: MiniLmEncoder, composed: Composed, size: int, centroids: int) -> list[int]:
    """For each question the part of `size` chunks that the router's scoring puts first among all of the text."""
    index = TenantIndex("benchmark", encoder.dimension)
    entries = []
    for part in range(-(-len(composed.chunks) // size)):
        chunks = composed.chunks[part * size:(part + 1) * size]
        entries.append(AdapterEntry.of_document(
            adapter_id=str(part), tenant_id="benchmark", document_id="document", title="", text="\n\n".join(chunks),
            centroids=document_centroids(encoder, "", chunks, centroids)))
    index.update(entries)
    vectors = encoder.embed([asked.question for asked in composed.asked])
    return [int(index.search(vector, words(asked.question), limit=1)[0].entry.adapter_id)
            for vector, asked in zip(vectors, composed.asked, strict=True)]


class Setting:
    """Texts of one size, asked by every method."""

    def __init__(self, pair: Pair, encoder: MiniLmEncoder, texts: Sequence[Composed]) -> None:
        self._pair = pair
        self._encoder = encoder
        self._texts = texts
        adapters = iter(pair.adapters([chunk for text in texts for chunk in text.chunks]))
        self._adapters = [[next(adapters) for _ in text.chunks] for text in texts]
        self._rank = self._adapters[0][0].rank
        self._known: dict[tuple[int, Key, bool, int], bool] = {}  # of text, chunks, whether cut down, question
        self._centroids = RouterConfig().centroids_per_adapter

    def recall(self) -> dict[str, float]:
        """Share of right answers by method, and of rightly selected parts."""
        chunks = len(self._texts[0].chunks)
        everything = tuple(range(chunks))
        rows: dict[str, float] = {}
        rows["concatenated"] = self._share([[everything] * len(text.asked) for text in self._texts], cut=False)
        rows["merged"] = self._share([[everything] * len(text.asked) for text in self._texts], cut=True)
        for size in PARTS:
            chosen = [select_parts(self._encoder, text, size, self._centroids) for text in self._texts]
            keys = [[everything[part * size:(part + 1) * size] for part in parts] for parts in chosen]
            rows[f"parts of {size}"] = self._share(keys, cut=False)
            rows[f"selected, parts of {size}"] = _mean(
                asked.chunk in key for text, wanted in zip(self._texts, keys, strict=True)
                for asked, key in zip(text.asked, wanted, strict=True))
        rows["right part"] = self._share([[(asked.chunk,) for asked in text.asked] for text in self._texts], cut=False)
        prompts = [("\n\n".join(text.chunks), asked.question) for text in self._texts for asked in text.asked]
        answers = iter(self._pair.ask(prompts, [None] * len(prompts)))
        rows["in context"] = _mean(exact_match(next(answers), [asked.answer]) for text in self._texts
                                   for asked in text.asked)
        return rows

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
        rng = Random(f"{SEED}-{kind}-{count}-{facts}")
        each = min(QUESTIONS_A_TEXT, count * facts)
        texts = [sample(rng, count, facts, kind != "documents", each) for _ in range(-(-questions // each))]
        recall = Setting(pair, encoder, texts).recall()
        one = ones.setdefault(facts, recall)  # one chunk comes first
        ratios = {name: round(share / one[name], 4) for name, share in recall.items()
                  if not name.startswith("selected") and one[name]}
        rows.append({"composed": kind, "count": count, "facts_each": facts, "texts": len(texts),
                     "questions": sum(len(text.asked) for text in texts), "recall": recall, "ratio_to_one": ratios})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: recall, with the ratio to one chunk of as many facts in brackets, and how often the part was right."""
    names = [name for name in rows[0]["recall"] if not name.startswith("selected")]
    lines = ["| composed | number | facts in each | questions | " + " | ".join(names) + " |",
             "|---" * (len(names) + 4) + "|"]
    for row in rows:
        cells = []
        for name in names:
            ratio = row["ratio_to_one"].get(name)
            cells.append(f"{row['recall'][name]:.3f} ({'-' if ratio is None else format(ratio, '.2f')})")
        lines.append(f"| {row['composed']} | {row['count']} | {row['facts_each']} | {row['questions']} | "
                     + " | ".join(cells) + " |")
    lines += ["", "How often the router's scoring selected the part that holds the answer:", "",
              "| composed | number | facts in each | " + " | ".join(f"parts of {size}" for size in PARTS) + " |",
              "|---" * (len(PARTS) + 3) + "|"]
    for row in rows:
        lines.append(f"| {row['composed']} | {row['count']} | {row['facts_each']} | "
                     + " | ".join(f"{row['recall'][f'selected, parts of {size}']:.3f}" for size in PARTS) + " |")
    return lines


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--questions", type=int, default=192, help="questions in each row, about")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options.questions)
    lines = ["Recall (exact match, closed book) by how much is composed; in brackets the ratio to one chunk.",
             f"Machine: {machine()}. Model: nano. Rank cap {RANK_CAP}.", "", *table(rows)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "composition.md").write_text("\n".join(lines) + "\n")
    (options.output / "composition.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
