"""How often questions on a document are answered right, and at what cost: adapters, in context, retrieval.

    python -m benchmarks.internalisation
    python -m benchmarks.internalisation --base FOLDER --checkpoint FOLDER --documents FILE.jsonl

The shipped pair on held-out documents of the corpus, or any base with a checkpoint on documents of one's own: one JSON
object a line with title, text, facts and questions, each of these with question and answers. Every method answers the
same questions, greedily, in this process, with the same base. Retrieval searches the chunks of all documents together.

As the server does, a document becomes the parts that the generator plans, refinement takes one part after the other,
and of a document's parts the router's scoring selects the one that answers a question. "hypernet, one adapter" joins
all parts of a document side by side instead, whatever the rank. Refined adapters are all taken: no gate chooses here.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.parts import Divided, PartRouter
from benchmarks.retrieval import Bm25, Dense
from benchmarks.server import machine
from hypernet.answers import answer_greedily, answer_together, end_tokens
from hypernet.distill import REFINE, Distiller, DistillSettings
from hypernet.distill_questions import assign
from hypernet.documents import Chunk, DocumentText, chunk_document
from hypernet.evaluation.cases import Case, CaseQuestion, hand_written_cases
from hypernet.evaluation.scoring import contains_value, exact_match, normalise
from hypernet.generate import HypernetGenerator
from hypernet.inject import adapted
from hypernet.lora import LoraAdapter, concatenate, factors_of
from hypernet.nano import base_dir, hypernet_dir
from hypernet.prompts import closed_book, in_context
from hypernet.training.corpus.documents import Split, ask, sample_document
from router.embed import MiniLmEncoder

FACT_COUNTS, QUESTIONS_A_DOCUMENT, SEED = (1, 2, 4, 8), 4, 4711
CHUNK_TOKENS, MAX_CHUNK_TOKENS = 64, 128
REFINE_STEPS, DISTILL_STEPS, TOP_K = (5, 10, 25), (10, 25, 60), (1, 3)


@dataclass(frozen=True)
class Item:
    """A document with its questions; `training` are questions of the corpus on all of its facts, where it has such."""

    case: Case
    training: tuple[str, ...] = ()

    @property
    def document(self) -> DocumentText:
        """As a tenant would post it."""
        return DocumentText(self.case.title, self.case.text)

    @property
    def text(self) -> str:
        """As it stands in a prompt."""
        return f"{self.case.title}\n\n{self.case.text}".strip()

    @property
    def questions(self) -> list[CaseQuestion]:
        """Those that the document answers."""
        return [question for question in self.case.questions if question.answerable]


def corpus_items(count: int, facts: Sequence[int]) -> list[Item]:
    """`count` held-out documents of each number of facts."""
    items: list[Item] = []
    for number in facts:
        rng = Random(f"{SEED}-{number}")
        found: list[Item] = []
        while len(found) < count:
            document = sample_document(rng, number, Split.HELD_OUT)
            if len(document.facts) != number:
                continue
            asked = [ask(fact, document, rng, Split.HELD_OUT)
                     for fact in rng.sample(document.facts, min(number, QUESTIONS_A_DOCUMENT))]
            training = tuple(ask(fact, document, rng, Split.HELD_OUT).text for fact in document.facts)
            questions = tuple(CaseQuestion(question.text, (question.answer,)) for question in asked)
            found.append(Item(Case("", document.text, number, questions, ()), training))
        items += found
    return items


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Overlap of words with the best accepted answer, as in SQuAD (arXiv 1606.05250)."""
    found = normalise(answer).split()
    best = 0.0
    for one in accepted:
        wanted = normalise(one).split()
        common = sum((Counter(found) & Counter(wanted)).values())
        if common:
            best = max(best, 2 * common / (len(found) + len(wanted)))
        elif not found and not wanted:
            best = 1.0
    return best


@dataclass(frozen=True)
class Answered:
    """One answer: on which document (its place in the list) of how many facts, and how right it is."""

    document: int
    facts: int
    exact: bool
    f1: float
    context_tokens: int


@dataclass
class Outcome:
    """What one method did, and what it took."""

    method: str
    answers: list[Answered] = field(default_factory=list)
    query_s: list[float] = field(default_factory=list)
    document_s: list[float] = field(default_factory=list)
    bytes_a_document: float = 0.0
    peak_mib: float = 0.0

    @property
    def documents(self) -> set[int]:
        """Which documents it was asked about."""
        return {one.document for one in self.answers}

    def scores(self, documents: set[int]) -> dict[str, float]:
        """Of the answers on these documents: exact match in all ("all") and by number of facts ("4"), and "f1"."""
        kept = [one for one in self.answers if one.document in documents]
        found = {"all": statistics.mean(one.exact for one in kept)}
        for facts in sorted({one.facts for one in kept}):
            found[str(facts)] = statistics.mean(one.exact for one in kept if one.facts == facts)
        return {**found, "f1": statistics.mean(one.f1 for one in kept)}

    def row(self, reference: Outcome) -> dict[str, Any]:
        """The figures of the table; `reference` answered the same documents, or more."""
        own, other = self.scores(self.documents), reference.scores(self.documents)
        return {"method": self.method, "documents": len(self.documents), "questions": len(self.answers),
                "scores": own, "in_context_on_the_same": other,
                "ratios": {name: own[name] / other[name] if other[name] else None for name in own},
                "seconds_per_query": statistics.median(self.query_s),
                "seconds_per_document": statistics.median(self.document_s) if self.document_s else 0.0,
                "context_tokens_per_query": statistics.mean(one.context_tokens for one in self.answers),
                "bytes_per_document": self.bytes_a_document, "peak_memory_mib": self.peak_mib}


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """The peak since `reset_peak`: of the GPU's allocations, or of this process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("/proc/self/status names no VmHWM")
    return int(found[1]) / 1024


Context = Callable[[Item, str], str]
Parts = list[LoraAdapter]
"""A document's part adapters, in order; one joined adapter of all of it is a single part."""


def _retrieved(index: Bm25 | Dense, chunks: Sequence[str], count: int) -> Context:
    """The best chunks; the very best stands last, next to the question."""
    return lambda item, question: "\n\n".join(chunks[i] for i in reversed(index.best(question, count)))


class Benchmark:
    """The methods on one base, one checkpoint and one set of documents."""

    def __init__(self, generator: HypernetGenerator, items: Sequence[Item], timed: int, answer_tokens: int,
                 trained: int, distill: DistillSettings, refine: DistillSettings) -> None:
        """Methods that take gradient steps get the first `trained` documents of each number of facts."""
        by_facts: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            by_facts.setdefault(item.case.facts, []).append(i)
        self.trained = sorted(i for found in by_facts.values() for i in found[:trained])
        self.generator, self.items, self.timed, self.answer_tokens = generator, items, timed, answer_tokens
        self.base, self.tokenizer = generator.base, generator.tokenizer
        self.ends = end_tokens(self.base, self.tokenizer)
        self.distill, self.refine = distill, refine
        self.distiller = Distiller(self.base, self.tokenizer)
        self.plans = [generator.plan(item.document) for item in items]
        self.divided = [Divided.by_plan(item.document, plan)
                        for item, plan in zip(items, self.plans, strict=True)]
        self.router = PartRouter(MiniLmEncoder.load(), self.divided)
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Every method in turn."""
        self.prompted("base", lambda item, question: "")
        self.prompted("document in context", lambda item, question: item.text)
        self.retrieval()
        everything = range(len(self.items))
        made = self.adapters("hypernet", self._generated, everything)
        self.adapters("hypernet, one adapter", self._joined, everything)
        if len(self.trained) < len(self.items):
            self._repeat("hypernet", f"hypernet, the {len(self.trained)} documents below")
        sources = {"questions by templates": False}
        if all(item.training for item in self.items):
            sources["questions of the corpus"] = True
        for source, corpus in sources.items():
            # Of the corpus' own questions, which no server has, only the longest run is measured.
            for steps in REFINE_STEPS[-1:] if corpus else REFINE_STEPS:
                self.adapters(f"hypernet + refine {steps} ({source})", self._refined(steps, corpus, made),
                              self.trained, self._hypernet_s)
            for steps in DISTILL_STEPS[-1:] if corpus else DISTILL_STEPS:
                self.adapters(f"distill {steps} ({source})", self._distilled(steps, corpus), self.trained)

    def _repeat(self, method: str, name: str) -> None:
        """A row on those documents alone that get gradient steps; times and sizes are as measured on all."""
        whole = self.outcome(method)
        kept = [one for one in whole.answers if one.document in set(self.trained)]
        self.outcomes.append(replace(whole, method=name, answers=kept))

    def outcome(self, method: str) -> Outcome:
        """What a method did that has run."""
        return next(one for one in self.outcomes if one.method == method)

    def selection(self) -> dict[str, float]:
        """How many parts a document has on average, and how often the selected one's text holds an accepted answer."""
        held = [any(contains_value(one.text(self.router.within(i, question.text)), answer)
                    for answer in question.answers)
                for i, (item, one) in enumerate(zip(self.items, self.divided, strict=True))
                for question in item.questions]
        return {"parts_per_document": statistics.mean(len(plan) for plan in self.plans),
                "selected_part_holds_answer": statistics.mean(held)}

    def _generated(self, i: int, item: Item) -> Parts:
        """The document's part adapters, chunking included."""
        return [part.lora for part in self.generator.generate([item.document])[0].parts]

    def _joined(self, i: int, item: Item) -> Parts:
        """One adapter of all the document, above any rank cap."""
        parts = self._generated(i, item)
        return parts if len(parts) == 1 else [concatenate(parts)]

    @property
    def _hypernet_s(self) -> float:
        return statistics.median(self.outcome("hypernet").document_s)

    def _refined(self, steps: int, corpus: bool, starts: Mapping[int, Parts]) -> Callable[[int, Item], Parts]:
        """Each part for itself, as the server refines them; a part that no question of the corpus is on stays."""
        settings = replace(self.refine, steps=steps, seconds=600.0)

        def make(i: int, item: Item) -> Parts:
            divided, found = self.divided[i], []
            by_part = self._by_part(item.training, self.plans[i]) if corpus else {}
            for part, start in enumerate(starts[i]):
                questions = by_part.get(part, ())
                if corpus and not questions:
                    found.append(start)
                    continue
                found.append(self.distiller.distill(item.document, questions, start, settings=settings,
                                                    spans=divided.parts[part]).lora)
            return found
        return make

    def _by_part(self, questions: Sequence[str], plan: Sequence[Sequence[Chunk]]) -> dict[int, list[str]]:
        """Each question with the part whose text shares most words with it."""
        texts = ["\n\n".join(chunk.text for chunk in part) for part in plan]
        found: dict[int, list[str]] = {}
        for exercise in assign(questions, texts):
            found.setdefault(texts.index(exercise.context), []).append(exercise.question)
        return found

    def _distilled(self, steps: int, corpus: bool) -> Callable[[int, Item], Parts]:
        settings = replace(self.distill, steps=steps, seconds=600.0)
        return lambda i, item: [self.distiller.distill(item.document, item.training if corpus else (),
                                                       settings=settings).lora]

    def adapters(self, method: str, make: Callable[[int, Item], Parts], documents: Sequence[int],
                 extra: float = 0.0) -> dict[int, Parts]:
        """A method that makes adapters: the questions are asked closed book. `extra` seconds were spent before."""
        outcome = Outcome(method)
        reset_peak(self.base.device)
        made = {}
        for i in documents:
            begun = time.perf_counter()
            made[i] = make(i, self.items[i])
            outcome.document_s.append(time.perf_counter() - begun + extra)
        with tempfile.TemporaryDirectory() as folder:
            for i, parts in made.items():
                for part, lora in enumerate(parts):
                    lora.save(Path(folder) / f"{i}-{part}")
            sizes = [file.stat().st_size for file in Path(folder).glob("*/*")]
        outcome.bytes_a_document = sum(sizes) / len(made)
        # An encoder keeps the vectors of texts that it has seen, so each method asks a new one.
        self.router.encoder = MiniLmEncoder.load()
        for i, parts in made.items():
            self._ask(outcome, i, parts, lambda item, question: "")
        self._finish(outcome)
        return made

    def prompted(self, method: str, context: Context, index_bytes: float = 0.0, index_s: float | None = None) -> None:
        """A method that puts text into the prompt. `index_s` and `index_bytes` are an index' cost for a document."""
        outcome = Outcome(method, bytes_a_document=index_bytes, document_s=[] if index_s is None else [index_s])
        reset_peak(self.base.device)
        for i in range(len(self.items)):
            self._ask(outcome, i, (), context)
        self._finish(outcome)

    def retrieval(self) -> None:
        """BM25 and dense retrieval over the chunks of all documents."""
        chunks = [chunk.text for item in self.items
                  for chunk in chunk_document(item.document, self.tokenizer, CHUNK_TOKENS, MAX_CHUNK_TOKENS, 10_000)]
        text_bytes = sum(len(chunk.encode()) for chunk in chunks)
        for name, count in product(("BM25", "MiniLM"), TOP_K):
            encoder = MiniLmEncoder.load() if name == "MiniLM" else None
            begun = time.perf_counter()
            index: Bm25 | Dense = Dense(chunks, encoder) if encoder else Bm25(chunks)
            spent = (time.perf_counter() - begun) / len(self.items)
            self.prompted(f"retrieval {name}, top {count}", _retrieved(index, chunks, count),
                          (index.bytes + text_bytes) / len(self.items), spent)

    def _ask(self, outcome: Outcome, i: int, parts: Sequence[LoraAdapter], context: Context) -> None:
        item = self.items[i]
        if len(outcome.query_s) < self.timed:
            # One question alone, from its text to its answer, as a client would wait for it.
            first = item.questions[0].text
            begun = time.perf_counter()
            prompt = self._prompt(context(item, first), first)
            self._answers([prompt], self._selected(i, parts, [first]))
            outcome.query_s.append(time.perf_counter() - begun)
        texts = [question.text for question in item.questions]
        prompts = [self._prompt(context(item, text), text) for text in texts]
        answers = self._answers(prompts, self._selected(i, parts, texts))
        for question, answer, prompt in zip(item.questions, answers, prompts, strict=True):
            extra = len(prompt) - len(closed_book(self.tokenizer, question.text))
            outcome.answers.append(Answered(i, item.case.facts, exact_match(answer, question.answers),
                                            token_f1(answer, question.answers), extra))

    def _prompt(self, context: str, question: str) -> list[int]:
        return in_context(self.tokenizer, context, question) if context else closed_book(self.tokenizer, question)

    def _selected(self, i: int, parts: Sequence[LoraAdapter], questions: Sequence[str]) -> list[LoraAdapter]:
        """The part adapter that the router selects for each question; none where there are none."""
        if len(parts) < 2:
            return [lora for lora in parts for _ in questions]
        return [parts[self.router.within(i, question)] for question in questions]

    def _answers(self, prompts: Sequence[list[int]], loras: Sequence[LoraAdapter]) -> list[str]:
        """Greedy answers, each with the adapter in its place; without adapters, of the base alone."""
        if not loras:
            return self._decoded(answer_greedily(self.base, prompts, self.ends, self.answer_tokens))
        by_adapter: dict[int, list[int]] = {}
        for i, lora in enumerate(loras):
            by_adapter.setdefault(id(lora), []).append(i)
        decoded: list[tuple[int, str]] = []
        for group in by_adapter.values():
            # One row of factors serves every row of the batch.
            rows = [prompts[i] for i in group]
            factors = {name: (a.to(self.base.device, self.base.dtype), b.to(self.base.device, self.base.dtype))
                       for name, (a, b) in factors_of([loras[group[0]]] * len(rows)).items()}
            with adapted(self.base, factors):
                answers = answer_together(self.base, rows, self.ends, self.answer_tokens)
            decoded += list(zip(group, self._decoded(answers), strict=True))
        return [answer for _, answer in sorted(decoded)]

    def _decoded(self, answers: Sequence[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]

    def _finish(self, outcome: Outcome) -> None:
        outcome.peak_mib = peak_mib(self.base.device)
        self.outcomes.append(outcome)
        print(f"{outcome.method}: {outcome.scores(outcome.documents)['all']:.3f}", file=sys.stderr, flush=True)


def report(result: dict[str, Any]) -> str:
    """The Markdown tables."""
    rows, facts = result["methods"], result["facts"]
    full = next(row for row in rows if row["method"] == "document in context")
    parts = result["parts"]
    lines = [f"Machine: {result['machine']}, {result['threads']} thread(s) of torch. Base: {result['base']}, "
             f"hypernetwork: {result['checkpoint']}. {result['documents']} documents, {full['questions']} questions, "
             f"greedy answers of at most {result['answer_tokens']} tokens. All settings are in the JSON file.", "",
             f"hypernet and refine: {parts['parts_per_document']:.2f} part adapters a document; the text of the part "
             f"that the router's scoring selects holds the answer for {parts['selected_part_holds_answer']:.3f} of the "
             "questions. Base, hypernet, refine and distill answer closed book.", "",
             "Exact match of the whole answer; in brackets its ratio to the document in context, on the same documents "
             "(gradient steps take long, so methods with them got fewer).", "",
             "| method | documents | all | " + " | ".join(map(_facts, facts)) + " | F1 |",
             "|---" * (len(facts) + 4) + "|"]
    for row in rows:
        cells = [_with_ratio(row, name) for name in ("all", *map(str, facts), "f1")]
        lines.append(f"| {row['method']} | {row['documents']} | " + " | ".join(cells) + " |")
    lines += ["", "Seconds a query: one question alone, median, search included. Seconds a document: median; refine "
              "with the hypernetwork's pass; an index' as its share. Bytes: the adapter's folder, or index with text. "
              "Peak memory is that of this whole process (GPU: of torch's allocations).", "",
              "| method | s/query | s/document | context tokens/query | bytes/document | peak MiB |",
              "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['method']} | {row['seconds_per_query']:.4f} | {row['seconds_per_document']:.4f} | "
                     f"{row['context_tokens_per_query']:.1f} | {row['bytes_per_document']:.0f} | "
                     f"{row['peak_memory_mib']:.0f} |")
    return "\n".join(lines) + "\n"


def _facts(number: int) -> str:
    return "1 fact" if number == 1 else f"{number} facts"


def _with_ratio(row: dict[str, Any], name: str) -> str:
    ratio = row["ratios"][name]
    return f"{row['scores'][name]:.3f} ({'-' if ratio is None else format(ratio, '.2f')})"


def main() -> None:
    """Measure and write `internalisation.md` and `internalisation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=base_dir(), help="folder of the base; the shipped one by default")
    parser.add_argument("--checkpoint", type=Path, default=hypernet_dir(), help="folder of its hypernetwork")
    parser.add_argument("--documents", type=Path, help="JSON lines; held-out documents of the corpus by default")
    parser.add_argument("--count", type=int, default=50, help="documents of the corpus for each number of facts")
    parser.add_argument("--trained", type=int, default=8,
                        help="of them, how many of each number of facts get gradient steps")
    parser.add_argument("--facts", type=int, nargs="+", default=list(FACT_COUNTS))
    parser.add_argument("--timed", type=int, default=40, help="documents whose first question is timed alone")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--own-questions", type=int, default=0, help="training questions that the base writes itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    items = ([Item(case) for case in hand_written_cases(options.documents)] if options.documents
             else corpus_items(options.count, options.facts))
    items = [item for item in items if item.questions]
    if options.trained < 1:
        parser.error("--trained: at least 1 is needed")
    if not items:
        parser.error("--documents: holds no document with a question that it answers")
    generator = HypernetGenerator.load(options.checkpoint, options.base)
    distill = replace(DistillSettings(), own_questions=options.own_questions)
    refine = replace(REFINE, own_questions=options.own_questions)
    benchmark = Benchmark(generator, items, options.timed, options.answer_tokens, options.trained, distill,
                          refine)
    benchmark.run()
    facts = sorted({item.case.facts for item in items})
    on_gpu = generator.base.device.type == "cuda"
    where = f"{torch.cuda.get_device_name()}" if on_gpu else machine()
    shipped = options.base == base_dir()
    result = {"machine": where, "threads": options.threads, "documents": len(items), "facts": facts,
              "base": "nano" if shipped else options.base.name,
              "checkpoint": "nano" if shipped else options.checkpoint.name, "answer_tokens": options.answer_tokens,
              "parts": benchmark.selection(),
              "settings": {"refine": asdict(refine), "distill": asdict(distill)},
              "base_fingerprint": generator.base_fingerprint, "generator_fingerprint": generator.fingerprint,
              "methods": [outcome.row(benchmark.outcome("document in context")) for outcome in benchmark.outcomes]}
    table = report(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "internalisation.md").write_text(table)
    (options.output / "internalisation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
