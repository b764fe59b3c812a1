"""From search results to a decision: one adapter or the base, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from router.index import Scored

DEFAULT_THRESHOLD = 0.40
MAX_LISTED = 5


class Reason(StrEnum):
    """Why a decision is as it is. Only `MATCHED` and `PINNED` name an adapter; with all others the base answers."""

    MATCHED = "matched"
    PINNED = "pinned"
    """The client named the adapter."""
    BASE_REQUESTED = "base_requested"
    """The client asked for the base."""
    EMPTY_QUERY = "empty_query"
    """The request holds no user text to compare."""
    NO_CANDIDATES = "no_candidates"
    """The tenant, or the collection asked for, has no adapter."""
    BELOW_THRESHOLD = "below_threshold"
    """No document is close enough to the question."""
    AMBIGUOUS = "ambiguous"
    """Two documents fit about equally well."""
    STALE = "stale"
    """The right document's adapter was made for another base model or generator."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """`threshold` is the least score that is good enough; a lead below `min_margin` counts as a tie (0: never)."""

    threshold: float = DEFAULT_THRESHOLD
    min_margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One adapter that was considered; `score`, `similarity` and `word_share` as in `router.index.Scored`."""

    adapter_id: str
    document_id: str
    title: str
    score: float
    similarity: float
    word_share: float
    rank: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers: `adapter_id`, or the base where it is None.

    `score` is the best candidate's also when the base answers, `margin` its lead in rank over the next one; None
    where there is none. `candidates` are best first.
    """

    adapter_id: str | None
    document_id: str | None
    score: float | None
    margin: float | None
    threshold: float
    reason: Reason
    candidates: tuple[Candidate, ...] = ()


def decide(results: Sequence[Scored], settings: RouterSettings) -> Decision:
    """Choose among search results (best first): the best if it is good enough, leads clearly and may be used."""
    if not results:
        return abstain(Reason.NO_CANDIDATES, settings)
    best = results[0]
    margin = best.rank - results[1].rank if len(results) > 1 else None
    if not best.score >= settings.threshold:
        reason = Reason.BELOW_THRESHOLD
    elif margin is not None and margin < settings.min_margin:
        reason = Reason.AMBIGUOUS
    elif not best.entry.available:
        # The next best would answer about another document.
        reason = Reason.STALE
    else:
        reason = Reason.MATCHED
    chosen = best.entry if reason is Reason.MATCHED else None
    return Decision(
        adapter_id=chosen.adapter_id if chosen else None,
        document_id=chosen.document_id if chosen else None,
        score=best.score,
        margin=margin,
        threshold=settings.threshold,
        reason=reason,
        candidates=tuple(_candidate(result) for result in results[:MAX_LISTED]),
    )


def abstain(reason: Reason, settings: RouterSettings) -> Decision:
    """The base answers, without any search."""
    return Decision(None, None, None, None, settings.threshold, reason)


def pin(adapter_id: str, document_id: str | None, settings: RouterSettings) -> Decision:
    """The adapter that the client named answers, without any search."""
    return Decision(adapter_id, document_id, None, None, settings.threshold, Reason.PINNED)


def _candidate(result: Scored) -> Candidate:
    entry = result.entry
    return Candidate(
        entry.adapter_id,
        entry.document_id,
        entry.title,
        result.score,
        result.similarity,
        result.word_share,
        result.rank,
    )
