"""The shipped nano pair in torch alone: part adapters of documents, and greedy answers in batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from benchmarks.parts import Divided
from hypernet.answers import answer_together, end_tokens
from hypernet.documents import DocumentText
from hypernet.generate import HypernetGenerator
from hypernet.inject import adapted
from hypernet.lora import LoraAdapter, factors_of
from hypernet.nano import base_dir, hypernet_dir
from hypernet.prompts import closed_book, in_context

RANK_CAP = 64
BATCH = 32
ANSWER_TOKENS = 40

Prompt = str | tuple[str, str]
"""A question alone, or a document's text and a question on it."""


class Pair:
    """An adapter for any text, and greedy answers with any adapters in one batch."""

    def __init__(self) -> None:
        self.generator = HypernetGenerator.load(hypernet_dir(), base_dir(), max_rank=RANK_CAP)

    def adapters(self, texts: Sequence[str]) -> list[LoraAdapter]:
        """The adapter of each text read as one chunk."""
        reader = self.generator.reader
        ids = [reader.frame(text) for text in texts]
        return [adapter for first in range(0, len(ids), BATCH) for adapter in reader.adapters(ids[first:first + BATCH])]

    def documents(self, documents: Sequence[DocumentText]) -> tuple[list[Divided], list[list[LoraAdapter]]]:
        """Each document's parts as the server would make them, and their adapters."""
        plans = [self.generator.plan(document) for document in documents]
        made = self.generator.generate(documents, plans)
        divided = [Divided.by_plan(document, plan) for document, plan in zip(documents, plans, strict=True)]
        return divided, [[part.lora for part in one.parts] for one in made]

    def ask(self, prompts: Sequence[Prompt], adapters: Sequence[LoraAdapter | None]) -> list[str]:
        """The greedy answer to each prompt with the adapter beside it, or with none."""
        base, tokenizer = self.generator.base, self.generator.tokenizer
        ends = end_tokens(base, tokenizer)
        ids = [closed_book(tokenizer, prompt) if isinstance(prompt, str) else in_context(tokenizer, *prompt)
               for prompt in prompts]
        # Rows of a batch are of like length, and all of them have an adapter or none has.
        order = sorted(range(len(ids)), key=lambda i: (adapters[i] is None, len(ids[i])))
        answers: dict[int, str] = {}
        while order:
            alone = adapters[order[0]] is None
            rows = [i for i in order[:BATCH] if (adapters[i] is None) == alone]
            order = order[len(rows):]
            on = [adapter for i in rows if (adapter := adapters[i]) is not None]
            with adapted(base, factors_of(on)) if on else nullcontext():
                made = answer_together(base, [ids[i] for i in rows], ends, ANSWER_TOKENS)
            answers.update(zip(rows, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True))
        return [answers[i].strip() for i in range(len(ids))]
