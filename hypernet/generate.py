"""Documents to adapters with a hypernetwork: chunks of several documents go through one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.adaptation.checkpoint import FORMAT as PERCEIVER
from hypernet.adaptation.reader import TemplateReader
from hypernet.documents import Chunk, DocumentText, DocumentTooLong, chunk_document
from hypernet.fingerprint import fingerprint_folder
from hypernet.lora import LoraAdapter
from hypernet.merge import truncate
from hypernet.padding import batches
from hypernet.parts import LongDocuments, PartLimits, group
from hypernet.published.folder import DOC_TO_LORA, TEXT_TO_LORA, format_of
from hypernet.published.reader import DocToLoraReader
from hypernet.reader import CheckpointMismatch, DocumentReader, NativeReader

__all__ = ["CheckpointMismatch", "ChunkInfo", "GeneratedAdapter", "GeneratedDocument", "HypernetGenerator",
           "open_reader"]

BATCH_TOKENS = 8192
"""Padded tokens in one pass, at most, unless a single chunk has more. Activations of all layers of a 2B base take a
quarter of a megabyte for each."""
MAX_SPREAD = 2.0
"""How many times its shortest chunk's tokens the longest of a pass may have. Padding to more costs more time on a CPU
than passes of their own."""


@dataclass(frozen=True)
class ChunkInfo:
    """What a chunk covers: its place in the document, the span of its text in characters, its length in tokens."""

    index: int
    start: int
    end: int
    tokens: int


@dataclass(frozen=True)
class GeneratedAdapter:
    """An adapter, the chunks that it was made from, and how long the stages of its batch took.

    `kept_energy` is the share (0..1) of the update's Frobenius norm that was kept where chunks were merged past the
    rank cap, and None where nothing had to be left out.
    """

    lora: LoraAdapter
    chunks: list[ChunkInfo]
    seconds: dict[str, float]
    kept_energy: float | None = None


@dataclass(frozen=True)
class GeneratedDocument:
    """The part adapters of a document, in the order of its text; most documents have one."""

    parts: list[GeneratedAdapter]


def open_reader(checkpoint: Path, base: Path, base_fingerprint: str) -> DocumentReader:
    """The hypernetwork in a folder, of whichever kind it is, with its base.

    Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError.
    """
    kind = format_of(checkpoint)
    if kind == DOC_TO_LORA:
        return DocToLoraReader(checkpoint, base, base_fingerprint)
    if kind == TEXT_TO_LORA:
        raise CheckpointMismatch(f"{checkpoint} holds a Text-to-LoRA network, which makes adapters of task "
                                 "descriptions; documents need a Doc-to-LoRA network or one of this project's own kind")
    if kind == PERCEIVER:
        return TemplateReader(checkpoint, base, base_fingerprint)
    if kind:
        raise CheckpointMismatch(f"{checkpoint} holds a checkpoint of the format '{kind}', which this version cannot "
                                 "run")
    return NativeReader(checkpoint, base, base_fingerprint)


class HypernetGenerator:
    """A hypernetwork with its frozen base. `generate` is not thread-safe."""

    def __init__(self, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16,
                 chunks_per_part: int | None = None, max_parts: int = 256,
                 long_documents: LongDocuments = "parts") -> None:
        """Load both. A part has at most `chunks_per_part` chunks. None: as many as the checkpoint says, else as many as
        `max_rank` holds.

        With `long_documents` "merge" all chunks go into one adapter, which past `max_rank` is cut down to it; the most
        chunks of a document are the same. Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError, OSError, or
        ValueError for a setting out of range.
        """
        if long_documents not in get_args(LongDocuments):
            raise ValueError(f"long_documents: is '{long_documents}'; {list(get_args(LongDocuments))} are allowed")
        for name, value in (("batch_chunks", batch_chunks), ("max_parts", max_parts)):
            if value < 1:
                raise ValueError(f"{name}: is {value}; at least 1 is needed")
        self.base_fingerprint = fingerprint_folder(base)
        self.reader = open_reader(checkpoint, base, self.base_fingerprint)
        self.fingerprint = fingerprint_folder(checkpoint)
        first, second = self.reader.rank(1), self.reader.rank(2)
        if max_rank < first:
            raise CheckpointMismatch(f"max_lora_rank {max_rank} is below {first}, the hypernetwork's rank for one "
                                     "chunk")
        most = 1 + (max_rank - first) // (second - first)
        if chunks_per_part is not None and not 1 <= chunks_per_part <= most:
            raise ValueError(f"chunks_per_part: is {chunks_per_part}; 1 to {most} are allowed, since max_lora_rank "
                             f"{max_rank} holds no more of this hypernetwork's chunks")
        wanted = chunks_per_part or self.reader.chunks_per_part
        self.limits = PartLimits(most if wanted is None else min(wanted, most), max_parts)
        self.long_documents = long_documents
        self.max_rank = max_rank
        self.batch_chunks = batch_chunks

    @classmethod
    def load(cls, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16,
             chunks_per_part: int | None = None, max_parts: int = 256, long_documents: LongDocuments = "parts",
             threads: int | None = None) -> HypernetGenerator:
        """The generator, after limiting torch to `threads` threads where given."""
        if threads:
            torch.set_num_threads(threads)
        return cls(checkpoint, base, max_rank, batch_chunks, chunks_per_part, max_parts, long_documents)

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base, whole."""
        return self.reader.base

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer."""
        return self.reader.tokenizer

    def plan(self, document: DocumentText) -> list[list[Chunk]]:
        """The chunks of each part adapter, in order. Raises DocumentError where the document is empty or too long."""
        reader = self.reader
        try:
            chunks = chunk_document(document, reader.tokenizer, reader.chunk_tokens, reader.max_tokens,
                                    self.limits.all_chunks)
        except DocumentTooLong as error:
            raise DocumentTooLong(f"{error}; a document may have {self.limits.parts} parts of {self.limits.chunks} "
                                  "chunks") from error
        return [chunks] if self.long_documents == "merge" else group(chunks, self.limits)

    def generate(self, documents: Sequence[DocumentText],
                 plans: Sequence[list[list[Chunk]]] | None = None) -> list[GeneratedDocument]:
        """The part adapters of each document. `plans` are what `plan` gave for each of them, where known already.

        Without them it raises DocumentError where a document is empty or too long.
        """
        seconds = {}
        if plans is None:
            begun = time.perf_counter()
            plans = [self.plan(document) for document in documents]
            seconds["chunk"] = time.perf_counter() - begun
        begun = time.perf_counter()
        ids = [self.reader.frame(chunk.text) for plan in plans for part in plan for chunk in part]
        made = iter(zip(ids, self._in_batches(ids), strict=True))
        seconds["hypernetwork"] = time.perf_counter() - begun
        return [GeneratedDocument(self._parts(plan, made, seconds)) for plan in plans]

    def _parts(self, plan: list[list[Chunk]], made: Iterator[tuple[list[int], LoraAdapter]],
               seconds: dict[str, float]) -> list[GeneratedAdapter]:
        """The part adapters of one document from its chunks' tokens and adapters, which come next in `made`."""
        parts = []
        index = 0
        for part in plan:
            infos, adapters = [], []
            for chunk in part:
                ids, adapter = next(made)
                infos.append(ChunkInfo(index, chunk.start, chunk.end, len(ids)))
                adapters.append(adapter)
                index += 1
            begun = time.perf_counter()
            whole = self.reader.join(adapters)
            lora, kept = truncate(whole, self.max_rank)
            spent = {**seconds, "join": time.perf_counter() - begun}
            parts.append(GeneratedAdapter(lora, infos, spent, None if lora is whole else kept))
        return parts

    def _in_batches(self, ids: list[list[int]]) -> list[LoraAdapter]:
        """The adapter of each chunk, in their order; only chunks of like length share a pass."""
        made: dict[int, LoraAdapter] = {}
        for batch in batches([len(row) for row in ids], BATCH_TOKENS, self.batch_chunks, MAX_SPREAD):
            made.update(zip(batch, self.reader.adapters([ids[i] for i in batch]), strict=True))
        return [made[i] for i in range(len(ids))]
