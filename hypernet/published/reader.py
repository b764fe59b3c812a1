"""A converted Doc-to-LoRA network as the generator uses it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hypernet.encoder import load_base
from hypernet.inject import targets_of
from hypernet.lora import LoraAdapter, concatenate
from hypernet.perceiver import Target
from hypernet.published.activations import ActivationReader
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.folder import DocToLoraConfig, load_doc_to_lora
from hypernet.published.frames import frame_for
from hypernet.reader import CheckpointMismatch, adapter_of, pad

logger = logging.getLogger(__name__)


class DocToLoraReader:
    """Implements hypernet.reader.DocumentReader. Adapters of K chunks have rank (K + 1) r: the bias adapter is added
    once."""

    def __init__(self, checkpoint: Path, base: Path, base_fingerprint: str) -> None:
        """Load both. Raises CheckpointMismatch, CheckpointInvalid, FileNotFoundError or OSError."""
        self.network, self.config = load_doc_to_lora(checkpoint)
        check_base(self.config, base, base_fingerprint)
        self.base, self.tokenizer = load_base(base)
        self._activations = ActivationReader(self.base, self.config.reading)
        try:
            self._frame = frame_for(self.config.base_model, self.tokenizer)
        except CheckpointInvalid as error:
            raise CheckpointMismatch(str(error)) from error
        room = min(self.config.reading.max_tokens, self.base.config.max_position_embeddings)
        # Where frame and text meet, tokens may come out otherwise than alone; hence a few to spare.
        self.max_tokens = room - len(self.frame("")) - 4
        if self.max_tokens < 1:
            raise CheckpointMismatch(f"the base in {base} reads {room} tokens at once, which is less than the chat "
                                     "turn around a document")
        self.chunk_tokens = min(self.config.reading.chunk_tokens, self.max_tokens)
        bias = self.network.bias()
        self._bias = adapter_of(bias, 0, self.config.scaling, self.config.base_model) if self.config.use_bias else None

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
        tokens, mask = pad(chunks)
        factors = self.network(self._activations.read(tokens, mask), mask)
        return [adapter_of(factors, i, self.config.scaling, self.config.base_model) for i in range(len(chunks))]

    def join(self, parts: Sequence[LoraAdapter]) -> LoraAdapter:
        """See DocumentReader."""
        return concatenate([*parts, self._bias] if self._bias else list(parts))


def check_base(config: DocToLoraConfig, base: Path, base_fingerprint: str) -> None:
    """Compare fingerprints where the checkpoint has one, else names where the folder tells one; and sizes always.

    Raises CheckpointMismatch with what the checkpoint is for and what the base is.
    """
    name = hub_name(base)
    if config.base_fingerprint:
        if config.base_fingerprint != base_fingerprint:
            raise CheckpointMismatch(
                f"the checkpoint is for {config.base_model} with fingerprint {config.base_fingerprint[:12]}, the base "
                f"in {base} is {base_fingerprint[:12]}")
    elif name and _last(name) != _last(config.base_model):
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model}, the base is {name}")
    elif not name:
        logger.warning("the checkpoint is for %s; whether %s is that base can be told by its sizes only",
                       config.base_model, base)
    wanted = (config.sizes.layers, config.sizes.features, config.sizes.targets)
    found = _sizes(config, base)
    if found != wanted:
        described = [f"{layers} layers of width {width}, "
                     + ", ".join(f"{target.name} {target.d_in} to {target.d_out}" for target in targets)
                     for layers, width, targets in (wanted, found)]
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model} ({described[0]}), the base in "
                                 f"{name or base} has {described[1]}")


def _sizes(config: DocToLoraConfig, base: Path) -> tuple[int, int, tuple[Target, ...]]:
    shape = AutoConfig.from_pretrained(base)
    # Without weights: a wrong base is to be refused before gigabytes are read.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    try:
        targets = targets_of(model, tuple(target.name for target in config.sizes.targets))
        return shape.num_hidden_layers, shape.hidden_size, targets
    except AttributeError as error:
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model}; the base in {base} is a "
                                 f"{type(model).__name__}, which has other parts: {error}") from error


def hub_name(base: Path) -> str:
    """The name of a base that lies in Hugging Face's cache ("google/gemma-2-2b-it"); empty for any other folder."""
    for part in reversed(base.parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return ""


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
