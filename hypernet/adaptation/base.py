"""The frozen base in training: reads documents, answers questions, gives logits with and without an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypernet.adaptation.settings import TrainingInputError
from hypernet.answers import answer_greedily, end_tokens
from hypernet.encoder import load_base, read
from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import adapted, targets_of
from hypernet.padding import pad
from hypernet.perceiver import Factors, Hypernetwork, Target
from hypernet.published.bases import hub_name
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.frames import Frame, frame_for
from hypernet.training.precision import bfloat16_is_faster

_BATCH_TOKENS = 16_384
"""Padded tokens of prompts that are answered at once, at most, unless a single one has more."""


@dataclass(frozen=True)
class Row:
    """Token IDs of a prompt and of the answer that follows it."""

    prompt: list[int]
    answer: list[int]


def base_folder(name: str) -> Path:
    """The folder of a base: a path, "nano", or a Hugging Face name that lies in the local cache.

    Raises TrainingInputError.
    """
    if name == "nano":
        from hypernet.nano import base_dir

        return base_dir()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise TrainingInputError(f"base: '{name}' is neither a folder nor a model in Hugging Face's local cache; give "
                                 f"a folder, or run `hf download {name}` first") from error


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingInputError("device: is 'cuda', and no GPU can be used here; 'cpu' or 'auto' are allowed")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TrainingInputError(f"workers: there are {torch.cuda.device_count()} GPUs, and each worker needs its own")
    return torch.device("cuda", local_rank)


class FrozenBase:
    """A base model and its tokenizer on one device.

    In bfloat16 on a GPU the weights are held in it; on a CPU they stay float32 and products are autocast where that is
    faster. Attention is eager everywhere: the fused kernels leave out Gemma 2's soft cap.
    """

    def __init__(self, folder: Path, device: str = "auto", precision: str = "auto", local_rank: int = 0) -> None:
        """Load it. Raises TrainingInputError where it is no base with a chat template and a usual decoder."""
        self.device = _device(device, local_rank)
        try:
            self.fingerprint = fingerprint_folder(folder)
            self.model, self.tokenizer = load_base(folder)
        except (OSError, ValueError) as error:
            raise TrainingInputError(f"base: {folder} cannot be loaded: {error}") from error
        self.name = hub_name(folder.absolute()) or folder.resolve().name
        try:
            self.frame: Frame = frame_for(self.name, self.tokenizer)
        except CheckpointInvalid as error:
            raise TrainingInputError(f"base: {error}") from error
        if not self.tokenizer.chat_template:
            raise TrainingInputError(f"base: the tokenizer of {self.name} has no chat template, and questions are "
                                     "asked in a user's turn; use the base's instruction-tuned form")
        cuda = self.device.type == "cuda"
        self.half = precision == "bfloat16" or (precision == "auto" and (cuda or bfloat16_is_faster()))
        self.model.to(device=self.device, dtype=torch.bfloat16 if cuda and self.half else torch.float32)
        self.positions = int(self.model.config.max_position_embeddings)
        self.ends = end_tokens(self.model, self.tokenizer)

    def targets(self, names: tuple[str, ...]) -> tuple[Target, ...]:
        """Widths of the modules that get a LoRA. Raises TrainingInputError where the base has no such modules."""
        try:
            return targets_of(self.model, names)
        except (AttributeError, KeyError) as error:
            raise TrainingInputError(f"targets: the base is a {type(self.model).__name__}, which has no such modules: "
                                     f"{error}; down_proj, up_proj, gate_proj, q_proj, k_proj, v_proj and o_proj of a "
                                     "decoder under `model.layers` are allowed") from error

    @contextmanager
    def computing(self) -> Iterator[None]:
        """New tensors on the base's device, products in the chosen precision."""
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()
        place = self.device if self.device.type != "cpu" else nullcontext()
        with place, cast:
            yield

    def document_ids(self, text: str) -> list[int]:
        """A passage as the hypernetwork reads it: in the frame of a user's turn."""
        whole = self.frame.before + text.strip() + self.frame.after
        return list(self.tokenizer.encode(whole, add_special_tokens=False))

    def factors(self, network: Hypernetwork, texts: Sequence[str]) -> Factors:
        """The adapter of each passage, in one pass: A and B `[B, L, r, d]`, with gradients for the network."""
        ids, mask = pad([self.document_ids(text) for text in texts], self.device)
        return network(read(self.model, ids, mask), mask)

    def answer_logits(self, rows: Sequence[Row], factors: Factors | None = None) -> Tensor:
        """Logits `[N, V]`, float32, at the N places that predict the answers' tokens, row after row.

        `factors`: an adapter for each row.
        """
        ids, mask = pad([row.prompt + row.answer for row in rows], self.device)
        places = torch.zeros_like(mask)
        for i, row in enumerate(rows):
            places[i, len(row.prompt) - 1:len(row.prompt) + len(row.answer) - 1] = True
        model: Any = self.model
        with adapted(model, factors) if factors is not None else nullcontext():
            hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        # The head at the answers alone: with a vocabulary of 256,000 all places would not fit in memory.
        logits = model.get_output_embeddings()(hidden[places]).float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def write(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations of at most `tokens` tokens, with the end-of-turn token where one came."""
        with self.computing():
            return answer_greedily(self.model, prompts, self.ends, tokens, _BATCH_TOKENS)


def labels_of(rows: Sequence[Row]) -> Tensor:
    """The answers' tokens `[N]`, in the order of `FrozenBase.answer_logits`."""
    return torch.tensor([token for row in rows for token in row.answer])


def rows_of(factors: Factors, rows: Sequence[int]) -> Factors:
    """The adapters with the given numbers, an adapter for each row of a batch."""
    chosen = torch.tensor(list(rows), device=next(iter(factors.values()))[0].device)
    return {name: (a[chosen], b[chosen]) for name, (a, b) in factors.items()}
