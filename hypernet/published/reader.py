"""A converted Doc-to-LoRA network as the generator uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hypernet.encoder import load_base
from hypernet.inject import layers_path
from hypernet.lora import LoraAdapter, concatenate
from hypernet.padding import pad
from hypernet.perceiver import Factors
from hypernet.published.activations import ActivationReader
from hypernet.published.bases import check_base
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.folder import load_doc_to_lora
from hypernet.published.frames import frame_for
from hypernet.reader import CheckpointMismatch, adapter_of


class DocToLoraReader:
    """Implements hypernet.reader.DocumentReader. Adapters of K chunks have rank (K + 1) r: the bias adapter is added
    once."""

    chunks_per_part: int | None = None

    def __init__(self, checkpoint: Path, base: Path, base_fingerprint: str) -> None:
        """Load both: on a GPU, where there is one, the base in bfloat16 and the network in float32.

        Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError.
        """
        self.network, self.config = load_doc_to_lora(checkpoint)
        check_base(self.config, base, base_fingerprint)
        # A replica without a share of a GPU sees none.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base, self.tokenizer = load_base(base, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
        self.network.to(device)
        self._activations = ActivationReader(self.base, self.config.reading)
        try:
            self._frame = frame_for(self.config.base_model, self.tokenizer)
        except CheckpointInvalid as error:
            raise CheckpointMismatch(str(error)) from error
        text: Any = self.base.config.get_text_config(decoder=True)
        room = min(self.config.reading.max_tokens, text.max_position_embeddings)
        # Where frame and text meet, tokens may come out otherwise than alone; hence a few to spare.
        self.max_tokens = room - len(self.frame("")) - 4
        if self.max_tokens < 1:
            raise CheckpointMismatch(f"the base in {base} reads {room} tokens at once, which is less than the chat "
                                     "turn around a document")
        self.chunk_tokens = min(self.config.reading.chunk_tokens, self.max_tokens)
        self._layers = layers_path(self.base)
        self._bias = self._adapter(self.network.bias(), 0) if self.config.use_bias else None

    def rank(self, chunks: int) -> int:
        """See DocumentReader."""
        return chunks * self.config.chunk_rank + self.config.fixed_rank

    def frame(self, text: str) -> list[int]:
        """See DocumentReader."""
        whole = self._frame.before + text.strip() + self._frame.after
        return self.tokenizer.encode(whole, add_special_tokens=False)

    @torch.no_grad()
    def adapters(self, chunks: Sequence[list[int]]) -> list[LoraAdapter]:
        """See DocumentReader."""
        tokens, mask = pad(chunks, self.base.device)
        factors = self.network(self._activations.read(tokens, mask), mask)
        return [self._adapter(factors, i) for i in range(len(chunks))]

    def join(self, parts: Sequence[LoraAdapter]) -> LoraAdapter:
        """See DocumentReader."""
        return concatenate([*parts, self._bias] if self._bias else list(parts))

    def _adapter(self, factors: Factors, i: int) -> LoraAdapter:
        row = {name: (a[i:i + 1].cpu(), b[i:i + 1].cpu()) for name, (a, b) in factors.items()}
        return adapter_of(row, 0, self.config.scaling, self.config.base_model).placed(self._layers)
