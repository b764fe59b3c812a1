"""What the adapters of held-out documents are worth, and early signs that a training collapses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hypernet.adaptation.base import FrozenBase, Row, labels_of, rows_of
from hypernet.adaptation.losses import factor_size
from hypernet.adaptation.questions import Asked
from hypernet.perceiver import Factors, Hypernetwork, concatenate_ranks

LITTLE_GAIN = 0.1
"""Nats a token: below this the document hardly helps the base, and there is little to distil."""
ALIKE = 0.98
"""Cosine above which adapters of different documents count as the same one."""
VANISHED = 1e-5


@dataclass(frozen=True)
class Ways:
    """A figure for each way to answer: document in the prompt, the document's own adapter, the adapter of another
    document, and the base alone; `several`: an adapter joined of several passages (None: not trained for)."""

    in_context: float
    matched: float
    wrong: float
    base: float
    several: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures over `questions` questions on `passages` held-out passages after `step` steps.

    `log_probability` is the mean per token of the base's own in-context answer, `agreement` the share of its tokens
    that are the likeliest ones, given those before. `factor_size` is mean|A| + mean|B|, `likeness` the mean cosine of
    the B factors of different passages.
    """

    step: int
    passages: int
    questions: int
    log_probability: Ways
    agreement: Ways
    factor_size: float
    likeness: float

    @property
    def margin(self) -> float:
        """Matched above wrong-document adapter, in nats a token; at most 0 where the document is ignored."""
        return self.log_probability.matched - self.log_probability.wrong

    @property
    def recovered(self) -> float | None:
        """Which share of what the document gives the base its adapter gives; None where the document gives nothing."""
        ways = self.log_probability
        gain = ways.in_context - ways.base
        return (ways.matched - ways.base) / gain if gain > 0 else None

    def to_json(self) -> dict:
        """Plain values for a JSON line."""
        return asdict(self) | {"margin": self.margin, "recovered": self.recovered}

    @staticmethod
    def from_json(values: dict) -> Evaluation:
        """What `to_json` gave."""
        plain = {key: value for key, value in values.items() if key not in ("margin", "recovered")}
        return Evaluation(**plain | {key: Ways(**plain[key]) for key in ("log_probability", "agreement")})


def warnings_of(evaluation: Evaluation, progress: float) -> list[str]:
    """What is wrong with a training so far, in words; `progress` from 0 to 1."""
    found = []
    ways = evaluation.log_probability
    if ways.in_context - ways.base < LITTLE_GAIN:
        found.append(f"the document in the prompt gains the base only {ways.in_context - ways.base:.3f} nats a token: "
                     "there is little to learn; other questions, longer answers or a better base may help")
    if evaluation.factor_size < VANISHED:
        found.append("the factors have vanished: the adapters do nothing; lower l1 or the learning rate")
    if progress >= 0.1 and evaluation.likeness > ALIKE:
        found.append(f"adapters of different documents are alike (cosine {evaluation.likeness:.3f})")
    if progress >= 0.25 and evaluation.margin <= 0:
        found.append("a wrong document's adapter answers as well as the right one: the network ignores its document")
    if progress >= 0.25 and ways.matched < ways.base:
        found.append("answers are less likely with the adapter than without: lower the learning rate")
    return found


class _Sums:
    """Sums of log-probabilities and of likeliest tokens over answers."""

    def __init__(self) -> None:
        self.log_probability, self.agreement, self.tokens = 0.0, 0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.log_probability += float(logits.log_softmax(-1).gather(-1, labels[:, None]).sum())
        self.agreement += int((logits.argmax(-1) == labels).sum())
        self.tokens += labels.numel()


def _others(batch: Sequence[Asked]) -> list[int]:
    """For each passage the next one of another document; of the same one where the batch has no other."""
    found = []
    for i, asked in enumerate(batch):
        after = [(i + step) % len(batch) for step in range(1, len(batch))]
        found.append(next((j for j in after if batch[j].passage.document != asked.passage.document), after[0]))
    return found


def _parts(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Batches of about `size`, at least two each, with passages of one document far from each other."""
    count = max(1, min(len(asked) // 2, -(-len(asked) // max(2, size))))
    return [list(asked[i::count]) for i in range(count)]


def _likeness(factors: Factors) -> float:
    """Mean cosine of B between rows of the batch that follow each other."""
    flat = torch.cat([b.flatten(1) for _, b in factors.values()], dim=1).float()
    return float(F.cosine_similarity(flat, flat.roll(1, 0), dim=1).mean())


@torch.no_grad()
def evaluate(base: FrozenBase, network: Hypernetwork, asked: Sequence[Asked], step: int, size: int,
             several: int = 1) -> Evaluation:
    """All questions on `asked` (at least two passages), `size` passages in a pass; `several` are joined as well."""
    ways = {name: _Sums() for name in ("in_context", "matched", "wrong", "base", "several")}
    sizes, likeness = [], []
    parts = _parts(asked, size)
    for batch in parts:
        places = [(i, q) for i, one in enumerate(batch) for q in range(len(one.questions))]
        closed: list[Row] = [batch[i].closed(base, q) for i, q in places]
        opened: list[Row] = [batch[i].in_context(base, q) for i, q in places]
        labels = labels_of(closed).to(base.device)
        with base.computing():
            factors = base.factors(network, [one.passage.text for one in batch])
            sizes.append(float(factor_size(factors)))
            likeness.append(_likeness(factors))
            others = _others(batch)
            ways["in_context"].add(base.answer_logits(opened), labels)
            ways["base"].add(base.answer_logits(closed), labels)
            ways["matched"].add(base.answer_logits(closed, rows_of(factors, [i for i, _ in places])), labels)
            ways["wrong"].add(base.answer_logits(closed, rows_of(factors, [others[i] for i, _ in places])), labels)
            whole = len(batch) // several if several > 1 else 0
            if whole:
                first = rows_of(factors, range(whole * several))
                joined = concatenate_ranks(first, several)
                held = [k for k, (i, _) in enumerate(places) if i < whole * several]
                rows = [closed[k] for k in held]
                ways["several"].add(base.answer_logits(rows, rows_of(joined, [places[k][0] // several for k in held])),
                                    labels_of(rows).to(base.device))

    def figures(name: str) -> Ways:
        values = {way: getattr(sums, name) / sums.tokens if sums.tokens else None for way, sums in ways.items()}
        return Ways(**values)  # type: ignore[arg-type]  # only `several` may be without tokens

    return Evaluation(step, len(asked), sum(len(one.questions) for one in asked), figures("log_probability"),
                      figures("agreement"), sum(sizes) / len(sizes), sum(likeness) / len(likeness))
