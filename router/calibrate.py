"""From the scores of a search to the probability that a candidate answers the question correctly.

Platt scaling (Platt 1999, with his smoothed targets) over a few features of the candidate: a logistic regression,
fitted by Newton's method as the maximum a posteriori under a Gaussian prior. For the calibration that is shipped the
prior is wide and centred on zero; for a tenant's own it is centred on the shipped weights, so that a few questions move
it little and many move it as far as they say. Where there is a lot of data, isotonic regression of the logit (Zadrozny
and Elkan 2002) takes the place of the logistic curve if it has the lower log loss in cross-validation.

Adapters differ: one holds its document worse, or draws questions about others. Each has an offset in logits, shrunk to
its tenant's mean by empirical Bayes (Efron and Morris 1975), which moves the threshold that its candidates must reach.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from router.index import Scored

FEATURES = ("similarity", "word_share", "margin", "alone", "demotion")
"""Cosine of the nearest centroid; share of the question's words; the lead in rank over the next document, below 0
behind the first; whether there is no other document; what the order of results counts against it."""
FEATURES_VERSION = 1
MAX_MARGIN = 0.2
"""A lead or deficit in rank beyond this says nothing more."""
MAX_OFFSET = 2.0
"""Logits by which one adapter's threshold may move."""
ISOTONIC_EXAMPLES = 1000
"""Fewer overfit isotonic regression (Niculescu-Mizil and Caruana 2005)."""
PRIOR_SD = 5.0
"""Of each weight around zero, in logits per typical spread of its feature."""
TENANT_PRIOR_SD = 0.1
"""Of each weight around the shipped one. Nearly all words of the gate's questions are their document's, of people's
fewer, so a tenant's fit must stay near. On three sets of 60 documents with questions of other wording, 0.3 left .31 to
.43 of the right documents to the base, with an ECE of .10 to .13; 0.1 left .13 to .15, with .04 to .05."""
_SPREAD = np.array([0.15, 0.2, 0.08, 0.5, 0.04])
"""Typical standard deviations of FEATURES."""
_NEWTON_STEPS = 50
_FOLDS = 5
Floats = npt.NDArray[np.float64]
Method = Literal["platt", "isotonic"]


@dataclass(frozen=True, slots=True)
class Example:
    """A candidate of one question, and whether taking it was right: it is the question's document, and its adapter
    answers. `features` as `features_of` gives them."""

    features: tuple[float, ...]
    right: bool
    adapter_id: str = ""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well probabilities fit outcomes: expected calibration error, area under the ROC curve (None where all
    outcomes are the same) and mean log loss in nats."""

    examples: int
    ece: float
    auroc: float | None
    log_loss: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fitted map from features to probability; immutable, and the same after `from_json(to_json())`.

    `encoder`, `encoder_version` and `generator` name what it was fitted for; an empty generator is any. `weights` are
    those of FEATURES, in logits per unit. `knots` are (logit, probability), rising in both, where isotonic regression
    took the logistic curve's place. `offsets` are logits by adapter ID. `version` counts the tenant's fits from 1; 0 is
    what is shipped.
    """

    encoder: str
    encoder_version: str
    generator: str
    weights: tuple[float, ...]
    bias: float
    knots: tuple[tuple[float, float], ...] = ()
    offsets: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    version: int = 0

    @property
    def method(self) -> Method:
        """Which kind of curve it is."""
        return "isotonic" if self.knots else "platt"

    def probability(self, features: Sequence[float]) -> float:
        """The probability, 0..1, of one candidate; 0 where a feature is not a finite number."""
        logit = self.bias + math.fsum(w * x for w, x in zip(self.weights, features, strict=True))
        if not math.isfinite(logit):
            return 0.0
        if self.knots:
            return _between(self.knots, logit)
        return sigmoid(logit)

    def threshold(self, adapter_id: str, threshold: float) -> float:
        """The probability that candidates of an adapter must reach, where `threshold` is the tenant's for all."""
        offset = self.offsets.get(adapter_id, 0.0)
        return threshold if not offset or not 0 < threshold < 1 else sigmoid(_logit(threshold) - offset)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"features": FEATURES_VERSION, **asdict(self), "knots": [list(knot) for knot in self.knots],
                "weights": list(self.weights), "offsets": dict(self.offsets)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """What `to_json` gave. Raises ValueError for anything else, also for one of other features."""
        try:
            if value["features"] != FEATURES_VERSION:
                raise ValueError(f"it is of features {value['features']}, this program has {FEATURES_VERSION}")
            quality = value["quality"]
            made = cls(
                encoder=str(value["encoder"]),
                encoder_version=str(value["encoder_version"]),
                generator=str(value["generator"]),
                weights=tuple(float(weight) for weight in value["weights"]),
                bias=float(value["bias"]),
                knots=tuple((float(x), float(y)) for x, y in value["knots"]),
                offsets={str(adapter): float(offset) for adapter, offset in value["offsets"].items()},
                quality=None if quality is None else Quality(**quality),
                version=int(value["version"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no calibration: {error}") from error
        numbers = [*made.weights, made.bias, *made.offsets.values(), *(part for knot in made.knots for part in knot)]
        ordered = list(made.knots) == sorted(made.knots)
        if len(made.weights) != len(FEATURES) or not np.isfinite(numbers).all() or not ordered:
            raise ValueError("this is no calibration: its numbers are not finite, not in order or too few")
        return made


def features_of(result: Scored, margin: float | None) -> tuple[float, ...]:
    """The features of a search result that leads the next document, or is behind the first, by `margin` in rank (None:
    there is no other document)."""
    return features(result.similarity, result.word_share, result.score - result.rank, margin)


def features(similarity: float, word_share: float, demotion: float, margin: float | None) -> tuple[float, ...]:
    """The features, in the order of FEATURES."""
    bounded = 0.0 if margin is None else max(-MAX_MARGIN, min(MAX_MARGIN, margin))
    return similarity, word_share, bounded, float(margin is None), demotion


def fit(
    examples: Sequence[Example],
    encoder: str,
    encoder_version: str,
    generator: str,
    prior: Calibration | None = None,
    version: int = 0,
) -> Calibration:
    """Fit a calibration: around `prior` (a fresh tenant's) or from nothing, with adapters' offsets where they tell.

    Its `quality` is that of cross-validation, over questions that the weights have not seen. Raises ValueError without
    both a right and a wrong example, and for features that are not finite.
    """
    if not examples or any(len(one.features) != len(FEATURES) for one in examples):
        raise ValueError(f"there must be examples, with {len(FEATURES)} finite features each")
    x = np.array([one.features for one in examples], dtype=np.float64)
    y = np.array([one.right for one in examples], dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"there must be examples, with {len(FEATURES)} finite features each")
    if y.min() == y.max():
        raise ValueError("all examples are right, or all are wrong; there is nothing to tell apart")
    start = (np.array(prior.weights), prior.bias) if prior is not None else (np.zeros(x.shape[1]), 0.0)
    deviation = PRIOR_SD if prior is None else TENANT_PRIOR_SD
    held_out, curve_held_out = _cross_validated(x, y, start, deviation)
    weights, bias = _map_logistic(x, y, start, deviation)
    logits = x @ weights + bias
    knots: tuple[tuple[float, float], ...] = ()
    if curve_held_out is not None and log_loss(curve_held_out, y) < log_loss(held_out, y):
        knots, held_out = _isotonic(logits, y), curve_held_out
    return Calibration(
        encoder,
        encoder_version,
        generator,
        tuple(float(weight) for weight in weights),
        float(bias),
        knots,
        adapter_offsets([one.adapter_id for one in examples], held_out, y),
        quality_of(held_out, y),
        version,
    )


def adapter_offsets(adapter_ids: Sequence[str], probabilities: Floats, outcomes: Floats) -> dict[str, float]:
    """How many logits each adapter's candidates do better (above 0) or worse than their probabilities say.

    One Newton step from zero under a normal prior whose variance is estimated from all adapters by moments, so it is 0
    for all where they differ no more than chance lets them. Only examples with an adapter ID count.
    """
    ids = np.array([str(adapter_id) for adapter_id in adapter_ids])
    names = sorted(set(ids.tolist()) - {""})
    p = np.clip(probabilities, 1e-3, 1 - 1e-3)
    surprise = np.array([(outcomes - p)[ids == name].sum() for name in names])
    information = np.array([(p * (1 - p))[ids == name].sum() for name in names])
    if len(names) < 2:
        return {}  # a single adapter's offset is its tenant's, which the weights hold
    variance = float((surprise**2 - information).sum() / (information**2).sum())
    if variance <= 0:
        return {}
    offsets = np.clip(surprise / (information + 1 / variance), -MAX_OFFSET, MAX_OFFSET)
    return {name: round(float(offset), 4) for name, offset in zip(names, offsets, strict=True)}


def quality_of(probabilities: Floats, outcomes: Floats) -> Quality:
    """All three measures; float64 [n] each."""
    return Quality(len(outcomes), expected_calibration_error(probabilities, outcomes),
                   auroc(probabilities, outcomes), log_loss(probabilities, outcomes))


def expected_calibration_error(probabilities: Floats, outcomes: Floats, bins: int = 15) -> float:
    """The mean distance between probability and share of right outcomes over bins of equal width, weighted by how many
    fall into each (Naeini et al. 2015; 15 bins as Guo et al. 2017). `outcomes` are 0 or 1. Raises ValueError for none.
    """
    if len(outcomes) == 0:
        raise ValueError("there are no outcomes to measure")
    places = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    surplus = np.bincount(places, np.asarray(probabilities) - np.asarray(outcomes), bins)
    return float(np.abs(surplus).sum() / len(outcomes))


def auroc(probabilities: Floats, outcomes: Floats) -> float | None:
    """The area under the ROC curve; None where all outcomes are the same."""
    if len(set(np.asarray(outcomes).tolist())) < 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(outcomes, probabilities))


def log_loss(probabilities: Floats, outcomes: Floats) -> float:
    """Mean negative log-likelihood in nats, with probabilities kept 1e-6 off 0 and 1."""
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return float(-np.mean(outcomes * np.log(p) + (1 - outcomes) * np.log(1 - p)))


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _map_logistic(x: Floats, y: Floats, start: tuple[Floats, float], deviation: float) -> tuple[Floats, float]:
    """Weights and bias of most posterior density under a normal prior around `start`."""
    # Platt's targets: as if one more example of each kind had been seen.
    right = y.sum()
    targets = np.where(y > 0, (right + 1) / (right + 2), 1 / (len(y) - right + 2))
    z = np.column_stack([x / _SPREAD, np.ones(len(x))])
    centre = np.append(start[0] * _SPREAD, start[1])
    precision = 1 / deviation**2
    theta = centre.copy()

    def loss(at: Floats) -> float:
        logits = z @ at
        return float((np.logaddexp(0, logits) - targets * logits).sum() + precision / 2 * ((at - centre) ** 2).sum())

    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(z @ theta, -500, 500)))
        gradient = z.T @ (p - targets) + precision * (theta - centre)
        curvature = (z * (p * (1 - p))[:, None]).T @ z + precision * np.eye(z.shape[1])
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    return theta[:-1] / _SPREAD, float(theta[-1])


def _cross_validated(
    x: Floats, y: Floats, start: tuple[Floats, float], deviation: float
) -> tuple[Floats, Floats | None]:
    """Each example's probability by a fit to the others: of the logistic curve, and of isotonic regression where there
    are enough of them."""
    # Neighbours are often about one document; every fifth goes into the same fold.
    folds = np.arange(len(y)) % _FOLDS
    platt = np.empty(len(y))
    curve = np.empty(len(y)) if len(y) >= ISOTONIC_EXAMPLES else None
    for fold in range(_FOLDS):
        out, rest = folds == fold, folds != fold
        if not out.any():
            continue
        weights, bias = _map_logistic(x[rest], y[rest], start, deviation) if rest.any() else start
        logits = x[out] @ weights + bias
        platt[out] = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        if curve is not None:
            places, values = np.array(_isotonic(x[rest] @ weights + bias, y[rest])).T
            curve[out] = np.interp(logits, places, values)
    return platt, curve


def _between(knots: Sequence[tuple[float, float]], logit: float) -> float:
    """The value at a place between knots, or that of the first or last beyond them."""
    after = bisect_left(knots, logit, key=itemgetter(0))
    if after in (0, len(knots)):
        return knots[min(after, len(knots) - 1)][1]
    (x, y), (next_x, next_y) = knots[after - 1], knots[after]
    return y + (next_y - y) * (logit - x) / (next_x - x)


def _isotonic(logits: Floats, y: Floats) -> tuple[tuple[float, float], ...]:
    from sklearn.isotonic import IsotonicRegression

    # A block of right outcomes alone does not make the next one certain.
    least = 1 / (len(y) + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(logits, y)
    return tuple((float(a), float(b)) for a, b in zip(fitted.X_thresholds_, fitted.y_thresholds_, strict=True))
