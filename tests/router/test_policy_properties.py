"""Policies under random input: no crash but the declared errors, no overrun, no access outside the allow-list.

Python itself, with the same names bound to the same facts, is what well-typed expressions are compared with.
"""

from __future__ import annotations

import json
import types
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.policy import apply, compile_policy
from router.policy.errors import CostExceeded, ExpressionError, InvalidPolicy
from router.policy.expressions import compile_expression
from router.policy.facts import CHARACTERS_A_UNIT, FACTS, CandidateFacts, Evaluation, RequestFacts, visible_header
from router.policy.functions import FUNCTIONS

often = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

# ---- facts ----

texts = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["", "a", "ab", "Corvo", "x" * 5000])
numbers = st.integers(-5, 5) | st.floats(-2, 2)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=6,
)
requests = st.builds(
    RequestFacts,
    text=texts, model=texts, collection=texts, compose=st.integers(1, 4),
    headers=st.dictionaries(st.sampled_from(["x-a", "x-b"]), texts, max_size=2),
)  # fmt: skip
candidates = st.builds(
    CandidateFacts,
    adapter_id=st.uuids().map(str), document_id=st.sampled_from(["doc_1", "doc_2", "doc_3"]),
    score=numbers, confidence=st.none() | st.floats(0, 1), title=texts, external_id=texts, collection=texts,
    metadata=st.dictionaries(st.sampled_from(["a", "b"]), json_values, max_size=2),
    state=st.sampled_from(["ready", "degraded", "stale"]), age=st.floats(0, 1e4), rank=numbers,
)  # fmt: skip


class Watched:
    """Facts that note what is asked of them."""

    def __init__(self, facts: Any, asked: set[str]) -> None:
        self.facts = facts
        self.asked = asked

    def __getattribute__(self, name: str) -> Any:
        asked = object.__getattribute__(self, "asked")
        asked.add(name)
        value = getattr(object.__getattribute__(self, "facts"), name)
        return WatchedHeaders(value, asked) if name == "headers" else value


class WatchedHeaders(dict[str, str]):
    """Headers that note which are asked for."""

    def __init__(self, headers: dict[str, str], asked: set[str]) -> None:
        super().__init__(headers)
        self.asked = asked

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(f"header {name}")
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(f"header {name}")
        return super().__contains__(name)


def longest(value: Any) -> int:
    """Length of the longest text or list in facts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return max([0, *(longest(one) for one in (*value, *value.values()))])
    return max([len(value), *(longest(one) for one in value)]) if isinstance(value, list) else 0


def evaluate(source: str, request: RequestFacts, candidate: CandidateFacts, budget: int) -> bool | None:
    """The value of an expression that may be anything; None where it is refused or stopped. Checks all promises."""
    try:
        expression = compile_expression(source)
    except ExpressionError as error:
        lines = source.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert 1 <= error.line <= len(lines) and 1 <= error.column <= len(lines[error.line - 1]) + 1
        assert error.message
        return None
    of_request: set[str] = set()
    of_candidate: set[str] = set()
    evaluation = Evaluation(Watched(request, of_request), budget)  # type: ignore[arg-type]
    evaluation.candidate = Watched(candidate, of_candidate)  # type: ignore[assignment]
    try:
        held = expression.holds(evaluation)
    except CostExceeded:
        held = None
    else:
        assert isinstance(held, bool) and evaluation.left >= 0
    headers = {name.removeprefix("header ") for name in of_request if name.startswith("header ")}
    assert of_request - {f"header {name}" for name in headers} <= FACTS["request"].keys()
    assert all(visible_header(name) for name in headers)
    assert of_candidate <= FACTS["candidate"].keys()
    facts = [getattr(request, name) for name in FACTS["request"]]
    facts += [getattr(candidate, name) for name in FACTS["candidate"]]
    most = max([len(source), *(longest(fact) for fact in facts)])
    # Lower case can be three times as long; a list's texts are each compared.
    assert budget - evaluation.left <= expression.nodes * (3 + most) * (1 + 3 * most // CHARACTERS_A_UNIT)
    return held


# ---- sources that may be anything ----

pieces = st.sampled_from(
    [*"()[]{}.,:=<>+-*/%@#'\"\\\n\t; ", "and", "or", "not", "in", "is", "if", "else", "for", "lambda", "True", "None",
     "==", "!=", "**", "request", "candidate", "request.text", "candidate.score", 'request.headers["x-a"]',
     'candidate.metadata["a"]', "__class__", "__import__", "adapter_id", "f'{1}'", "1", "1e9", "0x1", "1j", "'a'",
     *FUNCTIONS, *FACTS["candidate"]]
)  # fmt: skip
soup = st.lists(pieces, max_size=25)
sources = st.text(max_size=60) | soup.map(" ".join) | soup.map("".join)


@often
@given(sources, requests, candidates, st.integers(0, 200))
def test_any_source(source: str, request: RequestFacts, candidate: CandidateFacts, budget: int) -> None:
    evaluate(source, request, candidate, budget)


# ---- well-typed expressions ----

literals = st.text("ab* C", max_size=4).map(lambda text: f'"{text}"')
digits = st.integers(-3, 3).map(str) | st.sampled_from(["0.5", "-1.25", "1000"])


def texts_of(inner: Any) -> Any:
    """Sources of texts."""
    facts = [f"{subject}.{name}" for subject, names in FACTS.items() for name, kind in names.items() if kind == "text"]
    return st.sampled_from([*facts, 'request.headers["x-a"]']) | literals | inner


def well_typed(values: bool) -> Any:
    """Sources of conditions; with `values` also on metadata."""
    text = st.recursive(texts_of(st.nothing()), lambda one: one.map(lambda source: f"lower({source})"), max_leaves=3)
    number = (
        digits
        | st.sampled_from(["candidate.score", "candidate.age", "request.compose"])
        | text.map(lambda one: f"length({one})")
        | st.tuples(text, digits).map(lambda pair: f"number({pair[0]}, {pair[1]})")
    )
    held = ['candidate.metadata["a"]', 'candidate.metadata["b"]["a"]'] if values else []
    value = st.sampled_from(held) if values else st.nothing()
    either_text, either_number = text | value, number | value
    equal = st.sampled_from(["==", "!="])
    order = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
    names = st.sampled_from(["contains", "starts_with", "ends_with", "matches"])
    condition = st.one_of(
        st.sampled_from(["True", "False", '"x-a" in request.headers']),
        st.tuples(either_text, equal, either_text).map(" ".join),
        st.tuples(either_number, order, either_number).map(" ".join),
        st.tuples(either_number, order, either_number, order, either_number).map(" ".join),
        st.tuples(names, either_text, either_text).map(lambda c: f"{c[0]}({c[1]}, {c[2]})"),
        st.tuples(either_text, st.lists(literals, min_size=1, max_size=3)).map(
            lambda c: f"{c[0]} in [{', '.join(c[1])}]"
        ),
        st.tuples(either_number, st.lists(digits, min_size=1, max_size=3)).map(
            lambda c: f"{c[0]} not in [{', '.join(c[1])}]"
        ),
        *([value, st.tuples(literals, value).map(" in ".join)] if values else []),
    )
    return st.recursive(
        condition,
        lambda one: st.one_of(
            one.map(lambda source: f"not ({source})"),
            st.tuples(one, st.sampled_from(["and", "or"]), one).map(lambda c: f"({c[0]}) {c[1]} ({c[2]})"),
        ),
        max_leaves=6,
    )


@often
@given(well_typed(values=False), requests, candidates)
def test_well_typed_expressions_mean_what_they_mean_in_python(
    source: str, request: RequestFacts, candidate: CandidateFacts
) -> None:
    bound = {
        "request": types.SimpleNamespace(
            **{name: getattr(request, name) for name in FACTS["request"] if name != "headers"},
            headers={"x-a": "", **request.headers},
        ),
        "candidate": candidate,
        **{name: function.run for name, function in FUNCTIONS.items()},
    }
    if '"x-a" in' in source:
        bound["request"].headers = request.headers if "x-a" in request.headers else types.MappingProxyType({})
        if 'headers["x-a"]' in source and "x-a" not in request.headers:
            return  # in Python a header that is not there would be an error
    wanted = eval(source, {"__builtins__": {}}, bound)
    assert evaluate(source, request, candidate, 1_000_000) is wanted


@often
@given(well_typed(values=True), requests, candidates, st.integers(0, 300))
def test_conditions_on_metadata(source: str, request: RequestFacts, candidate: CandidateFacts, budget: int) -> None:
    compile_expression(source)
    evaluate(source, request, candidate, budget)


# ---- documents ----

actions: dict[str, Any] = {
    "use": st.sampled_from(["doc_1", "doc_9", "handbook"]),
    "forbid": st.just(True),
    "prefer": st.floats(-1, 1),
    "cap": st.integers(1, 3),
    "require_confidence": st.floats(0, 1),
    "fall_back": st.just("base"),
}
conditions = {"when": well_typed(values=True)}
rules_of_one_action = st.one_of(
    *(st.fixed_dictionaries({name: given_}, optional=conditions) for name, given_ in actions.items())
)


@often
@given(st.text(max_size=80) | st.lists(pieces | st.sampled_from(["version: 1\n", "rules:\n", "- name: a\n  ", "when: ",
       "forbid: true\n", "  ", "&a ", "*a ", "!!str ", "{", "}", "|\n", "? "]), max_size=25).map("".join))  # fmt: skip
def test_any_document(text: str) -> None:
    try:
        compile_policy(text)
    except InvalidPolicy as error:
        lines = text.split("\n")
        assert 1 <= error.line <= len(lines) + 1 and error.column >= 1 and error.message


@often
@given(st.lists(rules_of_one_action, max_size=5), requests, st.lists(candidates, max_size=6), st.integers(0, 400))
def test_any_policy_leaves_a_decision(
    rules: list[dict[str, Any]], request: RequestFacts, found: list[CandidateFacts], budget: int
) -> None:
    document = {"version": 1, "rules": [{"name": f"rule {i}", **rule} for i, rule in enumerate(rules)]}
    policy = compile_policy(json.dumps(document))
    targets = {one.document_id: one for one in found}
    outcome = apply(policy, request, found, targets.get, budget)
    ids = {one.adapter_id for one in found}
    assert outcome.removed | outcome.preferred.keys() | outcome.required.keys() <= ids
    assert all(-1 <= weight <= 1 for weight in outcome.preferred.values())
    assert not outcome.overrun or outcome.falls_back
    assert not (outcome.falls_back and outcome.use)
    if outcome.use is not None:
        assert outcome.use.state != "stale" and outcome.use.adapter_id not in outcome.removed
        assert any(rule.get("use") == outcome.use.document_id for rule in rules)
    if not any("forbid" in rule or "cap" in rule for rule in rules):
        assert not outcome.removed
    # The order in which the candidates come makes no difference to what is forbidden and required.
    turned = apply(policy, request, found[::-1], targets.get, budget=10**9)
    straight = apply(policy, request, found, targets.get, budget=10**9)
    assert turned.required == straight.required and turned.preferred == straight.preferred
