"""docs/routing-policy.md: its examples are run, and its tables are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from router.decide import Reason
from router.policy import CandidateFacts, InvalidPolicy, RequestFacts, apply, compile_policy
from router.policy import expressions as language
from router.policy.document import ACTIONS, MAX_RULES, MAX_TOTAL_NODES
from router.policy.expressions import compile_expression
from router.policy.facts import _SECRET, CHARACTERS_A_UNIT, FACTS, MAX_COST, MAX_HEADER_LENGTH, Evaluation
from router.policy.functions import FUNCTIONS
from router.policy.source import MAX_CHARACTERS

TEXT = (Path(__file__).parents[2] / "docs/routing-policy.md").read_text()
(EXAMPLE,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
(GIVEN,) = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
CONDITIONS = re.findall(r"^\| `(.+)` \| (true|false) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("condition", "holds"), CONDITIONS)
def test_conditions_hold_as_the_table_says(condition: str, holds: str) -> None:
    evaluation = Evaluation(RequestFacts(**GIVEN["request"]))
    evaluation.candidate = CandidateFacts(adapter_id="adp_1", **GIVEN["candidate"])
    assert compile_expression(condition).holds(evaluation) is (holds == "true")


def test_the_table_and_the_facts_are_all_there() -> None:
    assert len(CONDITIONS) > 15
    assert GIVEN["request"].keys() == FACTS["request"].keys()
    assert GIVEN["candidate"].keys() == FACTS["candidate"].keys()
    for subject, names in FACTS.items():
        assert all(f"`{subject}.{name}" in TEXT for name in names)
    assert all(f"`{name}(" in TEXT for name in FUNCTIONS)
    assert all(f"| `{action}` |" in TEXT for action in ACTIONS)
    assert all(f"`{part}`" in TEXT for part in _SECRET)
    policy_reasons = [reason for reason in Reason if reason.startswith("policy_")] + [Reason.BELOW_REQUIRED]
    assert all(f"| `{reason}` |" in TEXT for reason in policy_reasons)


def test_bounds_are_those_of_the_code() -> None:
    for bound in (MAX_CHARACTERS, language.MAX_LENGTH, MAX_TOTAL_NODES, MAX_COST, MAX_HEADER_LENGTH):
        assert f"{bound:,}" in TEXT
    assert f"{language.MAX_NODES} names" in TEXT and f"{language.MAX_DEPTH} deep" in TEXT
    assert f"at most {MAX_RULES} rules" in TEXT and f"reading {CHARACTERS_A_UNIT} characters" in TEXT


def test_the_example_does_what_it_says() -> None:
    policy = compile_policy(EXAMPLE)
    assert {rule.action for rule in policy.rules} == set(ACTIONS)
    draft = CandidateFacts("adp_d", "doc_d", rank=0.9, metadata={"stage": "draft"})
    new = CandidateFacts("adp_n", "doc_n", rank=0.55, collection="manuals", metadata={"edition": 2026})
    old = CandidateFacts("adp_o", "doc_o", rank=0.6, collection="manuals", metadata={"edition": 2019})
    archived = CandidateFacts("adp_a", "doc_a", rank=0.4, collection="archive", age=900)
    refunds = CandidateFacts("adp_r", "doc_r", external_id="handbook/refunds")
    found = {"handbook/refunds": refunds}.get
    documents = [draft, old, new, archived]

    guest = apply(policy, RequestFacts("What does it cost?", compose=2), documents, found)
    assert guest.removed == {"adp_d", "adp_o"}  # the draft, and the second of the manuals
    assert guest.preferred == {"adp_n": 0.1}
    assert guest.required == {"adp_n": 0.9, "adp_o": 0.9, "adp_a": 0.9}
    staff = apply(policy, RequestFacts("How heavy is it?", headers={"x-role": "staff"}), documents, found)
    assert staff.removed == frozenset() and staff.required == {}
    assert apply(policy, RequestFacts("May I get a Refund?"), documents, found).use == refunds
    assert apply(policy, RequestFacts("May I get a Refund?", collection="x"), documents, found).use is None
    assert apply(policy, RequestFacts("Who was the first?"), [archived], found).falls_back
    assert not apply(policy, RequestFacts("Who was the first?"), documents, found).falls_back


def test_the_error_is_the_one_shown() -> None:
    text = "version: 1\nrules:\n  - name: drafts\n    when: candidat.score > 1\n    forbid: true\n"
    with pytest.raises(InvalidPolicy) as caught:
        compile_policy(text)
    assert f"Invalid {caught.value}" in TEXT
