"""Documents to adapters with a hypernetwork: chunks of several documents go through one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.documents import Chunk, DocumentText, chunk_document
from hypernet.fingerprint import fingerprint_folder
from hypernet.lora import LoraAdapter
from hypernet.published.folder import DOC_TO_LORA, TEXT_TO_LORA, format_of
from hypernet.published.reader import DocToLoraReader
from hypernet.reader import CheckpointMismatch, DocumentReader, NativeReader

__all__ = ["CheckpointMismatch", "ChunkInfo", "GeneratedAdapter", "HypernetGenerator", "open_reader"]

BATCH_TOKENS = 8192
"""Padded tokens in one pass, at most, unless a single chunk has more. Activations of all layers of a 2B base take a
quarter of a megabyte for each."""


@dataclass(frozen=True)
class ChunkInfo:
    """What a chunk of a document covers: the span of its text in characters, and its length in tokens."""

    index: int
    start: int
    end: int
    tokens: int


@dataclass(frozen=True)
class GeneratedAdapter:
    """An adapter, the chunks that it was made from, and how long the stages of its batch took."""

    lora: LoraAdapter
    chunks: list[ChunkInfo]
    seconds: dict[str, float]


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
    if kind:
        raise CheckpointMismatch(f"{checkpoint} holds a checkpoint of the format '{kind}', which this version cannot "
                                 "run")
    return NativeReader(checkpoint, base, base_fingerprint)


class HypernetGenerator:
    """A hypernetwork with its frozen base. `generate` is not thread-safe."""

    def __init__(self, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16) -> None:
        """Load both. Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError."""
        self.base_fingerprint = fingerprint_folder(base)
        self.reader = open_reader(checkpoint, base, self.base_fingerprint)
        self.fingerprint = fingerprint_folder(checkpoint)
        first, second = self.reader.rank(1), self.reader.rank(2)
        if max_rank < first:
            raise CheckpointMismatch(f"max_lora_rank {max_rank} is below {first}, the hypernetwork's rank for one "
                                     "chunk")
        self.max_chunks = 1 + (max_rank - first) // (second - first)
        self.batch_chunks = batch_chunks

    @classmethod
    def load(cls, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16,
             threads: int | None = None) -> HypernetGenerator:
        """The generator, after limiting torch to `threads` threads where given."""
        if threads:
            torch.set_num_threads(threads)
        return cls(checkpoint, base, max_rank, batch_chunks)

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base, whole."""
        return self.reader.base

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer."""
        return self.reader.tokenizer

    def chunk(self, document: DocumentText) -> list[Chunk]:
        """The chunks of a document. Raises DocumentError where it is empty or too long."""
        reader = self.reader
        return chunk_document(document, reader.tokenizer, reader.chunk_tokens, reader.max_tokens, self.max_chunks)

    def generate(self, documents: Sequence[DocumentText],
                 chunks: Sequence[list[Chunk]] | None = None) -> list[GeneratedAdapter]:
        """An adapter for each document. `chunks` are what `chunk` gave for each of them, where that is known already.

        Without them it raises DocumentError where a document is empty or too long.
        """
        seconds = {}
        if chunks is None:
            begun = time.perf_counter()
            chunks = [self.chunk(document) for document in documents]
            seconds["chunk"] = time.perf_counter() - begun
        begun = time.perf_counter()
        ids = [self.reader.frame(chunk.text) for part in chunks for chunk in part]
        parts = self._in_batches(ids)
        seconds["hypernetwork"] = time.perf_counter() - begun
        found, at = [], 0
        for part in chunks:
            infos = [ChunkInfo(i, chunk.start, chunk.end, len(ids[at + i])) for i, chunk in enumerate(part)]
            found.append(GeneratedAdapter(self.reader.join(parts[at:at + len(part)]), infos, seconds))
            at += len(part)
        return found

    def _in_batches(self, ids: list[list[int]]) -> list[LoraAdapter]:
        """The adapter of each chunk; chunks of like length share a pass, which wastes the least on padding."""
        parts: dict[int, LoraAdapter] = {}
        batch: list[int] = []
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            # Ascending lengths: all are padded to that of the last one.
            if len(batch) == self.batch_chunks or (batch and (len(batch) + 1) * len(ids[i]) > BATCH_TOKENS):
                parts.update(self._batch(batch, ids))
                batch = []
            batch.append(i)
        if batch:
            parts.update(self._batch(batch, ids))
        return [parts[i] for i in range(len(ids))]

    def _batch(self, batch: list[int], ids: list[list[int]]) -> Iterator[tuple[int, LoraAdapter]]:
        return zip(batch, self.reader.adapters([ids[i] for i in batch]), strict=True)
