"""Calibrations: fits that give back what made the data, shrinkage, offsets of adapters, JSON, and the measures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from router.calibrate import (
    FEATURES,
    ISOTONIC_EXAMPLES,
    MAX_MARGIN,
    Calibration,
    Example,
    adapter_offsets,
    auroc,
    expected_calibration_error,
    features,
    fit,
    log_loss,
    sigmoid,
)

TRUE = np.array([6.0, 1.0, 20.0, 5.0, -4.0])
BIAS = -6.5


def sampled(count: int, seed: int = 0, bias: float = BIAS, curve: str = "logistic") -> list[Example]:
    """Examples whose outcomes follow a known probability."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        margin = None if rng.random() < 0.1 else float(rng.uniform(0, 0.3))
        x = features(float(rng.uniform(0.1, 0.9)), float(rng.random()), float(rng.uniform(0, 0.1)), margin)
        p = sigmoid(float(TRUE @ x) + bias)
        if curve == "step":
            p = 0.03 if p < 0.5 else 0.8
        found.append(Example(x, bool(rng.random() < p)))
    return found


def outcomes(examples: list[Example]) -> np.ndarray:
    return np.array([float(one.right) for one in examples])


def said(calibration: Calibration, examples: list[Example]) -> np.ndarray:
    return np.array([calibration.probability(one.features) for one in examples])


def fitted(examples: list[Example], prior: Calibration | None = None) -> Calibration:
    return fit(examples, "minilm", "1", "gen-1", prior)


def test_a_fit_finds_the_probabilities_that_made_the_data() -> None:
    calibration, fresh = fitted(sampled(900)), sampled(3000, seed=1)
    p = np.array([sigmoid(float(TRUE @ one.features) + BIAS) for one in fresh])
    assert np.abs(said(calibration, fresh) - p).mean() < 0.04
    assert expected_calibration_error(said(calibration, fresh), outcomes(fresh)) < 0.04
    assert calibration.quality is not None and calibration.quality.ece < 0.06 and calibration.quality.examples == 900
    assert calibration.quality.auroc == pytest.approx(auroc(p, outcomes(fresh)), abs=0.03)
    assert calibration.method == "platt"


def test_a_curve_that_is_not_logistic_is_found_by_isotonic_regression_where_there_is_enough_data() -> None:
    calibration, fresh = fitted(sampled(2 * ISOTONIC_EXAMPLES, curve="step")), sampled(3000, seed=1, curve="step")
    assert calibration.method == "isotonic"
    assert expected_calibration_error(said(calibration, fresh), outcomes(fresh)) < 0.04
    values = [probability for _, probability in calibration.knots]
    assert values == sorted(values) and 0 < values[0] < values[-1] < 1
    assert fitted(sampled(ISOTONIC_EXAMPLES - 1, curve="step")).method == "platt"


def test_a_tenants_fit_is_shrunk_to_the_one_before_it() -> None:
    shipped = fitted(sampled(2000))
    stricter = [sampled(count, seed=2, bias=BIAS - 2) for count in (10, 2000)]
    few, many = (fitted(examples, shipped) for examples in stricter)
    fresh = sampled(2000, seed=3, bias=BIAS - 2)
    distances = [np.abs(said(one, fresh) - said(shipped, fresh)).mean() for one in (few, many)]
    assert distances[0] < 0.6 * distances[1]
    losses = [log_loss(said(one, fresh), outcomes(fresh)) for one in (many, few, shipped)]
    assert losses == sorted(losses) and losses[0] < losses[2]


def test_offsets_move_the_thresholds_of_adapters_that_differ_and_of_no_others() -> None:
    rng = np.random.default_rng(0)
    ids = [f"adp_{i % 20}" for i in range(800)]
    p = rng.uniform(0.2, 0.9, 800)
    same = adapter_offsets(ids, p, (rng.random(800) < p).astype(float))
    assert all(abs(offset) < 0.5 for offset in same.values())
    # adp_0 to adp_9 are two logits worse than their features say.
    worse = np.array([int(name[4:]) < 10 for name in ids])
    right = (rng.random(800) < 1 / (1 + np.exp(-(np.log(p / (1 - p)) - 2 * worse)))).astype(float)
    offsets = adapter_offsets(ids, p, right)
    assert max(offsets[f"adp_{i}"] for i in range(10)) < min(offsets[f"adp_{i}"] for i in range(10, 20))
    calibration = Calibration("e", "1", "", (0.0,) * len(FEATURES), 0.0, offsets=offsets)
    assert calibration.threshold("adp_0", 0.5) > 0.6 and calibration.threshold("adp_unknown", 0.5) == 0.5
    assert all(0 < calibration.threshold(name, 0.95) < 1 for name in offsets)
    # One question says little about an adapter: its offset is shrunk.
    one = adapter_offsets([*ids, "adp_new"], np.append(p, 0.9), np.append(right, 0.0))
    assert -1.5 < one["adp_new"] < 0, "unshrunk it would be -10"
    assert adapter_offsets(["adp_1"] * 9, np.full(9, 0.5), np.zeros(9)) == {}


def test_json_gives_the_same_calibration_back() -> None:
    examples = [Example(one.features, one.right, f"adp_{i % 7}")
                for i, one in enumerate(sampled(2 * ISOTONIC_EXAMPLES, curve="step"))]
    made = fitted(examples)
    again = Calibration.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert again == made
    assert said(again, examples).tolist() == said(made, examples).tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"features": 0}, {"weights": [1.0]}, {"weights": [math.nan] * 5}, {"bias": "x"}, {"offsets": {"a": math.inf}},
        {"knots": [[1.0, 0.5], [0.0, 0.7]]}, {"quality": {"ece": 1}}, {"version": None}, {"offsets": []},
    ],
)  # fmt: skip
def test_json_that_is_no_calibration_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.from_json({**fitted(sampled(50)).to_json(), **change})
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.from_json({})


def test_probabilities_of_odd_features() -> None:
    calibration = fitted(sampled(300))
    for value in (math.nan, math.inf, -math.inf):
        assert calibration.probability((value, 0.5, 0.1, 0.0, 0.0)) == 0.0
    assert calibration.probability((1e6, 1.0, 1.0, 0.0, 0.0)) == 1.0
    assert features(0.5, 0.5, 0.0, 9.0)[2] == MAX_MARGIN and features(0.5, 0.5, 0.0, -9.0)[2] == -MAX_MARGIN
    assert features(0.5, 0.5, 0.0, None)[2:4] == (0.0, 1.0)


def test_what_cannot_be_fitted_is_refused() -> None:
    right = [Example(one.features, True) for one in sampled(30)]
    with pytest.raises(ValueError, match="nothing to tell apart"):
        fitted(right)
    for bad in ([], [Example((0.1, 0.2), True)], [Example((math.nan,) * 5, True), Example((0.0,) * 5, False)]):
        with pytest.raises(ValueError, match="finite features"):
            fitted(bad)
    # Perfectly separable data has no finite maximum-likelihood fit; the prior gives it one.
    apart = [Example((0.9, 1.0, 0.2, 0.0, 0.0), True), Example((0.1, 0.0, 0.0, 0.0, 0.0), False)] * 5
    p = said(fitted(apart), apart)
    assert p[0] > 0.8 and p[1] < 0.2


def test_measures() -> None:
    p, y = np.array([0.9, 0.9, 0.1, 0.1]), np.array([1.0, 1.0, 0.0, 0.0])
    assert expected_calibration_error(p, y) == pytest.approx(0.1)
    assert auroc(p, y) == 1.0 and auroc(p, np.ones(4)) is None
    assert log_loss(p, y) == pytest.approx(-math.log(0.9))
    # In one bin errors of both signs cancel, in two they do not.
    assert expected_calibration_error(np.array([0.4, 0.6]), np.array([1.0, 0.0]), bins=1) == pytest.approx(0)
    assert expected_calibration_error(np.array([0.4, 0.6]), np.array([1.0, 0.0]), bins=2) == pytest.approx(0.6)
    assert expected_calibration_error(np.array([1.0]), np.array([1.0])) == 0
    with pytest.raises(ValueError):
        expected_calibration_error(np.array([]), np.array([]))
