"""Decisions and their reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router.decide import MAX_LISTED, Reason, RouterSettings, abstain, decide, decide_part, pin
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
