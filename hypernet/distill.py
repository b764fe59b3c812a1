"""The `distill` generator: documents to adapters by gradient steps, for bases without a hypernetwork."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.distill_loop import REFINE, Distilled, Distiller, DistillSettings
from hypernet.distill_questions import training_questions
from hypernet.documents import Chunk, DocumentText, chunk_document
from hypernet.encoder import load_base
from hypernet.fingerprint import fingerprint_folder
from hypernet.generate import ChunkInfo, GeneratedAdapter, GeneratedDocument
from hypernet.parts import PartLimits, group

__all__ = ["REFINE", "DistillCancelled", "DistillGenerator", "DistillSettings", "Distilled", "Distiller"]


class DistillCancelled(RuntimeError):
    """The caller's `cancelled` said so; nothing of the documents in hand is kept."""


class DistillGenerator:
    """A frozen base that is trained on each document, with the protocol of `HypernetGenerator`. Not thread-safe."""

    def __init__(self, base: Path, settings: DistillSettings | None = None, max_rank: int = 64,
                 chunks_per_part: int = 4, max_parts: int = 256) -> None:
        """Load the base. A part adapter is trained on `chunks_per_part` chunks of `context_tokens` tokens, at most.

        Raises OSError or FileNotFoundError where the folder holds no model, and ValueError where the settings' rank is
        above `max_rank`, another number is out of range, or the base has no chat template.
        """
        settings = settings or DistillSettings()
        if settings.rank > max_rank:
            raise ValueError(f"rank: is {settings.rank}; at most max_lora_rank {max_rank} is allowed")
        for name, value in (("chunks_per_part", chunks_per_part), ("max_parts", max_parts)):
            if value < 1:
                raise ValueError(f"{name}: is {value}; at least 1 is needed")
        self.base_fingerprint = fingerprint_folder(base)
        model, tokenizer = load_base(base)
        if not tokenizer.chat_template:
            raise ValueError(f"the base in {base} has no chat template, which questions and answers need")
        self.distiller = Distiller(model, tokenizer, settings)
        self.limits = PartLimits(chunks_per_part, max_parts)
        self.max_rank = max_rank
        described = json.dumps({"kind": "distill", "base": self.base_fingerprint, **asdict(settings)}, sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    @classmethod
    def load(cls, base: Path, settings: DistillSettings | None = None, max_rank: int = 64, chunks_per_part: int = 4,
             max_parts: int = 256, threads: int | None = None) -> DistillGenerator:
        """The generator, after limiting torch to `threads` threads where given."""
        if threads:
            torch.set_num_threads(threads)
        return cls(base, settings, max_rank, chunks_per_part, max_parts)

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base, whole."""
        return self.distiller.base

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer."""
        return self.distiller.tokenizer

    def plan(self, document: DocumentText) -> list[list[Chunk]]:
        """The chunks of each part adapter, in order. Raises DocumentError where the document is empty or too long."""
        tokens = self.distiller.context_tokens
        return group(chunk_document(document, self.tokenizer, tokens, tokens, self.limits.all_chunks), self.limits)

    def generate(self, documents: Sequence[DocumentText], plans: Sequence[list[list[Chunk]]] | None = None,
                 on_progress: Callable[[float], None] | None = None,
                 cancelled: Callable[[], bool] | None = None) -> list[GeneratedDocument]:
        """The part adapters of each document, one after the other. `plans` are what `plan` gave, where known already.

        `on_progress` gets the share done of all of them, 0 to 1. The settings' budget is for each part. Raises
        DistillCancelled once `cancelled` says so, and without plans DocumentError where a document is empty or too
        long.
        """
        plans = [self.plan(document) for document in documents] if plans is None else plans
        count = sum(len(plan) for plan in plans)
        done = 0

        def progress(share: float) -> None:
            if on_progress:
                on_progress((done + share) / count)
        found = []
        for document, plan in zip(documents, plans, strict=True):
            parts, first = [], 0
            for part in plan:
                parts.append(self._part(document, part, first, progress, cancelled or (lambda: False)))
                first += len(part)
                done += 1
            found.append(GeneratedDocument(parts))
        return found

    def _part(self, document: DocumentText, chunks: Sequence[Chunk], first: int, progress: Callable[[float], None],
              cancelled: Callable[[], bool]) -> GeneratedAdapter:
        settings = self.distiller.settings
        begun = time.perf_counter()
        exercises = training_questions(self.base, self.tokenizer, document, chunks, settings.questions,
                                       settings.wording, settings.own_questions)
        asked = time.perf_counter() - begun
        made = self.distiller.train(exercises, on_progress=progress, cancelled=cancelled)
        if made.stopped == "cancelled":
            raise DistillCancelled("distillation was cancelled")
        infos = [ChunkInfo(first + i, chunk.start, chunk.end,
                           len(self.tokenizer.encode(chunk.text, add_special_tokens=False)))
                 for i, chunk in enumerate(chunks)]
        return GeneratedAdapter(made.lora, infos, {"questions": asked, "distill": made.seconds})
