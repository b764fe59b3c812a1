"""Decisions and their reasons."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.calibrate import Calibration
from router.decide import MAX_LISTED, Reason, RouterSettings, abstain, confidences, decide, decide_part, pin
from router.index import AdapterEntry, Scored, State

SETTINGS = RouterSettings(threshold=0.4)


def scored(
    name: str, score: float, state: State = State.READY, rank: float | None = None, part: int = 0, parts: int = 1
) -> Scored:
    vector = np.ones((1, 2), dtype=np.float32)
    entry = AdapterEntry.of_document(
        name, "ten_a", f"doc_{name}", name.title(), "", vector, state=state, part=part, parts=parts
    )
    return Scored(entry, score, score, 0.5, score if rank is None else rank)


def test_the_best_above_the_threshold_is_taken() -> None:
    decision = decide([scored("a", 0.7), scored("b", 0.6)], SETTINGS)
    assert (decision.adapter_id, decision.document_id, decision.reason) == ("a", "doc_a", Reason.MATCHED)
    assert decision.score == 0.7 and decision.margin == pytest.approx(0.1) and decision.threshold == 0.4
    assert [(c.adapter_id, c.title, c.score) for c in decision.candidates] == [("a", "A", 0.7), ("b", "B", 0.6)]


def test_exactly_the_threshold_is_enough() -> None:
    assert decide([scored("a", 0.4)], SETTINGS).reason is Reason.MATCHED


def test_a_single_candidate_has_no_margin() -> None:
    decision = decide([scored("a", 0.5)], RouterSettings(0.4, min_margin=0.2))
    assert decision.margin is None and decision.reason is Reason.MATCHED


def test_below_the_threshold_the_base_answers_and_the_score_is_told() -> None:
    decision = decide([scored("a", 0.39), scored("b", 0.1)], SETTINGS)
    assert (decision.adapter_id, decision.document_id, decision.reason) == (None, None, Reason.BELOW_THRESHOLD)
    assert decision.score == 0.39 and len(decision.candidates) == 2


def test_a_score_that_is_no_number_is_never_good_enough() -> None:
    assert decide([scored("a", math.nan)], SETTINGS).reason is Reason.BELOW_THRESHOLD


def test_the_order_of_candidates_is_by_rank_and_so_is_the_margin() -> None:
    decision = decide([scored("a", 0.7, rank=0.7), scored("b", 0.75, rank=0.5)], SETTINGS)
    assert decision.adapter_id == "a" and decision.score == 0.7 and decision.margin == pytest.approx(0.2)


def test_near_ties_are_ambiguous_where_a_margin_is_asked_for() -> None:
    results = [scored("a", 0.70), scored("b", 0.69)]
    assert decide(results, RouterSettings(0.4, min_margin=0.05)).reason is Reason.AMBIGUOUS
    assert decide(results, SETTINGS).reason is Reason.MATCHED


def test_the_right_but_stale_adapter_is_not_replaced_by_the_next_best() -> None:
    decision = decide([scored("a", 0.7, state=State.STALE), scored("b", 0.6)], SETTINGS)
    assert decision.adapter_id is None and decision.reason is Reason.STALE
    assert decide([scored("b", 0.6), scored("a", 0.5, state=State.STALE)], SETTINGS).adapter_id == "b"


def test_the_right_but_degraded_adapter_is_used_only_if_the_settings_say_so() -> None:
    results = [scored("a", 0.7, state=State.DEGRADED, part=2, parts=3), scored("b", 0.6)]
    decision = decide(results, SETTINGS)
    assert (decision.adapter_id, decision.reason) == (None, Reason.DEGRADED)
    assert decision.part is None and decision.parts is None and not decision.degraded
    assert [(c.state, c.part, c.parts) for c in decision.candidates] == [("degraded", 2, 3), ("ready", 0, 1)]
    told = decide(results, RouterSettings(0.4, use_degraded=True))
    assert (told.adapter_id, told.reason, told.part, told.parts, told.degraded) == ("a", Reason.MATCHED, 2, 3, True)
    assert decide([scored("b", 0.6), scored("a", 0.5, state=State.DEGRADED)], SETTINGS).adapter_id == "b"
    # What is not about the document at all says so first.
    assert decide([scored("a", 0.1, state=State.DEGRADED)], SETTINGS).reason is Reason.BELOW_THRESHOLD
    stale = [scored("a", 0.7, state=State.STALE)]
    assert decide(stale, RouterSettings(0.4, use_degraded=True)).reason is Reason.STALE


@pytest.mark.parametrize("state", State)
def test_of_a_named_document_the_best_part_answers_whatever_its_score_and_state(state: State) -> None:
    results = [scored("a", 0.05, state=state, part=4, parts=9), scored("b", 0.04, part=1, parts=9)]
    decision = decide_part(results, RouterSettings(0.4, min_margin=0.2))
    assert (decision.adapter_id, decision.reason, decision.part, decision.parts) == ("a", Reason.PINNED, 4, 9)
    assert decision.score == 0.05 and decision.margin is None
    assert decision.degraded == (state is State.DEGRADED)
    assert [c.part for c in decision.candidates] == [4, 1]
    assert decide_part([], SETTINGS).reason is Reason.NO_CANDIDATES


def test_nothing_found() -> None:
    decision = decide([], SETTINGS)
    assert decision.reason is Reason.NO_CANDIDATES
    assert decision.score is decision.margin is decision.adapter_id is None and decision.candidates == ()


def test_without_search() -> None:
    assert abstain(Reason.EMPTY_QUERY, SETTINGS).reason is Reason.EMPTY_QUERY
    assert abstain(Reason.BASE_REQUESTED, SETTINGS).adapter_id is None
    pinned = pin("adp_1", "doc_1", SETTINGS)
    assert (pinned.adapter_id, pinned.document_id, pinned.reason) == ("adp_1", "doc_1", Reason.PINNED)
    assert (pinned.part, pinned.parts, pinned.degraded) == (0, 1, False)


def test_few_candidates_are_listed() -> None:
    assert len(decide([scored(f"a{i}", 0.5) for i in range(20)], SETTINGS).candidates) == MAX_LISTED


def test_documents_that_are_good_enough_are_composed() -> None:
    results = [scored("a", 0.7), scored("b", 0.6), scored("c", 0.39), scored("d", 0.4)]
    decision = decide(results, SETTINGS, compose=3)
    assert [(one.adapter_id, one.document_id, one.score, one.weight) for one in decision.adapters] == [
        ("a", "doc_a", 0.7, 1.0), ("b", "doc_b", 0.6, 1.0), ("d", "doc_d", 0.4, 1.0)
    ]
    assert (decision.adapter_id, decision.reason) == ("a", Reason.MATCHED)
    assert [one.adapter_id for one in decide(results, SETTINGS, compose=2).adapters] == ["a", "b"]
    assert [one.adapter_id for one in decide(results, SETTINGS).adapters] == ["a"]


def test_what_may_not_be_used_is_not_composed() -> None:
    results = [scored("a", 0.7), scored("b", 0.6, state=State.DEGRADED), scored("c", 0.6, state=State.STALE)]
    assert [one.adapter_id for one in decide(results, SETTINGS, compose=3).adapters] == ["a"]
    told = decide(results, RouterSettings(0.4, use_degraded=True), compose=3)
    assert [(one.adapter_id, one.degraded) for one in told.adapters] == [("a", False), ("b", True)]
    # As with one adapter: where the best may not answer, the others would answer about something else.
    assert decide(results[1:], SETTINGS, compose=2).adapters == ()


def test_a_tie_is_no_obstacle_to_composing() -> None:
    results = [scored("a", 0.7), scored("b", 0.69)]
    strict = RouterSettings(0.4, min_margin=0.2)
    assert decide(results, strict).adapters == ()
    assert [one.adapter_id for one in decide(results, strict, compose=2).adapters] == ["a", "b"]


def test_the_base_and_pins_list_who_answers() -> None:
    assert decide([scored("a", 0.1)], SETTINGS, compose=2).adapters == ()
    assert decide([], SETTINGS, compose=2).adapters == ()
    assert [one.adapter_id for one in pin("adp_1", None, SETTINGS).adapters] == ["adp_1"]
    parts = [scored("a1", 0.3, part=1, parts=2), scored("a0", 0.2, part=0, parts=2)]
    assert [one.adapter_id for one in decide_part(parts, SETTINGS).adapters] == ["a1"]


def steep(confidence_of_score: float = 20.0) -> Calibration:
    """A calibration by similarity, which these results have in place of their score, and margin."""
    return Calibration("e", "1", "", (confidence_of_score, 0.0, 10.0, 0.0, 0.0), -0.5 * confidence_of_score)


def test_a_calibrated_decision_is_by_confidence() -> None:
    results = [scored("a", 0.7), scored("b", 0.6)]
    decision = decide(results, RouterSettings(0.99, confidence=0.9), calibration=steep())
    assert decision.reason is Reason.MATCHED and decision.threshold == 0.9, "the score's threshold does not count"
    first, second = decision.candidates
    assert decision.confidence == first.confidence == pytest.approx(1 / (1 + math.exp(-5)))
    assert second.margin == pytest.approx(-0.1) and second.confidence == pytest.approx(1 / (1 + math.exp(-1)))
    assert decision.adapters[0].confidence == first.confidence
    low = decide([scored("a", 0.5), scored("b", 0.1)], RouterSettings(confidence=0.99), calibration=steep())
    assert (low.adapter_id, low.reason) == (None, Reason.BELOW_THRESHOLD) and low.confidence is not None
    assert decide([scored("a", math.nan)], SETTINGS, calibration=steep()).reason is Reason.BELOW_THRESHOLD
    uncalibrated = decide(results, SETTINGS)
    assert uncalibrated.confidence is None and uncalibrated.candidates[0].threshold == 0.4


def test_what_only_a_tie_speaks_against_is_ambiguous() -> None:
    results = [scored("a", 0.55), scored("b", 0.54)]
    settings = RouterSettings(confidence=0.8)
    assert decide(results, settings, calibration=steep()).reason is Reason.AMBIGUOUS
    assert decide([scored("a", 0.55), scored("b", 0.34)], settings, calibration=steep()).reason is Reason.MATCHED
    assert decide([scored("a", 0.2), scored("b", 0.19)], settings, calibration=steep()).reason is Reason.BELOW_THRESHOLD


def test_an_adapters_own_threshold_counts() -> None:
    calibration = replace(steep(), offsets={"a": -2.0, "b": 2.0})
    decision = decide([scored("a", 0.55), scored("b", 0.3)], RouterSettings(confidence=0.8), calibration=calibration)
    assert decision.adapter_id is None and decision.threshold > 0.95
    assert [c.threshold for c in decision.candidates] == pytest.approx([calibration.threshold("a", 0.8),
                                                                        calibration.threshold("b", 0.8)])
    other = decide([scored("b", 0.53), scored("a", 0.4)], RouterSettings(confidence=0.8), calibration=calibration)
    assert other.adapter_id == "b" and other.confidence is not None and other.confidence < 0.9


def test_a_policy_may_require_more_confidence() -> None:
    results = [scored("a", 0.7), scored("b", 0.6)]
    decide_with = [decide(results, SETTINGS, calibration=steep(), required={"a": wanted}) for wanted in (0.9, 0.999)]
    assert [d.reason for d in decide_with] == [Reason.MATCHED, Reason.BELOW_REQUIRED]
    assert decide_with[1].adapter_id is None and decide_with[1].threshold == 0.999
    assert decide(results, SETTINGS, required={"b": 0.9}).reason is Reason.MATCHED
    assert decide(results, SETTINGS, required={"a": 0.1}).reason is Reason.BELOW_REQUIRED, "nothing is calibrated"
    assert decide([scored("a", 0.1)], SETTINGS, required={"a": 0.1}).reason is Reason.BELOW_THRESHOLD


def test_a_conversation_stays_with_its_document_unless_another_leads_clearly() -> None:
    settings = RouterSettings(0.4, switch_margin=0.05)
    near, clear = [scored("a", 0.60), scored("b", 0.57)], [scored("a", 0.70), scored("b", 0.57)]
    decision = decide(near, settings, held="doc_b")
    assert (decision.adapter_id, decision.reason) == ("b", Reason.CONTINUED)
    assert decision.margin == pytest.approx(0.02) and decision.candidates[0].rank == 0.57
    assert decide(clear, settings, held="doc_b").adapter_id == "a"
    assert decide(near, settings, held="doc_a").reason is Reason.MATCHED
    assert decide(near, settings, held="doc_gone").adapter_id == "a"
    assert decide(near, RouterSettings(0.4, switch_margin=0.0), held="doc_b").adapter_id == "a"
    # Small talk stays with the base: the document itself has to be good enough.
    assert decide([scored("a", 0.2), scored("b", 0.19)], settings, held="doc_b").reason is Reason.BELOW_THRESHOLD
    calibrated = decide([scored("a", 0.60), scored("b", 0.56)], settings, calibration=steep(), held="doc_b")
    plain = decide([scored("a", 0.60), scored("b", 0.56)], settings, calibration=steep())
    confidence = {c.adapter_id: c.confidence for c in plain.candidates}
    assert calibrated.adapter_id == "b" and calibrated.confidence is not None
    assert calibrated.confidence > (confidence["b"] or 0)


def test_documents_composed_do_not_count_against_each_other() -> None:
    results = [scored("a", 0.62), scored("b", 0.61), scored("c", 0.2)]
    settings = RouterSettings(confidence=0.97)
    assert decide(results, settings, calibration=steep()).adapters == ()
    together = decide(results, settings, compose=2, calibration=steep())
    assert [one.adapter_id for one in together.adapters] == ["a", "b"]
    assert [c.margin for c in together.candidates] == pytest.approx([0.42, 0.41, -0.41])
    alone = decide(results[:2], settings, compose=2, calibration=steep())
    assert [c.margin for c in alone.candidates] == [None, None]


def test_confidences_are_those_of_the_decision() -> None:
    results = [scored("a", 0.7), scored("b", 0.6)]
    found = confidences(results, SETTINGS, calibration=steep(), held="doc_b")
    decision = decide(results, SETTINGS, calibration=steep(), held="doc_b")
    assert found == {c.adapter_id: c.confidence for c in decision.candidates}
    assert confidences(results, SETTINGS) == {} == confidences([], SETTINGS, calibration=steep())


def test_every_reason_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \| (?:adapter|base) \|", page, re.MULTILINE))
    # The last is the ingress' own.
    assert documented == {*(str(reason) for reason in Reason), "adapter_unavailable"}
