"""What the package brings along, and questions grouped by likeness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import router.shipped
from router.calibrate import features
from router.clusters import clusters
from router.decide import DEFAULT_CONFIDENCE
from router.embed import MINILM, MiniLmEncoder
from router.shipped import general_chat, shipped_calibration


def test_general_chat() -> None:
    chat = general_chat()
    assert len(chat) >= 150 and len(set(chat)) == len(chat) and all(line == line.strip() != "" for line in chat)


def test_a_calibration_is_shipped_for_the_default_encoder_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = MiniLmEncoder.load(threads=1)
    shipped = shipped_calibration(MINILM, encoder.version)
    assert shipped is not None and encoder.id == MINILM and shipped.version == 0 and not shipped.offsets
    assert shipped.quality is not None and shipped.quality.examples > 500
    assert shipped_calibration(MINILM, "another") is shipped_calibration("another", encoder.version) is None
    monkeypatch.setattr(router.shipped, "CALIBRATION_FILE", tmp_path / "none.json")
    shipped_calibration.cache_clear()
    assert shipped_calibration(MINILM, encoder.version) is None
    shipped_calibration.cache_clear()


def test_the_shipped_calibration_says_what_it_should() -> None:
    encoder = MiniLmEncoder.load(threads=1)
    shipped = shipped_calibration(MINILM, encoder.version)
    assert shipped is not None

    def p(similarity: float, word_share: float, margin: float | None) -> float:
        return shipped.probability(features(similarity, word_share, 0.02, margin))

    assert p(0.75, 0.8, 0.2) > 0.9 and p(0.75, 0.8, None) > 0.7
    for margin in (0.0, 0.05, None):
        assert p(0.15, 0.1, margin) < 0.3 < DEFAULT_CONFIDENCE
    rising = [p(x, x, 0.1) for x in np.linspace(0, 1, 11)]
    assert rising == sorted(rising) and p(0.6, 0.6, 0.15) > p(0.6, 0.6, 0.02) > p(0.6, 0.6, -0.02)


def test_clusters() -> None:
    def near(axis: int, off: float) -> list[float]:
        vector = np.zeros(5)
        vector[axis], vector[4] = 1, off
        return list(vector / np.linalg.norm(vector))

    rows = [near(0, 0.1), near(1, 0), near(0, 0.0), near(2, 0.3), near(0, -0.1), near(1, 0.2)]
    groups = clusters(np.array(rows, dtype=np.float32))
    assert [sorted(group) for group in groups] == [[0, 2, 4], [1, 5], [3]]
    assert groups[0][0] == 2, "the most typical one first"
    assert clusters(np.zeros((0, 5), dtype=np.float32)) == [] and clusters(np.ones((1, 5), dtype=np.float32)) == [[0]]
