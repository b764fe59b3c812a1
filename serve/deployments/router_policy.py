"""Tenants' routing policies in the router: which is in force, and what it makes of a decision."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from router.calibrate import Calibration
from router.decide import Decision, Reason, RouterSettings, abstain, confidences, decide, decide_part
from router.index import AdapterEntry, Scored, State
from router.policy import CandidateFacts, CompiledPolicy, InvalidPolicy, RequestFacts, Step, apply, compile_policy
from serve.registry import Registry
from serve.registry.records import DocumentFacts, RecordedDecision

logger = logging.getLogger(__name__)

MAX_TENANTS = 1000
DEPTHS = (64, 256)
"""How many of the best documents rules are asked about; more where they forbid all of the first."""
_DAY_S = 86_400.0
_NOT_GOOD_ENOUGH = (Reason.BELOW_THRESHOLD, Reason.BELOW_REQUIRED, Reason.AMBIGUOUS)
_NOT_ROUTED = (Reason.PINNED, Reason.BASE_REQUESTED, Reason.EMPTY_QUERY, Reason.NOT_EMBEDDED)
_SET_ASIDE = Step("(all)", "prefer", "set aside, since with it no document would be good enough")
# What stands in for a stored policy that this program cannot read: nothing is answered against its rules.
_UNREADABLE = compile_policy("version: 1\nrules: [{name: this policy cannot be read, fall_back: base}]")

Search = Callable[[int], Sequence[Scored]]
"""The best so many documents."""
Find = Callable[[str], Scored | None]
"""One document as a search result, by ID."""


@dataclass(frozen=True, slots=True)
class Deciding:
    """What a decision rests on beside the policy; see `router.decide.decide`."""

    settings: RouterSettings
    compose: int = 1
    calibration: Calibration | None = None
    held: str | None = None

    def decide(
        self,
        results: Sequence[Scored],
        required: Mapping[str, float] | None = None,
        preferred: Mapping[str, float] | None = None,
    ) -> Decision:
        """The decision on search results."""
        return decide(
            results,
            self.settings,
            self.compose,
            calibration=self.calibration,
            required=required,
            preferred=preferred,
            held=self.held,
        )

    def confidences(self, results: Sequence[Scored]) -> dict[str, float]:
        """Adapter ID -> confidence without the policy; empty without a calibration."""
        return confidences(results, self.settings, self.compose, calibration=self.calibration, held=self.held)


@dataclass
class Policy:
    """A compiled policy, and what was read about the tenant's documents for it, as of change `seq`."""

    tenant_id: str
    number: int
    compiled: CompiledPolicy
    registry: Registry
    clock: Callable[[], float]
    seq: int
    _documents: dict[str, DocumentFacts | None] = field(default_factory=dict)
    _ids: dict[str, str | None] = field(default_factory=dict)
    _collections: dict[str, str] = field(default_factory=dict)

    def collection_name(self, collection_id: str | None) -> str:
        """The name of a collection; empty for none."""
        if collection_id is None:
            return ""
        if collection_id not in self._collections:
            self._collections |= {one.id: one.name for one in self.registry.list_collections(self.tenant_id)}
        return self._collections.get(collection_id, "")

    def decide(self, request: RequestFacts, search: Search, find: Find, deciding: Deciding) -> Decision:
        """The decision under this policy, with the steps that led to it."""
        now = self.clock()
        for depth in DEPTHS:
            results = search(depth)
            facts = self._facts_of(results, deciding, now)
            outcome = apply(self.compiled, request, facts, self._target(results, find, deciding, now))
            left = [one for one in results if one.entry.adapter_id not in outcome.removed]
            if left or len(results) < depth:
                break
        if outcome.falls_back:
            # What a policy may forbid is not shown either.
            return _by_base(deciding.decide([] if outcome.overrun else left), outcome.steps)
        if outcome.use is not None:
            used = self._named(outcome.use.document_id, results, find)
            return replace(_decide_named(used, deciding.settings), policy=outcome.steps)
        if results and not left:
            return replace(abstain(Reason.POLICY_FORBIDS, deciding.settings), policy=outcome.steps)
        decision = deciding.decide(left, outcome.required, outcome.preferred)
        if outcome.preferred and decision.reason in _NOT_GOOD_ENOUGH:
            # Preferences choose among documents that would do; they do not leave a question to the base.
            plain = deciding.decide(left, outcome.required)
            if plain.adapter_id is not None:
                return replace(plain, policy=(*outcome.steps, _SET_ASIDE))
        return replace(decision, policy=outcome.steps)

    def _target(
        self, results: Sequence[Scored], find: Find, deciding: Deciding, now: float
    ) -> Callable[[str], CandidateFacts | None]:
        """A way from the name that a rule gives to the facts of a document."""

        def target(name: str) -> CandidateFacts | None:
            found = self._named(name, results, find)
            if found is None:
                return None
            among = list(results) if found in results else sorted([*results, found], key=lambda one: -one.rank)
            return self._facts_of(among, deciding, now)[among.index(found)]

        return target

    def _named(self, name: str, results: Sequence[Scored], find: Find) -> Scored | None:
        """The document that a rule names, as a search result."""
        if name not in self._ids:
            document = self.registry.get_document(self.tenant_id, name)
            self._ids[name] = None if document is None else document.id
        document_id = self._ids[name]
        if document_id is None:
            return None
        return next((one for one in results if one.entry.document_id == document_id), None) or find(document_id)

    def _facts_of(self, results: Sequence[Scored], deciding: Deciding, now: float) -> list[CandidateFacts]:
        missing = [one.entry.document_id for one in results if one.entry.document_id not in self._documents]
        if missing:
            found = {one.document_id: one for one in self.registry.document_facts(self.tenant_id, missing)}
            self._documents |= {document_id: found.get(document_id) for document_id in missing}
        known = deciding.confidences(results)
        return [
            _facts(one, self._documents.get(one.entry.document_id), known.get(one.entry.adapter_id), now)
            for one in results
        ]


class TenantPolicies:
    """The policy in force of each tenant, as new as the registry. May be shared by threads."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch; documents' ages are reckoned by it."""
        self._registry = registry
        self._clock = clock
        self._kept: OrderedDict[str, tuple[int, Policy | None]] = OrderedDict()
        self._lock = threading.Lock()

    def current(self, tenant_id: str, seq: int) -> Policy | None:
        """The policy in force at the tenant's change `seq` or later; None for a tenant without rules.

        Reads the registry only where the tenant's documents or policy have changed since the last call.
        """
        with self._lock:
            kept = self._kept.get(tenant_id)
            if kept is not None and kept[0] == seq:
                self._kept.move_to_end(tenant_id)
                return kept[1]
        before = kept[1] if kept is not None else None
        policy = self._read(tenant_id, seq, before)
        with self._lock:
            self._kept[tenant_id] = seq, policy
            self._kept.move_to_end(tenant_id)
            while len(self._kept) > MAX_TENANTS:
                self._kept.popitem(last=False)
        return policy

    def proposed(self, tenant_id: str, text: str) -> Policy:
        """A policy that is not in force. Raises InvalidPolicy."""
        return Policy(tenant_id, 0, compile_policy(text), self._registry, self._clock, -1)

    def _read(self, tenant_id: str, seq: int, before: Policy | None) -> Policy | None:
        stored = self._registry.current_policy(tenant_id)
        if stored is None:
            return None
        if before is not None and before.number == stored.number:
            compiled = before.compiled
        else:
            try:
                compiled = compile_policy(stored.text)
            except InvalidPolicy as error:
                logger.error("policy %d of %s cannot be read, so the base answers: %s", stored.number, tenant_id, error)
                compiled = _UNREADABLE
        if not compiled.rules:
            return None
        return Policy(tenant_id, stored.number, compiled, self._registry, self._clock, seq)


def dry_run(
    decisions: Sequence[RecordedDecision], before: Policy | None, after: Policy, find: Find, deciding: Deciding
) -> dict[str, Any]:
    """What a policy would have changed about recorded decisions: {"compared", "changes"}, the newest first.

    Both policies decide anew on the candidates that were recorded, with today's facts of documents and calibration; a
    conversation's former turns are not looked at.
    """
    changes = []
    compared = 0
    for decision in decisions:
        if decision.reason in _NOT_ROUTED:
            continue
        compared += 1
        results = [_result(decision.tenant_id, candidate) for candidate in decision.candidates]
        results.sort(key=lambda one: -one.rank)
        request = RequestFacts(decision.text, decision.model, headers=decision.headers)
        old, new = (_under(policy, request, results, find, deciding) for policy in (before, after))
        if (old.adapter_id, old.reason) != (new.adapter_id, new.reason):
            changes.append(
                {
                    "response_id": decision.response_id,
                    "created_at": decision.created_at,
                    "text": decision.text,
                    "before": _outcome(old),
                    "after": _outcome(new),
                    "steps": [asdict(step) for step in new.policy],
                }
            )
    return {"compared": compared, "changes": changes}


def _under(
    policy: Policy | None, request: RequestFacts, results: Sequence[Scored], find: Find, deciding: Deciding
) -> Decision:
    if policy is None:
        return deciding.decide(results)
    return policy.decide(request, lambda _: results, find, deciding)


def _by_base(decision: Decision, steps: tuple[Step, ...]) -> Decision:
    """The same where a policy has the base answer."""
    return replace(
        decision,
        adapter_id=None,
        document_id=None,
        reason=Reason.POLICY_BASE,
        part=None,
        parts=None,
        degraded=False,
        adapters=(),
        policy=steps,
    )


def _decide_named(used: Scored | None, settings: RouterSettings) -> Decision:
    """The decision for the document that a policy names. None: it was deleted a moment ago."""
    if used is None:
        return abstain(Reason.NO_CANDIDATES, settings)
    return replace(decide_part([used], settings), reason=Reason.POLICY_PINNED)


def _facts(result: Scored, document: DocumentFacts | None, confidence: float | None, now: float) -> CandidateFacts:
    entry = result.entry
    facts = CandidateFacts(
        adapter_id=entry.adapter_id,
        document_id=entry.document_id,
        score=result.score,
        confidence=confidence,
        title=entry.title,
        state=str(entry.state),
        rank=result.rank,
    )
    if document is None:  # it was deleted a moment ago
        return facts
    return replace(
        facts,
        external_id=document.external_id or "",
        collection=document.collection or "",
        metadata=document.metadata,
        age=max(0.0, (now - document.posted_at) / _DAY_S),
    )


def _result(tenant_id: str, candidate: Any) -> Scored:
    """A recorded candidate as the search result that it was."""
    entry = AdapterEntry(
        adapter_id=candidate["adapter_id"],
        tenant_id=tenant_id,
        document_id=candidate["document_id"],
        title=candidate.get("title", ""),
        centroids=np.empty((0, 0), dtype=np.float32),
        words=frozenset(),
        heading_words=frozenset(),
        state=State(candidate["state"]),
        part=candidate["part"],
        parts=candidate["parts"],
    )
    return Scored(
        entry, candidate["score"], candidate["similarity"], candidate["word_share"], candidate["rank"]
    )


def _outcome(decision: Decision) -> dict[str, Any]:
    return {
        "adapter_id": decision.adapter_id,
        "document_id": decision.document_id,
        "reason": str(decision.reason),
        "confidence": decision.confidence,
    }
