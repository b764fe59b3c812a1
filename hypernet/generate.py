"""Documents to adapters with the hypernetwork: chunks of several documents go through one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hypernet.documents import Chunk, DocumentText, chunk_document
from hypernet.encoder import load_base, read
from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import module_path
from hypernet.lora import LoraAdapter, concatenate
from hypernet.perceiver import Factors, Hypernetwork


class CheckpointMismatch(ValueError):
    """The hypernetwork was trained for another base."""


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


class HypernetGenerator:
    """A hypernetwork with its frozen base. `generate` is not thread-safe."""

    def __init__(self, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16) -> None:
        """Load both. Raises CheckpointMismatch, FileNotFoundError or OSError."""
        self.base_fingerprint = fingerprint_folder(base)
        self.fingerprint = fingerprint_folder(checkpoint)
        self.network = Hypernetwork.load(checkpoint)
        trained_for = self.network.config.base_fingerprint
        if trained_for != self.base_fingerprint:
            raise CheckpointMismatch(f"the hypernetwork in {checkpoint} was trained for base {trained_for[:12]}, "
                                     f"the base in {base} is {self.base_fingerprint[:12]}")
        self.base, self.tokenizer = load_base(base)
        self.max_chunks = max_rank // self.network.config.rank
        if self.max_chunks < 1:
            raise CheckpointMismatch(f"max_lora_rank {max_rank} is below the hypernetwork's rank "
                                     f"{self.network.config.rank}")
        self.batch_chunks = batch_chunks
        self._base_name = str(base)

    @classmethod
    def load(cls, checkpoint: Path, base: Path, max_rank: int = 64, batch_chunks: int = 16,
             threads: int | None = None) -> HypernetGenerator:
        """The generator, after limiting torch to `threads` threads where given."""
        if threads:
            torch.set_num_threads(threads)
        return cls(checkpoint, base, max_rank, batch_chunks)

    def chunk(self, document: DocumentText) -> list[Chunk]:
        """The chunks of a document. Raises DocumentError where it is empty or too long."""
        config = self.network.config
        # Two tokens belong to the frame around the text.
        return chunk_document(document, self.tokenizer, config.chunk_tokens, config.max_tokens - 8, self.max_chunks)

    def generate(self, documents: Sequence[DocumentText]) -> list[GeneratedAdapter]:
        """An adapter for each document. Raises DocumentError where one is empty or too long: check with `chunk`."""
        begun = time.perf_counter()
        chunks = [self.chunk(document) for document in documents]
        chunked = time.perf_counter()
        flat = [chunk for part in chunks for chunk in part]
        ids = [self._ids(chunk.text) for chunk in flat]
        parts: list[LoraAdapter] = [None] * len(flat)  # type: ignore[list-item]
        order = sorted(range(len(flat)), key=lambda i: len(ids[i]))
        for at in range(0, len(order), self.batch_chunks):
            batch = order[at:at + self.batch_chunks]
            for i, adapter in zip(batch, self._pass([ids[i] for i in batch]), strict=True):
                parts[i] = adapter
        seconds = {"chunk": chunked - begun, "hypernetwork": time.perf_counter() - chunked}
        found, at = [], 0
        for part in chunks:
            own = parts[at:at + len(part)]
            infos = [ChunkInfo(i, chunk.start, chunk.end, len(ids[at + i])) for i, chunk in enumerate(part)]
            found.append(GeneratedAdapter(concatenate(own), infos, seconds))
            at += len(part)
        return found

    def _ids(self, text: str) -> list[int]:
        """The chunk as the hypernetwork was trained to read it: at the start of an open user turn."""
        user = self.tokenizer.convert_tokens_to_ids("<|user|>")
        return [user, *self.tokenizer.encode(text.strip() + "\n\n", add_special_tokens=False)]

    @torch.no_grad()
    def _pass(self, ids: list[list[int]]) -> list[LoraAdapter]:
        length = max(map(len, ids))
        tokens = torch.zeros((len(ids), length), dtype=torch.long)
        mask = torch.zeros((len(ids), length), dtype=torch.bool)
        for i, row in enumerate(ids):
            tokens[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = True
        factors = self.network(read(self.base, tokens, mask), mask)
        return [self._export(factors, i) for i in range(len(ids))]

    def _export(self, factors: Factors, i: int) -> LoraAdapter:
        rank = self.network.config.rank
        tensors = {}
        for name, (a, b) in factors.items():
            for layer in range(a.size(1)):
                # Clones: a view would keep the whole batch alive.
                tensors[module_path(layer, name)] = (a[i, layer].clone(), b[i, layer].mT.contiguous().clone())
        return LoraAdapter(rank, float(rank), tensors, "nano")
