"""What is reported of a router: ranks, abstention, calibration, and selective risk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 10
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What one system made of one question.

    `answers` are the documents that answer it (none: nobody does), `ranked` those that the system found, best first.
    `confidence` is the stated probability that the first one answers; `routed` says whether it would be used, and
    `foreign` how many of those found belong to another tenant.
    """

    slice: str
    answers: frozenset[str]
    ranked: tuple[str, ...]
    confidence: float
    routed: bool
    foreign: int = 0

    @property
    def right(self) -> bool:
        """Whether the first one found answers the question."""
        return bool(self.ranked) and self.ranked[0] in self.answers

    def within(self, count: int) -> bool:
        """Whether one of the first `count` found answers the question."""
        return not self.answers.isdisjoint(self.ranked[:count])


def auroc(outcomes: Sequence[Outcome]) -> float | None:
    """How well the confidence tells questions that some document answers from others (area under the ROC curve).

    None where there are none of one kind.
    """
    from sklearn.metrics import roc_auc_score

    answered = [bool(one.answers) for one in outcomes]
    if len(set(answered)) < 2:
        return None
    return float(roc_auc_score(answered, [one.confidence for one in outcomes]))


def ece(outcomes: Sequence[Outcome], bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): the gap between confidence and share of right ones, in bins of
    equal width, weighted by their size."""
    confidence = np.array([one.confidence for one in outcomes])
    right = np.array([one.right for one in outcomes], dtype=float)
    index = np.clip((confidence * bins).astype(int), 0, bins - 1)
    gaps = [(index == i).mean() * abs(confidence[index == i].mean() - right[index == i].mean())
            for i in np.unique(index)]
    return float(sum(gaps))


def selective_risk(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """Coverage and risk (Geifman and El-Yaniv 2017) at each threshold on the confidence, the highest first.

    Coverage is the share of all questions that are routed, risk the share of those whose document does not answer.
    Both float64 [thresholds]; equal confidences fall together.
    """
    order = sorted(outcomes, key=lambda one: -one.confidence)
    wrong = np.cumsum([not one.right for one in order])
    routed = np.arange(1, len(order) + 1)
    confidence = np.array([one.confidence for one in order])
    last = np.append(np.flatnonzero(np.diff(confidence)), len(order) - 1)  # of those with equal confidence
    return routed[last] / len(order), wrong[last] / routed[last]


def area_under_risk(outcomes: Sequence[Outcome]) -> float:
    """The mean risk over all coverages up to 1 (AURC)."""
    coverage, risk = selective_risk(outcomes)
    return float(np.sum(np.diff(np.concatenate([[0.0], coverage])) * risk))


def share(values: Sequence[bool]) -> float | None:
    """The share that is true; None of nothing."""
    return float(np.mean(values)) if values else None
