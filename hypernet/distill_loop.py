"""Gradient steps on one document's LoRA adapter: from nothing, or from the adapter that a hypernetwork made.

The adapted base learns to say closed book what the base says with the document in context, or what the text itself says
where the base misreads it (`hypernet.distill_teacher`).
PEFT carries the factors; the base itself is frozen, and is as before after every run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hypernet.answers import BATCH_TOKENS
from hypernet.distill_questions import assign, training_questions
from hypernet.distill_teacher import Exercise, Targets, divergence, predict, teach
from hypernet.documents import Chunk, DocumentText, chunk_document
from hypernet.inject import MODULE_PARENTS, layers_path, module_path, targets_of
from hypernet.lora import LoraAdapter

_NAME = "document"
_NANO_WIDTH = 192
_MAX_CHUNKS = 1024
_STARTED = 0.3  # larger steps undo what a hypernetwork's adapter answers to questions that nothing trains


@dataclass(frozen=True)
class DistillSettings:
    """What one run may take and how it learns. Raises ValueError naming the field that is out of range."""

    steps: int = 60
    """Gradient steps, at most."""
    seconds: float = 60.0
    """Wall-clock limit, teacher included. At least one step is made."""
    learning_rate: float | None = None
    """Adam's rate, which falls to 0 over the steps. None: `rate_for` the base, the modules and the start."""
    rank: int = 8
    """Rank of an adapter made from nothing."""
    target_modules: tuple[str, ...] = tuple(sorted(MODULE_PARENTS))
    """The modules that an adapter made from nothing changes; one with a start keeps the start's."""
    questions: int = 24
    """Questions by templates for a chunk where the caller gives none, at most."""
    own_questions: int = 0
    """And so many, at most, written by the base itself. A small reader such as nano writes none, which takes time."""
    wording: int = 1
    """Which wording of `hypernet.probes` these have; the quality gate asks in wording 0, so that it stays unseen."""
    top_k: int = 16
    answer_tokens: int = 32
    context_tokens: int = 2048
    """A longer document is cut: each question is answered from the chunk that it is about."""
    agreement_loss: float = 0.02
    """Done as soon as every answer token is right and the KL is at most so many nats a token."""
    patience: int = 12
    """Done where the loss has not fallen by 2% for so many steps."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "questions", "top_k", "answer_tokens", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: is {getattr(self, name)}; at least 1 is needed")
        if self.own_questions < 0:
            raise ValueError(f"own_questions: is {self.own_questions}; 0 or more is needed")
        if self.context_tokens < 16:
            raise ValueError(f"context_tokens: is {self.context_tokens}; at least 16 is needed")
        for name in ("seconds", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: is {value}; a number above 0 is needed")
        unknown = sorted(set(self.target_modules) - set(MODULE_PARENTS))
        if unknown or not self.target_modules:
            raise ValueError(f"target_modules: is {list(self.target_modules)}; one or more of {sorted(MODULE_PARENTS)} "
                             "are allowed")


REFINE = DistillSettings(steps=10, seconds=5.0)
"""For an adapter that a hypernetwork made."""


@dataclass(frozen=True)
class Distilled:
    """The adapter (alpha = rank), and how it came about.

    `stopped`: "steps", "seconds", "agreement", "plateau", "cancelled", or "diverged" (the loss was no longer finite).
    In each case `lora` is the best state seen: the one with loss `loss` (nats per answer token), in which `agreement`
    of the answers' tokens were the teacher's. `first_loss` is that of the start. Both are infinite where the run was
    cancelled before its first step.
    """

    lora: LoraAdapter
    steps: int
    seconds: float
    stopped: str
    first_loss: float
    loss: float
    agreement: float
    questions: int


def rate_for(base: PreTrainedModel, modules: Sequence[str], started: bool = False) -> float:
    """Adam's learning rate: at nano's width 1e-2 where one kind of module has factors, else 3e-3.

    Of that `_STARTED` where the adapter is not made from nothing. Falls with the root of the width, which is an
    extrapolation: it is not measured on larger bases.
    """
    rate = 1e-2 if len(modules) == 1 else 3e-3
    return rate * (_STARTED if started else 1.0) * math.sqrt(_NANO_WIDTH / int(_text_config(base).hidden_size))


def _text_config(base: PreTrainedModel) -> Any:
    return base.config.get_text_config()


def _no_progress(_: float) -> None:
    pass


def _never() -> bool:
    return False


class Distiller:
    """Distils documents into adapters of one frozen base. Not thread-safe: during a run the base is wrapped."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
                 settings: DistillSettings | None = None) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.settings = settings or DistillSettings()

    @property
    def context_tokens(self) -> int:
        """The most tokens of a document that stand in the teacher's prompt, with room for a question and an answer."""
        longest = int(getattr(_text_config(self.base), "max_position_embeddings", None) or 1 << 20)
        return max(16, min(self.settings.context_tokens, longest - self.settings.answer_tokens - 128))

    def chunks(self, document: DocumentText, spans: Sequence[tuple[int, int]] = ()) -> list[Chunk]:
        """What the teacher reads at a time of the text's spans, in characters, or of all of it. Raises DocumentError
        where that is empty."""
        found: list[Chunk] = []
        for first, last in spans or [(0, len(document.text))]:
            part = DocumentText(document.title, document.text[first:last])
            found += [replace(chunk, start=first + chunk.start, end=first + chunk.end) for chunk in chunk_document(
                part, self.tokenizer, self.context_tokens, self.context_tokens, _MAX_CHUNKS)]
        return found

    def distill(self, document: DocumentText, questions: Sequence[str] = (), start: LoraAdapter | None = None,
                rank: int | None = None, on_progress: Callable[[float], None] = _no_progress,
                cancelled: Callable[[], bool] = _never, settings: DistillSettings | None = None,
                spans: Sequence[tuple[int, int]] = ()) -> Distilled:
        """An adapter of the document, or only of `spans` of its text, from zero or from `start`, whose modules and rank
        it keeps.

        Without `questions` they are made from the text. A `rank` above the start's adds empty ranks. `on_progress`
        gets the share done, 0 to 1; `cancelled` is asked before every step and every answer token of the teacher.
        `settings` stand for the distiller's own in this run. Raises DocumentError where the document is empty and
        ValueError where `rank` is below the start's or a module is not in the base.
        """
        settings = settings or self.settings
        chunks = self.chunks(document, spans)
        if questions:
            exercises = assign(questions, [chunk.text for chunk in chunks])
        else:
            exercises = training_questions(self.base, self.tokenizer, document, chunks, settings.questions,
                                           settings.wording, settings.own_questions)
        return self.train(exercises, start, rank, on_progress, cancelled, settings)

    def train(self, exercises: Sequence[Exercise], start: LoraAdapter | None = None, rank: int | None = None,
              on_progress: Callable[[float], None] = _no_progress, cancelled: Callable[[], bool] = _never,
              settings: DistillSettings | None = None) -> Distilled:
        """As `distill`, with the text that answers each question given beside it."""
        settings = settings or self.settings
        begun = time.perf_counter()
        initial = self._initial(start, rank, settings)
        targets = teach(self.base, self.tokenizer, exercises, settings.top_k, settings.answer_tokens, cancelled)
        with trainable(self.base, initial) as (model, factors):
            rate = settings.learning_rate or rate_for(self.base, initial.target_modules, start is not None)
            run = _Run(model, factors, targets, settings, rate)
            stopped = run.until_done(begun + settings.seconds, on_progress, cancelled)
            tensors = {path: (a.float().cpu(), b.float().cpu()) for path, (a, b) in run.best.items()}
        if stopped != "cancelled":
            on_progress(1.0)
        lora = LoraAdapter(initial.rank, initial.alpha, tensors, initial.base_model)
        return Distilled(lora, run.steps, time.perf_counter() - begun, stopped, run.first_loss, run.best_loss,
                         run.best_right / targets.tokens, len(exercises))

    def _initial(self, start: LoraAdapter | None, rank: int | None, settings: DistillSettings) -> LoraAdapter:
        """The adapter to begin with, alpha = rank: `start` with ranks of no effect added, or only such ranks."""
        rank = rank or (start.rank if start else settings.rank)
        if start and rank < start.rank:
            raise ValueError(f"rank: is {rank}; the adapter to start from has {start.rank}, and no less is allowed")
        generator = torch.Generator().manual_seed(settings.seed)
        widths = {target.name: (target.d_in, target.d_out)
                  for target in targets_of(self.base, start.target_modules if start else settings.target_modules)}
        paths = start.tensors if start else [
            module_path(layer, name, layers_path(self.base)) for name in sorted(widths)
            for layer in range(int(_text_config(self.base).num_hidden_layers))]
        tensors = {}
        for path in paths:
            d_in, d_out = widths[path.rsplit(".", 1)[-1]]
            a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)
            b = torch.zeros(d_out, rank)
            if start:
                a[:start.rank] = start.tensors[path][0]
                b[:, :start.rank] = start.tensors[path][1] * (start.alpha / start.rank)
            tensors[path] = (a, b)
        name = start.base_model if start else str(getattr(self.base.config, "name_or_path", "") or "")
        return LoraAdapter(rank, float(rank), tensors, name)


@contextmanager
def trainable(base: PreTrainedModel,
              adapter: LoraAdapter) -> Iterator[tuple[nn.Module, Mapping[str, tuple[nn.Parameter, nn.Parameter]]]]:
    """The base with `adapter` as trainable PEFT weights: the wrapped model, and A and B by module path.

    At the end, also after an exception, the base has its own modules, modes and gradient flags again.
    """
    modes = {name: module.training for name, module in base.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.rank), target_modules=list(adapter.tensors),
                        lora_dropout=0.0, bias="none")
    wrapped = None
    try:
        # PEFT draws initial weights, which are replaced below, from the process' generators.
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            wrapped = get_peft_model(base, config, adapter_name=_NAME)
        wrapped.eval()
        factors = {}
        for path, (a, b) in adapter.tensors.items():
            layer: Any = base.get_submodule(path)
            pair = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
            with torch.no_grad():
                pair[0].copy_(a)
                pair[1].copy_(b * (adapter.alpha / adapter.rank))
            factors[path] = pair
        yield wrapped, factors
    finally:
        if wrapped is not None:
            wrapped.unload()
        for name, module in base.named_modules():
            module.training = modes[name]
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(wanted[name])


class _Run:
    """Adam on the factors until a budget, a goal or a cancellation ends it; keeps the best state seen."""

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], targets: Targets,
                 settings: DistillSettings, rate: float) -> None:
        self._model, self._factors, self._targets, self._settings, self._rate = model, factors, targets, settings, rate
        self._adam = torch.optim.Adam([half for pair in factors.values() for half in pair], lr=rate)
        size = max(1, BATCH_TOKENS // targets.ids.size(1))
        self._parts = [targets.rows(slice(at, at + size)) for at in range(0, targets.ids.size(0), size)]
        self.steps, self.best_right = 0, 0
        self.first_loss = self.best_loss = math.inf
        self.best = self._state()
        self._losses: list[float] = []

    def until_done(self, deadline: float, on_progress: Callable[[float], None],
                   cancelled: Callable[[], bool]) -> str:
        """Why it ended, as in `Distilled.stopped`."""
        settings = self._settings
        longest = 0.0
        while True:
            begun = time.perf_counter()
            if cancelled():
                return "cancelled"
            last = self.steps == settings.steps
            if self.steps and begun + longest > deadline:
                return self._measure(backward=False) or "seconds"
            stopped = self._measure(backward=not last)
            if stopped or last:
                return stopped or "steps"
            for group in self._adam.param_groups:
                group["lr"] = self._rate * (1 - self.steps / settings.steps)
            self._adam.step()
            self.steps += 1
            longest = max(longest, time.perf_counter() - begun)
            on_progress(self.steps / settings.steps)

    def _measure(self, backward: bool) -> str:
        """Loss and gradients of the present state; notes it where it is the best. Says why to stop, or nothing."""
        self._adam.zero_grad()
        total, right = 0.0, 0
        for part in self._parts:
            with torch.set_grad_enabled(backward):
                loss, agreed = divergence(predict(self._model, part), part)
                if backward:
                    (loss / self._targets.tokens).backward()
            total, right = total + float(loss.detach()) / self._targets.tokens, right + agreed
        self._losses.append(total)
        if not math.isfinite(total):
            return "diverged"
        if len(self._losses) == 1:
            self.first_loss = total
        if total < self.best_loss:
            self.best, self.best_loss, self.best_right = self._state(), total, right
        if right == self._targets.tokens and total <= self._settings.agreement_loss:
            return "agreement"
        before = self._losses[:-self._settings.patience]
        if before and min(self._losses[-self._settings.patience:]) > 0.98 * min(before):
            return "plateau"
        return ""

    def _state(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in self._factors.items()}
