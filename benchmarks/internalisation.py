"""How often questions on a document are answered right, and at what cost: adapters, in context, retrieval.

    python -m benchmarks.internalisation
    python -m benchmarks.internalisation --base FOLDER --checkpoint FOLDER --documents FILE.jsonl

The shipped pair on held-out documents of the corpus, or any base with a checkpoint on documents of one's own: one JSON
object a line with title, text, facts and questions, each of these with question and answers. Every method answers the
same questions, greedily, in this process, with the same base. Retrieval searches the chunks of all documents together.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.server import machine
from hypernet.distill import REFINE, Distiller, DistillSettings
from hypernet.distill_teacher import answer_greedily, end_tokens
from hypernet.documents import DocumentText, chunk_document
from hypernet.evaluation.cases import Case, CaseQuestion, hand_written_cases
from hypernet.evaluation.scoring import exact_match, normalise
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


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza 2009) with k1 1.5 and b 0.75."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = [Counter(_words(text)) for text in texts]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean = statistics.mean(self._lengths)
        held = Counter(word for counts in self._counts for word in counts)
        self._weights = {word: math.log(1 + (len(texts) - number + 0.5) / (number + 0.5))
                         for word, number in held.items()}
        self.bytes = sum(len(word.encode()) + 8 for counts in self._counts for word in counts)

    def best(self, question: str, count: int) -> list[int]:
        """Indices of the `count` best texts, best first."""
        words = [word for word in set(_words(question)) if word in self._weights]
        scores = []
        for counts, length in zip(self._counts, self._lengths, strict=True):
            norm = 1.5 * (0.25 + 0.75 * length / self._mean)
            scores.append(sum(self._weights[word] * counts[word] * 2.5 / (counts[word] + norm) for word in words))
        return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class Dense:
    """Nearest chunks by all-MiniLM-L6-v2, exact search."""

    def __init__(self, texts: Sequence[str], encoder: MiniLmEncoder) -> None:
        self._encoder = encoder
        self._vectors = encoder.embed(texts)
        self.bytes = int(self._vectors.nbytes)

    def best(self, question: str, count: int) -> list[int]:
        """Indices of the `count` best texts, best first."""
        scores = self._vectors @ self._encoder.embed([question])[0]
        return [int(i) for i in (-scores).argsort()[:count]]


@dataclass
class Outcome:
    """What one method did: per question (facts, exact, F1, context tokens), and what it took."""

    method: str
    answers: list[tuple[int, bool, float, int]] = field(default_factory=list)
    query_s: list[float] = field(default_factory=list)
    document_s: list[float] = field(default_factory=list)
    bytes_a_document: float = 0.0
    peak_mib: float = 0.0

    def exact(self, facts: int | None = None) -> float:
        """Share of exact answers, of the documents with so many facts or of all."""
        return statistics.mean(one[1] for one in self.answers if facts in (None, one[0]))

    def row(self, facts: Sequence[int]) -> dict[str, Any]:
        """The figures of the table."""
        return {"method": self.method, "questions": len(self.answers), "exact_match": self.exact(),
                "exact_match_by_facts": {str(number): self.exact(number) for number in facts},
                "f1": statistics.mean(one[2] for one in self.answers),
                "seconds_per_query": statistics.median(self.query_s),
                "seconds_per_document": statistics.median(self.document_s) if self.document_s else 0.0,
                "context_tokens_per_query": statistics.mean(one[3] for one in self.answers),
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


def _retrieved(index: Bm25 | Dense, chunks: Sequence[str], count: int) -> Context:
    """The best chunks; the very best stands last, next to the question."""
    return lambda item, question: "\n\n".join(chunks[i] for i in reversed(index.best(question, count)))


class Benchmark:
    """The methods on one base, one checkpoint and one set of documents."""

    def __init__(self, generator: HypernetGenerator, items: Sequence[Item], timed: int, answer_tokens: int,
                 distill: DistillSettings, refine: DistillSettings) -> None:
        self.generator, self.items, self.timed, self.answer_tokens = generator, items, timed, answer_tokens
        self.base, self.tokenizer = generator.base, generator.tokenizer
        self.ends = end_tokens(self.base, self.tokenizer)
        self.distill, self.refine = distill, refine
        self.distiller = Distiller(self.base, self.tokenizer)
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Every method in turn."""
        self.prompted("base", lambda item, question: "")
        self.prompted("document in context", lambda item, question: item.text)
        self.retrieval()
        made = self.adapters("hypernet", lambda i, item: self._generated(item))
        sources = {"questions by templates": False}
        if all(item.training for item in self.items):
            sources["questions of the corpus"] = True
        for source, corpus in sources.items():
            for steps in REFINE_STEPS:
                self.adapters(f"hypernet + refine {steps} ({source})", self._trained(self.refine, steps, corpus, made),
                              self._hypernet_s)
            for steps in DISTILL_STEPS:
                self.adapters(f"distill {steps} ({source})", self._trained(self.distill, steps, corpus, None))

    def _generated(self, item: Item) -> LoraAdapter:
        """The document's adapter; parts of a long one are joined, which only an engine's rank cap forbids."""
        parts = [part.lora for part in self.generator.generate([item.document])[0].parts]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    @property
    def _hypernet_s(self) -> float:
        return next(statistics.median(one.document_s) for one in self.outcomes if one.method == "hypernet")

    def _trained(self, settings: DistillSettings, steps: int, corpus: bool,
                 starts: Sequence[LoraAdapter] | None) -> Callable[[int, Item], LoraAdapter]:
        chosen = replace(settings, steps=steps, seconds=600.0)

        def make(i: int, item: Item) -> LoraAdapter:
            questions = item.training if corpus else ()
            start = starts[i] if starts else None
            return self.distiller.distill(item.document, questions, start, settings=chosen).lora
        return make

    def adapters(self, method: str, make: Callable[[int, Item], LoraAdapter],
                 extra: float = 0.0) -> list[LoraAdapter]:
        """A method that makes adapters: the questions are asked closed book. `extra` seconds were spent before."""
        outcome = Outcome(method)
        reset_peak(self.base.device)
        loras = []
        for i, item in enumerate(self.items):
            begun = time.perf_counter()
            loras.append(make(i, item))
            outcome.document_s.append(time.perf_counter() - begun + extra)
        with tempfile.TemporaryDirectory() as folder:
            for i, lora in enumerate(loras):
                lora.save(Path(folder) / str(i))
            sizes = [file.stat().st_size for file in Path(folder).glob("*/*")]
        outcome.bytes_a_document = sum(sizes) / len(self.items)
        for item, lora in zip(self.items, loras, strict=True):
            self._ask(outcome, item, lora, lambda item, question: "")
        self._finish(outcome)
        return loras

    def prompted(self, method: str, context: Context, index_bytes: float = 0.0, index_s: float | None = None) -> None:
        """A method that puts text into the prompt. `index_s` and `index_bytes` are an index' cost for a document."""
        outcome = Outcome(method, bytes_a_document=index_bytes, document_s=[] if index_s is None else [index_s])
        reset_peak(self.base.device)
        for item in self.items:
            self._ask(outcome, item, None, context)
        self._finish(outcome)

    def retrieval(self) -> None:
        """BM25 and dense retrieval over the chunks of all documents."""
        chunks = [chunk.text for item in self.items
                  for chunk in chunk_document(item.document, self.tokenizer, CHUNK_TOKENS, MAX_CHUNK_TOKENS, 10_000)]
        text_bytes = sum(len(chunk.encode()) for chunk in chunks)
        for name, count in product(("BM25", "MiniLM"), TOP_K):
            # An encoder keeps the vectors of texts that it has seen, so each method begins with a new one.
            encoder = MiniLmEncoder.load() if name == "MiniLM" else None
            begun = time.perf_counter()
            index: Bm25 | Dense = Dense(chunks, encoder) if encoder else Bm25(chunks)
            spent = (time.perf_counter() - begun) / len(self.items)
            self.prompted(f"retrieval {name}, top {count}", _retrieved(index, chunks, count),
                          (index.bytes + text_bytes) / len(self.items), spent)

    def _ask(self, outcome: Outcome, item: Item, lora: LoraAdapter | None, context: Context) -> None:
        if len(outcome.query_s) < self.timed:
            # One question alone, from its text to its answer, as a client would wait for it.
            begun = time.perf_counter()
            text = context(item, item.questions[0].text)
            self._answers([in_context(self.tokenizer, text, item.questions[0].text) if text
                           else closed_book(self.tokenizer, item.questions[0].text)], lora)
            outcome.query_s.append(time.perf_counter() - begun)
        prompts = []
        for question in item.questions:
            text = context(item, question.text)
            alone = closed_book(self.tokenizer, question.text)
            prompt = in_context(self.tokenizer, text, question.text) if text else alone
            prompts.append((prompt, len(prompt) - len(alone)))
        answers = self._answers([prompt for prompt, _ in prompts], lora)
        for question, answer, (_, extra) in zip(item.questions, answers, prompts, strict=True):
            outcome.answers.append((item.case.facts, exact_match(answer, question.answers),
                                    token_f1(answer, question.answers), extra))

    def _answers(self, prompts: Sequence[list[int]], lora: LoraAdapter | None) -> list[str]:
        if lora is None:
            found = answer_greedily(self.base, prompts, self.ends, self.answer_tokens)
        else:
            # One row of factors serves every row of the batch.
            factors = {name: (a.to(self.base.device, self.base.dtype), b.to(self.base.device, self.base.dtype))
                       for name, (a, b) in factors_of([lora] * len(prompts)).items()}
            with adapted(self.base, factors):
                found = answer_greedily(self.base, prompts, self.ends, self.answer_tokens)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer, _, _ in found]

    def _finish(self, outcome: Outcome) -> None:
        outcome.peak_mib = peak_mib(self.base.device)
        self.outcomes.append(outcome)
        print(f"{outcome.method}: {outcome.exact():.3f}", file=sys.stderr, flush=True)


def report(result: dict[str, Any]) -> str:
    """The Markdown tables."""
    rows, facts = result["methods"], result["facts"]
    full = next(row for row in rows if row["method"] == "document in context")
    lines = [f"Machine: {result['machine']}, {result['threads']} thread(s) of torch. Base: {result['base']}, "
             f"hypernetwork: {result['checkpoint']}. {result['documents']} documents, {full['questions']} questions, "
             f"greedy answers of at most {result['answer_tokens']} tokens. All settings are in the JSON file.", "",
             "Exact match of the whole answer; in brackets its ratio to the document in context.", "",
             "| method | all | " + " | ".join(f"{number} facts" for number in facts) + " | F1 |",
             "|---" * (len(facts) + 3) + "|"]
    for row in rows:
        cells = [_with_ratio(row["exact_match"], full["exact_match"])]
        cells += [_with_ratio(row["exact_match_by_facts"][str(number)], full["exact_match_by_facts"][str(number)])
                  for number in facts]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + f" | {_with_ratio(row['f1'], full['f1'])} |")
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


def _with_ratio(value: float, full: float) -> str:
    return f"{value:.3f} ({value / full:.2f})" if full else f"{value:.3f} (-)"


def main() -> None:
    """Measure and write `internalisation.md` and `internalisation.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=base_dir(), help="folder of the base; the shipped one by default")
    parser.add_argument("--checkpoint", type=Path, default=hypernet_dir(), help="folder of its hypernetwork")
    parser.add_argument("--documents", type=Path, help="JSON lines; held-out documents of the corpus by default")
    parser.add_argument("--count", type=int, default=50, help="documents of the corpus for each number of facts")
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
    if not items:
        parser.error("--documents: holds no document with a question that it answers")
    generator = HypernetGenerator.load(options.checkpoint, options.base)
    distill = replace(DistillSettings(), own_questions=options.own_questions)
    refine = replace(REFINE, own_questions=options.own_questions)
    benchmark = Benchmark(generator, items, options.timed, options.answer_tokens, distill, refine)
    benchmark.run()
    facts = sorted({item.case.facts for item in items})
    on_gpu = generator.base.device.type == "cuda"
    where = f"{torch.cuda.get_device_name()}" if on_gpu else machine()
    shipped = options.base == base_dir()
    result = {"machine": where, "threads": options.threads, "documents": len(items), "facts": facts,
              "base": "nano" if shipped else options.base.name,
              "checkpoint": "nano" if shipped else options.checkpoint.name, "answer_tokens": options.answer_tokens,
              "settings": {"refine": asdict(refine), "distill": asdict(distill)},
              "base_fingerprint": generator.base_fingerprint, "generator_fingerprint": generator.fingerprint,
              "methods": [outcome.row(facts) for outcome in benchmark.outcomes]}
    table = report(result)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "internalisation.md").write_text(table)
    (options.output / "internalisation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
