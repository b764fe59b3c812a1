"""From search results to a decision: one adapter, several composed, or the base, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from router.calibrate import MAX_MARGIN, Calibration, features_of
from router.index import Scored, State
from router.policy.apply import Step

DEFAULT_THRESHOLD = 0.40
DEFAULT_CONFIDENCE = 0.5
DEFAULT_SWITCH_MARGIN = 0.03
NEAR_TIE = 0.05
"""A lead in rank below it may be what keeps a question from being answered."""
MAX_LISTED = 5


class Reason(StrEnum):
    """Why a decision is as it is; `docs/routing.md` lists all. With those after `POLICY_PINNED` the base answers."""

    MATCHED = "matched"
    CONTINUED = "continued"
    """The conversation's document answers on, as the best one leads it by less than the switch margin."""
    PINNED = "pinned"
    """The client named the adapter, or a document, of which the best part answers."""
    POLICY_PINNED = "policy_pinned"
    """The tenant's routing policy named the adapter or document."""
    BASE_REQUESTED = "base_requested"
    """The client asked for the base."""
    POLICY_BASE = "policy_base"
    """The tenant's routing policy fell back to the base."""
    POLICY_FORBIDS = "policy_forbids"
    """The tenant's routing policy forbids every document that was found."""
    EMPTY_QUERY = "empty_query"
    """The request holds no user text to compare."""
    NOT_EMBEDDED = "not_embedded"
    """The encoder made no usable vector of the question."""
    NO_CANDIDATES = "no_candidates"
    """The tenant, or the collection asked for, has no adapter."""
    BELOW_THRESHOLD = "below_threshold"
    """No document is close enough to the question."""
    BELOW_REQUIRED = "below_required"
    """The best document would do, but the tenant's routing policy requires more confidence."""
    AMBIGUOUS = "ambiguous"
    """Two documents fit about equally well."""
    STALE = "stale"
    """The right document's adapter was made for another base model or generator."""
    DEGRADED = "degraded"
    """The right document's adapter, or that of the right part, failed the quality gate."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What is good enough.

    With a calibration, a probability of at least `confidence` (0..1) that the adapter is right; without one, a score of
    at least `threshold` (-1..1). A lead in rank below `min_margin` counts as a tie (0: never). A conversation stays
    with its document unless another leads it by `switch_margin` in rank. With `use_degraded` adapters that failed the
    quality gate answer as if they had not.
    """

    threshold: float = DEFAULT_THRESHOLD
    min_margin: float = 0.0
    use_degraded: bool = False
    confidence: float = DEFAULT_CONFIDENCE
    switch_margin: float = DEFAULT_SWITCH_MARGIN


@dataclass(frozen=True, slots=True)
class Candidate:
    """One adapter that was considered; `score`, `similarity` and `word_share` as in `router.index.Scored`.

    `margin` is the lead in rank over the next document, or for those after the first (with composition, after those
    that may answer together) the distance to it, below 0; None where there is no other. `confidence` is the calibrated
    probability that it answers correctly, None without a calibration; `threshold` what that, or else the score, must
    reach. It covers part `part` (from 0) of `parts` of its document. `state` is "ready", "degraded" or "stale".
    """

    adapter_id: str
    document_id: str
    title: str
    score: float
    similarity: float
    word_share: float
    rank: float
    part: int
    parts: int
    state: str
    margin: float | None = None
    confidence: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """One adapter of the answer; its update counts `weight` times. `score` and `confidence` are None where nothing was
    searched."""

    adapter_id: str
    document_id: str | None
    score: float | None
    weight: float = 1.0
    degraded: bool = False
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers: `adapter_id`, or the base where it is None.

    `adapters` are all that answer, best first, `adapter_id` being the first: several where they are to be composed,
    none where the base answers. `score`, `confidence` and `threshold` are the best candidate's also when the base
    answers, `margin` its lead in rank over the next document; None where there is none. `candidates` are best first:
    one for each document, or where the client named a document, its parts. `part` of `parts` is what the chosen adapter
    covers of its document (None for the base), and `degraded` says that it failed the quality gate. `policy` are the
    steps of the tenant's policy.
    """

    adapter_id: str | None
    document_id: str | None
    score: float | None
    margin: float | None
    threshold: float
    reason: Reason
    candidates: tuple[Candidate, ...] = ()
    part: int | None = None
    parts: int | None = None
    degraded: bool = False
    adapters: tuple[Chosen, ...] = ()
    confidence: float | None = None
    policy: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class _Judged:
    """A result beside what it must reach; `margin`, `confidence` and `threshold` as in `Candidate`. `required` is the
    policy's, None where it asks for no more than `threshold`."""

    result: Scored
    margin: float | None
    confidence: float | None
    threshold: float
    required: float | None = None

    @property
    def good(self) -> bool:
        """Whether it is good enough; a number that is none is not."""
        return (self.result.score if self.confidence is None else self.confidence) >= self.threshold

    @property
    def good_for_policy(self) -> bool:
        """Whether it has the confidence that the policy requires; without a calibration nothing has."""
        return self.required is None or (self.confidence is not None and self.confidence >= self.required)


def decide(
    results: Sequence[Scored],
    settings: RouterSettings,
    compose: int = 1,
    *,
    calibration: Calibration | None = None,
    required: Mapping[str, float] | None = None,
    preferred: Mapping[str, float] | None = None,
    held: str | None = None,
) -> Decision:
    """Choose among the results of `TenantIndex.search`, one for each document and best first: the best if it is good
    enough, leads clearly and may be used.

    With `compose` above 1, up to so many together: the best, and of those after it the ones that are good enough
    themselves and may be used. Each has weight 1, since the documents' facts add up. A lead means nothing then, only
    the distance to those that could not answer as well. By adapter ID, `required` is the confidence that a policy
    asks for, and `preferred` what it adds to ranks. `held` is the document that the conversation was answered from
    last.
    """
    if not results:
        return abstain(Reason.NO_CANDIDATES, settings)
    first = _ranked(results, preferred)[0][1].entry.document_id
    ranked = _ranked(results, preferred, held, settings.switch_margin)
    judged = _judge(ranked, settings, compose, calibration, required or {})
    best = judged[0]
    tied = compose == 1 and best.margin is not None and best.margin < settings.min_margin
    if not best.good:
        # Where a clear lead would have made it good enough, it is the other document that speaks against it.
        near = compose == 1 and calibration is not None and best.margin is not None and best.margin < NEAR_TIE
        alone = near and calibration is not None and (
            calibration.probability(features_of(best.result, MAX_MARGIN)) >= best.threshold)
        reason = Reason.AMBIGUOUS if alone else Reason.BELOW_THRESHOLD
    elif tied:
        reason = Reason.AMBIGUOUS
    # Where the best may not be used, the next best would answer about another document.
    elif not _usable(best.result, settings):
        reason = Reason.STALE if best.result.entry.state is State.STALE else Reason.DEGRADED
    elif not best.good_for_policy:
        reason = Reason.BELOW_REQUIRED
    else:
        others = [one for one in judged[1:] if one.good and one.good_for_policy and _usable(one.result, settings)]
        reason = Reason.MATCHED if best.result.entry.document_id == first else Reason.CONTINUED
        return _decision(judged, reason, [best, *others][:compose])
    return _decision(judged, reason, [])


def confidences(
    results: Sequence[Scored],
    settings: RouterSettings,
    compose: int = 1,
    *,
    calibration: Calibration | None = None,
    held: str | None = None,
) -> dict[str, float]:
    """Adapter ID -> calibrated probability that it answers correctly, as `decide` finds it; empty without a
    calibration."""
    if calibration is None or not results:
        return {}
    judged = _judge(_ranked(results, None, held, settings.switch_margin), settings, compose, calibration, {})
    return {one.result.entry.adapter_id: one.confidence for one in judged if one.confidence is not None}


def decide_part(results: Sequence[Scored], settings: RouterSettings) -> Decision:
    """Take the best of the parts (`TenantIndex.search_parts`) of a document that the client named.

    It answers whatever its score and state; a client that names a document has chosen.
    """
    if not results:
        return abstain(Reason.NO_CANDIDATES, settings)
    judged = [_Judged(result, None, None, settings.threshold) for result in results]
    return _decision(judged, Reason.PINNED, judged[:1])


def abstain(reason: Reason, settings: RouterSettings) -> Decision:
    """The base answers, without any search."""
    return Decision(None, None, None, None, settings.threshold, reason)


def pin(
    adapter_id: str,
    document_id: str | None,
    settings: RouterSettings,
    part: int = 0,
    parts: int = 1,
    degraded: bool = False,
) -> Decision:
    """The adapter that the client named answers, without any search."""
    return Decision(
        adapter_id,
        document_id,
        None,
        None,
        settings.threshold,
        Reason.PINNED,
        part=part,
        parts=parts,
        degraded=degraded,
        adapters=(Chosen(adapter_id, document_id, None, degraded=degraded),),
    )


def _ranked(
    results: Sequence[Scored],
    preferred: Mapping[str, float] | None,
    held: str | None = None,
    switch_margin: float = 0.0,
) -> list[tuple[float, Scored]]:
    """The results with their ranks, raised by what a policy prefers them by, and that of the conversation's document by
    the switch margin; best first."""
    added = preferred or {}
    ranked = [
        (one.rank + added.get(one.entry.adapter_id, 0.0) + switch_margin * (one.entry.document_id == held), one)
        for one in results
    ]
    return sorted(ranked, key=lambda pair: -pair[0]) if held is not None or added else ranked


def _judge(
    ranked: Sequence[tuple[float, Scored]],
    settings: RouterSettings,
    compose: int,
    calibration: Calibration | None,
    required: Mapping[str, float],
) -> list[_Judged]:
    ranks = [rank for rank, _ in ranked]
    judged = []
    for place, (_, result) in enumerate(ranked):
        margin = _margin(ranks, place, compose)
        confidence, threshold = None, settings.threshold
        if calibration is not None:
            confidence = calibration.probability(features_of(result, margin))
            threshold = calibration.threshold(result.entry.adapter_id, settings.confidence)
        judged.append(_Judged(result, margin, confidence, threshold, required.get(result.entry.adapter_id)))
    return judged


def _margin(ranks: Sequence[float], place: int, compose: int) -> float | None:
    """The lead of one of the first `compose` over the first of the others; for those, the distance to the last of the
    first."""
    if place < compose:
        return ranks[place] - ranks[compose] if len(ranks) > compose else None
    return ranks[place] - ranks[compose - 1]


def _usable(result: Scored, settings: RouterSettings) -> bool:
    state = result.entry.state
    return state is State.READY or state is State.DEGRADED and settings.use_degraded


def _decision(judged: Sequence[_Judged], reason: Reason, taken: Sequence[_Judged]) -> Decision:
    """`taken`: those that answer, the best first; with none the base does."""
    best = judged[0]
    entry = taken[0].result.entry if taken else None
    return Decision(
        adapter_id=entry.adapter_id if entry else None,
        document_id=entry.document_id if entry else None,
        score=best.result.score,
        margin=best.margin,
        threshold=best.threshold if reason is not Reason.BELOW_REQUIRED else best.required or best.threshold,
        reason=reason,
        candidates=tuple(_candidate(one) for one in judged[:MAX_LISTED]),
        part=entry.part if entry else None,
        parts=entry.parts if entry else None,
        degraded=entry is not None and entry.state is State.DEGRADED,
        adapters=tuple(_chosen(one) for one in taken),
        confidence=best.confidence,
    )


def _chosen(one: _Judged) -> Chosen:
    entry = one.result.entry
    degraded = entry.state is State.DEGRADED
    return Chosen(entry.adapter_id, entry.document_id, one.result.score, degraded=degraded, confidence=one.confidence)


def _candidate(one: _Judged) -> Candidate:
    entry = one.result.entry
    return Candidate(
        entry.adapter_id,
        entry.document_id,
        entry.title,
        one.result.score,
        one.result.similarity,
        one.result.word_share,
        one.result.rank,
        entry.part,
        entry.parts,
        str(entry.state),
        one.margin,
        one.confidence,
        one.threshold,
    )
