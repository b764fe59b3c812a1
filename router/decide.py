"""From search results to a decision: one adapter, several composed, or the base, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from router.index import Scored, State

DEFAULT_THRESHOLD = 0.40
MAX_LISTED = 5


class Reason(StrEnum):
    """Why a decision is as it is. Only `MATCHED` and `PINNED` name an adapter; with all others the base answers."""

    MATCHED = "matched"
    PINNED = "pinned"
    """The client named the adapter, or a document, of which the best part answers."""
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
    DEGRADED = "degraded"
    """The right document's adapter, or that of the right part, failed the quality gate."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """`threshold` is the least score that is good enough; a lead below `min_margin` counts as a tie (0: never).

    With `use_degraded` adapters that failed the quality gate answer as if they had not.
    """

    threshold: float = DEFAULT_THRESHOLD
    min_margin: float = 0.0
    use_degraded: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """One adapter that was considered; `score`, `similarity` and `word_share` as in `router.index.Scored`.

    It covers part `part` (from 0) of `parts` of its document. `state` is "ready", "degraded" or "stale".
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


@dataclass(frozen=True, slots=True)
class Chosen:
    """One adapter of the answer; its update counts `weight` times. `score` is None where nothing was searched."""

    adapter_id: str
    document_id: str | None
    score: float | None
    weight: float = 1.0
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers: `adapter_id`, or the base where it is None.

    `adapters` are all that answer, best first, `adapter_id` being the first: several where they are to be composed,
    none where the base answers. `score` is the best candidate's also when the base answers, `margin` its lead in rank
    over the next document; None where there is none. `candidates` are best first: one for each document, or where the
    client named a document, its parts. `part` of `parts` is what the chosen adapter covers of its document (None for
    the base), and `degraded` says that it failed the quality gate.
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


def decide(results: Sequence[Scored], settings: RouterSettings, compose: int = 1) -> Decision:
    """Choose among the results of `TenantIndex.search`, one for each document and best first: the best if it is good
    enough, leads clearly and may be used.

    With `compose` above 1, up to so many together: the best, and of those after it the ones that are good enough
    themselves and may be used. Each has weight 1, since the documents' facts add up. A lead means nothing then.
    """
    if not results:
        return abstain(Reason.NO_CANDIDATES, settings)
    best = results[0]
    margin = best.rank - results[1].rank if len(results) > 1 else None
    if not best.score >= settings.threshold:
        reason = Reason.BELOW_THRESHOLD
    elif compose == 1 and margin is not None and margin < settings.min_margin:
        reason = Reason.AMBIGUOUS
    # Where the best may not be used, the next best would answer about another document.
    elif not _usable(best, settings):
        reason = Reason.STALE if best.entry.state is State.STALE else Reason.DEGRADED
    else:
        others = [one for one in results[1:] if one.score >= settings.threshold and _usable(one, settings)]
        return _decision(results, margin, Reason.MATCHED, [best, *others][:compose], settings)
    return _decision(results, margin, reason, [], settings)


def decide_part(results: Sequence[Scored], settings: RouterSettings) -> Decision:
    """Take the best of the parts (`TenantIndex.search_parts`) of a document that the client named.

    It answers whatever its score and state; a client that names a document has chosen.
    """
    if not results:
        return abstain(Reason.NO_CANDIDATES, settings)
    return _decision(results, None, Reason.PINNED, results[:1], settings)


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


def _usable(result: Scored, settings: RouterSettings) -> bool:
    state = result.entry.state
    return state is State.READY or state is State.DEGRADED and settings.use_degraded


def _decision(
    results: Sequence[Scored], margin: float | None, reason: Reason, taken: Sequence[Scored], settings: RouterSettings
) -> Decision:
    """`taken`: the results that answer, the best first; with none the base does."""
    entry = taken[0].entry if taken else None
    return Decision(
        adapter_id=entry.adapter_id if entry else None,
        document_id=entry.document_id if entry else None,
        score=results[0].score,
        margin=margin,
        threshold=settings.threshold,
        reason=reason,
        candidates=tuple(_candidate(result) for result in results[:MAX_LISTED]),
        part=entry.part if entry else None,
        parts=entry.parts if entry else None,
        degraded=entry is not None and entry.state is State.DEGRADED,
        adapters=tuple(_chosen(result) for result in taken),
    )


def _chosen(result: Scored) -> Chosen:
    entry = result.entry
    return Chosen(entry.adapter_id, entry.document_id, result.score, degraded=entry.state is State.DEGRADED)


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
        entry.part,
        entry.parts,
        str(entry.state),
    )
