"""Suggested documents: subjects of recent questions that the router found no document for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from router.clusters import clusters
from router.shipped import general_chat
from serve.registry.records import RecordedDecision

LOOKED_AT = 1000
"""Recent decisions of a tenant."""
EXAMPLES = 5
CHAT_COSINE = 0.6
"""To one of the shipped questions of general chat; from there on it is no question for a document."""
NOT_FOUND = frozenset({"below_threshold", "no_candidates"})


def suggest(
    decisions: Sequence[RecordedDecision], embed: Callable[[Sequence[str]], np.ndarray], least: int, limit: int
) -> dict[str, Any]:
    """{"questions", "data"}: see `serve.api.feedback.SuggestionList`. Of each text asked several times each counts.

    `embed` gives float32 [texts, dimension], L2-normalised, for texts that are not blank.
    """
    unanswered = [one for one in decisions if one.reason in NOT_FOUND and one.text.strip()]
    if not unanswered:
        return {"questions": 0, "data": []}
    texts = list(dict.fromkeys(one.text for one in unanswered))
    vectors, chat = embed(texts), embed(general_chat())
    kept = np.flatnonzero((vectors @ chat.T).max(axis=1) < CHAT_COSINE)
    asked: dict[str, list[float]] = {}
    for one in unanswered:
        asked.setdefault(one.text, []).append(one.created_at)
    found = []
    for group in clusters(vectors[kept]):
        members = [texts[kept[row]] for row in group]
        times = [at for text in members for at in asked[text]]
        if len(times) >= least:
            found.append({
                "question": members[0],
                "count": len(times),
                "examples": members[:EXAMPLES],
                "first_at": min(times),
                "last_at": max(times),
            })  # fmt: skip
    found.sort(key=lambda one: -one["count"])
    return {"questions": sum(len(asked[texts[row]]) for row in kept), "data": found[:limit]}
