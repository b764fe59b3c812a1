"""The training loop: passes, accumulation, checkpoints, evaluation on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from hypernet.adaptation.base import FrozenBase, rows_of
from hypernet.adaptation.checkpoint import save_checkpoint
from hypernet.adaptation.curriculum import Group, GroupSampler
from hypernet.adaptation.evaluate import Evaluation, evaluate, warnings_of
from hypernet.adaptation.losses import factor_size, top_k_divergence
from hypernet.adaptation.questions import Asked
from hypernet.adaptation.settings import AdaptationSettings
from hypernet.adaptation.state import Curve, State
from hypernet.adaptation.workers import Place, StopWish, add_up, wait_for_all
from hypernet.perceiver import Hypernetwork, concatenate_ranks

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
CLIP = 1.0


class TrainingDiverged(RuntimeError):
    """Losses are no numbers any more."""


@dataclass(frozen=True)
class Outcome:
    """Steps made, the last evaluation, its warnings, and whether the training was stopped before its end."""

    steps: int
    evaluation: Evaluation
    warnings: list[str]
    stopped: bool


def learning_rate(step: int, settings: AdaptationSettings) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))


class Trainer:
    """One training on one worker. `run` trains up to `settings.steps`, from the state in the work folder if any."""

    def __init__(self, settings: AdaptationSettings, base: FrozenBase, network: Hypernetwork, training: Sequence[Asked],
                 held_out: Sequence[Asked], corpus: str, place: Place) -> None:
        """`corpus` is the fingerprint of the documents. Raises TrainingInputError where the state is of others."""
        self.settings, self.base, self.place = settings, base, place
        self.network = network.to(base.device)
        self._held_out = list(held_out)
        self._corpus = corpus
        self._sampler = GroupSampler(training, settings.seed, settings.questions_a_group)
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=settings.learning_rate, betas=(0.9, 0.98),
                                            weight_decay=0.01)
        self._state = State(settings.work)
        self._steps, self._evaluations = Curve(settings.work / "steps.jsonl"), Curve(settings.work / "evaluation.jsonl")
        self.step, position = self._state.load(self.network, self._optimiser, corpus)
        if position is not None:
            self._sampler.seek(position)

    def _groups(self) -> list[Group]:
        """This worker's share of the next groups; all workers draw the same ones, so one position serves all."""
        s = self.settings
        chunks = self._sampler.chunks(self.step / s.steps, s.single_share, s.most_chunks)
        count = max(1, s.batch_chunks // chunks)
        return self._sampler.draw(count * self.place.world, chunks)[self.place.rank::self.place.world]

    def _losses(self, groups: list[Group]) -> tuple[Tensor, Tensor, int]:
        """Divergence summed over the answers' tokens, size of the factors, and how many tokens there are."""
        factors = self.base.factors(self.network, [one.passage.text for group in groups for one in group.passages])
        joined = concatenate_ranks(factors, len(groups[0].passages))
        asked = [(g, group.passages[place], i) for g, group in enumerate(groups) for place, i in group.questions]
        with torch.no_grad():
            # The teacher reads the question's own passage, so that joining passages is no harder for it.
            teacher = self.base.answer_logits([one.in_context(self.base, i) for _, one, i in asked])
        rows = [one.closed(self.base, i) for _, one, i in asked]
        student = self.base.answer_logits(rows, rows_of(joined, [g for g, _, _ in asked]))
        return top_k_divergence(student, teacher, self.settings.top_k), factor_size(factors), teacher.size(0)

    def _one_step(self, stop: bool) -> tuple[dict[str, float], bool, bool]:
        """Figures of the step, whether any worker was asked to stop, and whether the step was usable."""
        s = self.settings
        figures = {"divergence": 0.0, "size": 0.0, "tokens": 0.0}
        passages = 0
        for _ in range(s.accumulation):
            groups = self._groups()
            passages = len(groups[0].passages)
            with self.base.computing():
                divergence, size, tokens = self._losses(groups)
                # Weighted by tokens like the divergence, since the sum is divided by all tokens of the step.
                loss = divergence + s.l1 * size * tokens
            loss.backward()
            figures["divergence"] += float(divergence.detach())
            figures["size"] += float(size.detach()) * tokens
            figures["tokens"] += tokens
        divergence_sum, size_sum, token_sum, stops = add_up(self._parameters, [*figures.values(), float(stop)])
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= token_sum
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, CLIP))
        rate = learning_rate(self.step, s)
        usable = math.isfinite(norm) and math.isfinite(divergence_sum)
        if usable:
            for group in self._optimiser.param_groups:
                group["lr"] = rate
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return {"divergence": divergence_sum / token_sum, "factor_size": size_sum / token_sum, "norm": norm,
                "rate": rate, "passages": passages, **self._sampler.position}, stops > 0, usable

    def _save(self) -> None:
        if self.place.rank == 0:
            self._state.save(self.network, self._optimiser, self._sampler.position, self.step, self._corpus)

    def evaluate(self) -> Evaluation:
        """Figures on the held-out passages, kept in the work folder; the checkpoint is written beside them."""
        s = self.settings
        self.network.eval()
        several = s.most_chunks if s.single_share < 1 else 1
        found = evaluate(self.base, self.network, self._held_out, self.step, s.batch_chunks, several)
        self.network.train()
        self._evaluations.keep_until(self.step - 1)
        self._evaluations.add(found.to_json())
        save_checkpoint(s.folder, self.network, self.base.name, self.base.frame, self.step)
        return found

    def run(self, stop: StopWish) -> Outcome | None:
        """Train; the outcome on worker 0, None on others. Raises TrainingDiverged."""
        s, first = self.settings, self.place.rank == 0
        if first:
            for curve in (self._steps, self._evaluations):
                curve.keep_until(self.step)
        self.network.train()
        sums: dict[str, float] = {}
        bad, stopped, seconds = 0, False, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
        with Progress(*columns, console=Console(stderr=True), disable=not first, refresh_per_second=2) as bar:
            task = bar.add_task("training", total=s.steps, completed=self.step, figures="")
            while self.step < s.steps and not stopped:
                figures, stopped, usable = self._one_step(stop.asked)
                bad = 0 if usable else bad + 1
                if bad == MAX_BAD_STEPS:
                    raise TrainingDiverged(f"the last {bad} steps up to step {self.step} gave no finite loss; the "
                                           "state from before is kept: lower the learning rate and start again")
                self.step += 1
                if first and usable:
                    for key in ("divergence", "factor_size", "norm"):
                        sums[key] = sums.get(key, 0.0) + figures[key]
                    sums["count"] = sums.get("count", 0.0) + 1
                if first and self.step % s.log_every == 0 and sums:
                    count = sums.pop("count")
                    means = {key: round(value / count, 5) for key, value in sums.items()}
                    now = time.monotonic()
                    self._steps.add({"step": self.step, **means, "rate": figures["rate"], "epoch": figures["epoch"],
                                     "at": figures["at"], "passages": figures["passages"],
                                     "seconds": round(now - seconds, 2)})
                    seconds, sums = now, {}
                bar.update(task, completed=self.step, figures=f"divergence {figures['divergence']:.3f}")
                last = stopped or self.step == s.steps
                if bad == 0 and (last or self.step % s.save_every == 0):
                    self._save()
                if first and not last and self.step % s.evaluate_every == 0:
                    self._tell(self.evaluate())
        outcome = None
        if first:
            evaluation = self.evaluate()
            outcome = Outcome(self.step, evaluation, self._tell(evaluation), stopped)
        wait_for_all()
        return outcome

    def _tell(self, evaluation: Evaluation) -> list[str]:
        found = warnings_of(evaluation, self.step / self.settings.steps)
        for text in found:
            logger.warning("step %d: %s", self.step, text)
        return found
