"""A hypernetwork that `imprint train` made, as the generator uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hypernet.adaptation.checkpoint import load_checkpoint
from hypernet.encoder import load_base, read
from hypernet.lora import LoraAdapter, concatenate
from hypernet.reader import CheckpointMismatch, adapter_of, pad

FRAME_SPARE = 4
"""Where frame and text meet, tokens may come out otherwise than alone."""


class TemplateReader:
    """Implements hypernet.reader.DocumentReader: a chunk is read in a user's turn of the base's chat template, as the
    checkpoint's configuration says."""

    def __init__(self, checkpoint: Path, base: Path, base_fingerprint: str) -> None:
        """Load both. Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError."""
        self.network, self.config = load_checkpoint(checkpoint)
        trained_for = self.network.config.base_fingerprint
        if trained_for != base_fingerprint:
            raise CheckpointMismatch(
                f"the hypernetwork in {checkpoint} was trained for {self.config.base_model} with fingerprint "
                f"{trained_for[:12]}, the base in {base} is {base_fingerprint[:12]}")
        self.base, self.tokenizer = load_base(base)
        self.max_tokens = self.network.config.max_tokens - len(self.frame("")) - FRAME_SPARE
        self.chunk_tokens = min(self.network.config.chunk_tokens, self.max_tokens)
        self.chunks_per_part = self.network.config.chunks_per_part

    def rank(self, chunks: int) -> int:
        """See DocumentReader."""
        return chunks * self.network.config.rank

    def frame(self, text: str) -> list[int]:
        """See DocumentReader."""
        whole = self.config.frame.before + text.strip() + self.config.frame.after
        return list(self.tokenizer.encode(whole, add_special_tokens=False))

    @torch.no_grad()
    def adapters(self, chunks: Sequence[list[int]]) -> list[LoraAdapter]:
        """See DocumentReader."""
        tokens, mask = pad(chunks)
        factors = self.network(read(self.base, tokens, mask), mask)
        return [adapter_of(factors, i, 1.0, self.config.base_model) for i in range(len(chunks))]

    def join(self, parts: Sequence[LoraAdapter]) -> LoraAdapter:
        """See DocumentReader."""
        return concatenate(list(parts))
