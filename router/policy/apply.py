"""What a policy does to one request's candidates.

Rules are asked in the document's order, in four rounds:

1. `forbid`, of each candidate. What one rule forbids no other rule allows.
2. `prefer` and `require_confidence`, of each candidate that is left. Weights add up, within ±MAX_PREFERENCE; of several
   confidences the largest counts.
3. `use` and `fall_back`. The first of these that holds ends the policy. `use` is asked of the document that it names,
   and passed over where that is not there, forbidden or stale; `fall_back` is asked of the first candidate.
4. `cap`, of each candidate, where several documents may answer together: the first so many stay.

A condition that names no candidate has one value for the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from router.policy.document import MAX_PREFERENCE, Action, CompiledPolicy, CompiledRule
from router.policy.errors import CostExceeded
from router.policy.facts import MAX_COST, CandidateFacts, Evaluation, RequestFacts

STALE = "stale"
MAX_LISTED = 20
"""Documents that a step names."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rule did. `documents` are those that it concerned, at most MAX_LISTED of `count`; `effect` says what
    became of them, in words."""

    rule: str
    action: Action
    effect: str
    documents: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class PolicyOutcome:
    """What is left to decide on. Adapters stand for their documents.

    `removed` may not answer. `preferred` is what to add to the ranks of others, `required` the least confidence that
    they need. With `falls_back` the base answers; else, where `use` is set, that document does, whatever its score.
    Where the policy cost more than its budget, `overrun` says so and the base answers.
    """

    removed: frozenset[str] = frozenset()
    preferred: Mapping[str, float] = field(default_factory=dict)
    required: Mapping[str, float] = field(default_factory=dict)
    use: CandidateFacts | None = None
    falls_back: bool = False
    overrun: bool = False
    steps: tuple[Step, ...] = ()


def nothing_found(name: str) -> None:
    """A way to find `use` targets for those who have none."""
    return None


def apply(
    policy: CompiledPolicy,
    request: RequestFacts,
    candidates: Sequence[CandidateFacts],
    find: Callable[[str], CandidateFacts | None] = nothing_found,
    budget: int = MAX_COST,
) -> PolicyOutcome:
    """Ask all rules; see the module. `candidates` may come in any order; `find` gives the document of an ID or external
    ID that a `use` rule names, None where routing cannot choose it. Raises nothing of its own.
    """
    run = _Run(policy, Evaluation(request, budget), candidates, find)
    try:
        return run.outcome()
    except CostExceeded as error:
        assert run.rule is not None  # only conditions cost anything
        step = Step(run.rule.name, run.rule.action, f"stopped, the base answers: {error}")
        return PolicyOutcome(falls_back=True, overrun=True, steps=(*run.steps, step))


class _Run:
    def __init__(
        self,
        policy: CompiledPolicy,
        evaluation: Evaluation,
        candidates: Sequence[CandidateFacts],
        find: Callable[[str], CandidateFacts | None],
    ) -> None:
        self.steps: list[Step] = []
        self.rule: CompiledRule | None = None
        """The rule that is being asked."""
        self._rules = policy.rules
        self._evaluation = evaluation
        self._candidates = list(candidates)
        self._find = find
        self._removed: set[str] = set()
        self._preferred: dict[str, float] = {}
        self._required: dict[str, float] = {}

    def outcome(self) -> PolicyOutcome:
        for rule in self._of("forbid"):
            self._remove(rule, self._holding(rule), "forbidden")
        for rule in self._of("prefer", "require_confidence"):
            holding = self._holding(rule)
            if rule.action == "prefer":
                for one in holding:
                    total = self._preferred.get(one.adapter_id, 0.0) + rule.value
                    self._preferred[one.adapter_id] = max(-MAX_PREFERENCE, min(MAX_PREFERENCE, total))
                self._note(rule, f"preferred by {rule.value:+g}", holding)
            else:
                for one in holding:
                    self._required[one.adapter_id] = max(rule.value, self._required.get(one.adapter_id, 0.0))
                self._note(rule, f"need a confidence of {rule.value:g}", holding)
        self._candidates.sort(key=lambda one: -(one.rank + self._preferred.get(one.adapter_id, 0.0)))
        for rule in self._of("use", "fall_back"):
            if rule.action == "use":
                used = self._use(rule)
                if used is not None:
                    return self._done(use=used)
            elif self._falls_back(rule):
                return self._done(falls_back=True)
        if self._evaluation.request.compose > 1:
            for rule in self._of("cap"):
                self._remove(rule, self._holding(rule)[rule.value :], f"over the cap of {rule.value}")
        return self._done()

    def _of(self, *actions: Action) -> Sequence[CompiledRule]:
        return [rule for rule in self._rules if rule.action in actions]

    def _holds(self, rule: CompiledRule, candidate: CandidateFacts | None) -> bool:
        self.rule = rule
        self._evaluation.candidate = candidate
        return rule.when.holds(self._evaluation)

    def _holding(self, rule: CompiledRule) -> list[CandidateFacts]:
        """The candidates for which the rule holds, in their order."""
        if rule.when.uses_candidate:
            return [one for one in self._candidates if self._holds(rule, one)]
        return list(self._candidates) if self._holds(rule, None) else []

    def _remove(self, rule: CompiledRule, gone: Sequence[CandidateFacts], effect: str) -> None:
        ids = {one.adapter_id for one in gone}
        self._removed |= ids
        self._candidates = [one for one in self._candidates if one.adapter_id not in ids]
        self._note(rule, effect, gone)

    def _use(self, rule: CompiledRule) -> CandidateFacts | None:
        if not rule.when.uses_candidate and not self._holds(rule, None):
            return None
        found = self._find(rule.value)
        if found is None:
            self.steps.append(Step(rule.name, rule.action, f"passed over: no document '{rule.value}' to choose here"))
            return None
        if rule.when.uses_candidate and not self._holds(rule, found):
            return None
        against = next((other for other in self._of("forbid") if self._holds(other, found)), None)
        if against is not None or found.state == STALE:
            why = f"rule '{against.name}' forbids it" if against is not None else "its adapter is stale"
            self._note(rule, f"passed over: {why}", [found])
            return None
        self._note(rule, "answers", [found])
        return found

    def _falls_back(self, rule: CompiledRule) -> bool:
        first = self._candidates[0] if self._candidates else None
        if rule.when.uses_candidate and first is None or not self._holds(rule, first):
            return False
        self._note(rule, "the base answers", [first] if rule.when.uses_candidate and first is not None else [], True)
        return True

    def _note(self, rule: CompiledRule, effect: str, concerned: Sequence[CandidateFacts], always: bool = False) -> None:
        if concerned or always:
            documents = tuple(one.document_id for one in concerned[:MAX_LISTED])
            self.steps.append(Step(rule.name, rule.action, effect, documents, len(concerned)))

    def _done(self, use: CandidateFacts | None = None, falls_back: bool = False) -> PolicyOutcome:
        return PolicyOutcome(
            frozenset(self._removed), self._preferred, self._required, use, falls_back, False, tuple(self.steps)
        )
