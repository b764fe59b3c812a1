"""What the generator needs of a hypernetwork that reads documents, and the project's own kind of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.encoder import load_base, read
from hypernet.inject import module_path
from hypernet.lora import LoraAdapter, concatenate
from hypernet.padding import pad
from hypernet.perceiver import Factors, Hypernetwork


class CheckpointMismatch(ValueError):
    """The hypernetwork was made for another base, or for another use."""


class DocumentReader(Protocol):
    """A hypernetwork with its frozen base: chunks of documents in, adapters out. Not thread-safe.

    A chunk has about `chunk_tokens` tokens where a document is cut, and at most `max_tokens`, without the frame that
    `frame` puts around it. `chunks_per_part` is how many chunks it is best to join in one adapter, None: as many as the
    rank cap allows.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    chunk_tokens: int
    max_tokens: int
    chunks_per_part: int | None

    def rank(self, chunks: int) -> int:
        """The rank of an adapter that `join` makes of so many chunks."""
        ...

    def frame(self, text: str) -> list[int]:
        """The chunk's tokens as the network was trained to read them."""
        ...

    def adapters(self, chunks: Sequence[list[int]]) -> list[LoraAdapter]:
        """The adapter of each framed chunk, in one pass."""
        ...

    def join(self, parts: Sequence[LoraAdapter]) -> LoraAdapter:
        """One adapter of a document's chunks."""
        ...


def adapter_of(factors: Factors, i: int, scaling: float, base_model: str) -> LoraAdapter:
    """Row `i` of A `[B, L, r, d_in]` and B `[B, L, r, d_out]` as an adapter whose update is `scaling * B^T A`."""
    tensors, rank = {}, 0
    for name, (a, b) in factors.items():
        rank = a.size(2)
        for layer in range(a.size(1)):
            # Clones: a view would keep the whole batch alive.
            tensors[module_path(layer, name)] = (a[i, layer].clone(), b[i, layer].mT.contiguous().clone())
    return LoraAdapter(rank, scaling * rank, tensors, base_model)


class PerceiverReader(ABC):
    """Implements DocumentReader but for `frame`, for the networks of `hypernet.perceiver`. `base_model` names the base
    in the adapters."""

    def __init__(self, network: Hypernetwork, base: Path, base_model: str) -> None:
        """Load the base. Raises OSError."""
        self.network, self.base_model = network, base_model
        self.base, self.tokenizer = load_base(base)
        self.max_tokens = network.config.max_tokens
        self.chunk_tokens = network.config.chunk_tokens
        self.chunks_per_part = network.config.chunks_per_part

    def rank(self, chunks: int) -> int:
        """See DocumentReader."""
        return chunks * self.network.config.rank

    @abstractmethod
    def frame(self, text: str) -> list[int]:
        """See DocumentReader."""

    @torch.no_grad()
    def adapters(self, chunks: Sequence[list[int]]) -> list[LoraAdapter]:
        """See DocumentReader."""
        tokens, mask = pad(chunks)
        factors = self.network(read(self.base, tokens, mask), mask)
        return [adapter_of(factors, i, 1.0, self.base_model) for i in range(len(chunks))]

    def join(self, parts: Sequence[LoraAdapter]) -> LoraAdapter:
        """See DocumentReader."""
        return concatenate(list(parts))


class NativeReader(PerceiverReader):
    """A hypernetwork of this project's own kind, which reads a chunk at the start of an open user turn."""

    def __init__(self, checkpoint: Path, base: Path, base_fingerprint: str) -> None:
        """Load both. Raises CheckpointMismatch, FileNotFoundError or OSError."""
        network = Hypernetwork.load(checkpoint)
        trained_for = network.config.base_fingerprint
        if trained_for != base_fingerprint:
            raise CheckpointMismatch(f"the hypernetwork in {checkpoint} was trained for base {trained_for[:12]}, "
                                     f"the base in {base} is {base_fingerprint[:12]}")
        super().__init__(network, base, "nano")
        # Two tokens belong to the frame around the text, and joining texts may add a few.
        self.max_tokens -= 8

    def frame(self, text: str) -> list[int]:
        """See DocumentReader."""
        user = self.tokenizer.convert_tokens_to_ids("<|user|>")
        return [user, *self.tokenizer.encode(text.strip() + "\n\n", add_special_tokens=False)]
