"""What policies do to candidates: each action, their order, and what happens where they are at odds."""

from __future__ import annotations

from typing import Any

import pytest

from router.policy import CandidateFacts, PolicyOutcome, RequestFacts, apply, compile_policy

A = CandidateFacts("adp_a", "doc_a", score=0.7, confidence=0.9, collection="old", rank=0.7, title="Corvo")
B = CandidateFacts("adp_b", "doc_b", score=0.6, confidence=0.5, collection="new", rank=0.6, title="Corvo Mini")
C = CandidateFacts("adp_c", "doc_c", score=0.5, confidence=0.2, collection="new", rank=0.5, external_id="c",
                   state="degraded")  # fmt: skip
BEST_FIRST = [A, B, C]


def outcome(
    *rules: str, request: RequestFacts | None = None, found: list[CandidateFacts] | None = None, **options: Any
) -> PolicyOutcome:
    lines = "".join(f"\n- {{name: r{number}, {rule}}}" for number, rule in enumerate(rules))
    policy = compile_policy(f"version: 1\nrules:{lines or ' []'}")
    candidates = BEST_FIRST if found is None else found
    known = {name: one for one in (A, B, C) for name in (one.document_id, one.external_id)}
    return apply(policy, request or RequestFacts("How heavy?"), candidates, known.get, **options)


def test_without_rules_nothing_happens() -> None:
    assert outcome() == PolicyOutcome()


def test_forbid_removes() -> None:
    found = outcome("when: 'candidate.collection == \"new\"', forbid: true")
    assert found.removed == {"adp_b", "adp_c"}
    (step,) = found.steps
    assert (step.rule, step.action, step.documents, step.count) == ("r0", "forbid", ("doc_b", "doc_c"), 2)
    assert outcome("when: length(request.text) > 3, forbid: true").removed == {"adp_a", "adp_b", "adp_c"}
    assert outcome("when: length(request.text) > 30, forbid: true") == PolicyOutcome()


def test_preferences_add_up_within_bounds() -> None:
    rules = ["when: candidate.score < 0.65, prefer: 0.6", "when: candidate.score < 0.55, prefer: 0.6", "prefer: -0.1"]
    found = outcome(*rules)
    assert found.preferred == pytest.approx({"adp_a": -0.1, "adp_b": 0.5, "adp_c": 0.9})
    assert [step.effect for step in found.steps] == ["preferred by +0.6", "preferred by +0.6", "preferred by -0.1"]


def test_the_largest_required_confidence_counts() -> None:
    found = outcome("require_confidence: 0.3", "when: candidate.score > 0.65, require_confidence: 0.8",
                    "require_confidence: 0.5")  # fmt: skip
    assert found.required == {"adp_a": 0.8, "adp_b": 0.5, "adp_c": 0.5}


def test_what_is_forbidden_is_forbidden_whatever_comes_before() -> None:
    found = outcome("use: doc_b", "prefer: 0.1", "when: 'candidate.title == \"Corvo Mini\"', forbid: true")
    assert found.use is None and found.removed == {"adp_b"} and "adp_b" not in found.preferred
    assert [step.effect for step in found.steps if step.action == "use"] == ["passed over: rule 'r2' forbids it"]


def test_the_first_use_or_fall_back_that_holds_decides() -> None:
    assert outcome("use: c", "fall_back: base").use == C
    found = outcome("fall_back: base", "use: c")
    assert found.falls_back and found.use is None
    assert outcome("when: False, fall_back: base", "use: c").use == C
    assert outcome("use: nowhere", "use: doc_b").use == B
    assert "no document 'nowhere'" in outcome("use: nowhere").steps[0].effect


def test_use_asks_about_the_document_that_it_names() -> None:
    assert outcome("when: 'candidate.state == \"degraded\"', use: c").use == C
    assert outcome("when: 'candidate.state == \"degraded\"', use: doc_a").use is None
    # It need not be among the candidates.
    assert outcome("when: candidate.score > 0.4, use: c", found=[A]).use == C
    assert outcome("when: 'candidate.title == \"Corvo\"', forbid: true", "use: doc_a", found=[]).use is None
    stale = CandidateFacts("adp_s", "doc_s", state="stale")
    policy = compile_policy("version: 1\nrules: [{name: r, use: s}]")
    found = apply(policy, RequestFacts("?"), [], lambda _: stale)
    assert found.use is None and found.steps[0].effect == "passed over: its adapter is stale"


def test_fall_back_asks_about_the_first_candidate() -> None:
    newest = "when: 'candidate.collection == \"new\"', fall_back: base"
    assert not outcome(newest).falls_back
    assert outcome(newest, "when: 'candidate.collection == \"old\"', forbid: true").falls_back
    assert outcome(newest, "when: 'candidate.collection == \"new\"', prefer: 0.2").falls_back
    assert not outcome(newest, found=[]).falls_back
    assert outcome("fall_back: base", found=[]).falls_back
    assert outcome(newest, found=[C, B, A][:2]).steps[0].documents == ("doc_b",)


def test_a_cap_holds_where_documents_answer_together() -> None:
    cap = "when: 'candidate.collection == \"new\"', cap: 1"
    assert outcome(cap).removed == frozenset()
    together = RequestFacts("How heavy?", compose=3)
    assert outcome(cap, request=together).removed == {"adp_c"}
    assert outcome(cap, "when: candidate.score < 0.55, prefer: 0.3", request=together).removed == {"adp_b"}
    assert outcome("cap: 2", request=together).removed == {"adp_c"}
    assert outcome("cap: 2", cap, request=together, found=[C, B, A]).removed == {"adp_c"}


def test_over_the_budget_the_base_answers() -> None:
    found = outcome("when: candidate.score < 0, forbid: true", budget=5)
    assert found.falls_back and found.overrun and found.removed == frozenset()
    assert found.steps[-1].rule == "r0" and found.steps[-1].effect.startswith("stopped, the base answers")
    # No policy can come near the bound with the number of candidates that there is at most.
    rule = "when: '{}', prefer: 0.01".format(" and ".join(["candidate.score > -1"] * 36))
    most = [CandidateFacts(f"adp_{i}", f"doc_{i}", score=0.5) for i in range(64)]
    found = outcome(*[rule] * 10, found=most)
    assert not found.overrun and len(found.preferred) == 64


def test_steps_name_a_few_documents_of_many() -> None:
    many = [CandidateFacts(f"adp_{i}", f"doc_{i}") for i in range(64)]
    (step,) = outcome("forbid: true", found=many).steps
    assert (len(step.documents), step.count) == (20, 64)
