"""What an expression may look at: the facts of a request and of a candidate, declared with their types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from router.policy.errors import CostExceeded

MAX_COST = 100_000
"""Units that the evaluation of a whole policy may spend on one request: one for each part of a condition that is asked,
and one for each `CHARACTERS_A_UNIT` characters, or list entry, that it reads. Tens of milliseconds at most."""
CHARACTERS_A_UNIT = 16
MAX_HEADERS = 64
MAX_HEADER_LENGTH = 1000
HEADER_PREFIX = "x-"
_SECRET = ("auth", "key", "token", "secret", "password", "cookie", "credential", "session", "signature")


class Type(StrEnum):
    """A type of the language. A `VALUE` is known at run time only: anything that JSON can hold, or nothing."""

    BOOLEAN = "true or false"
    NUMBER = "number"
    TEXT = "text"
    VALUE = "metadata value"
    TEXTS = "list of texts"
    NUMBERS = "list of numbers"
    HEADERS = "headers"
    METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A request. `text` is what routing compares with documents, `collection` the name of the one asked for, empty for
    none, `compose` how many documents may answer together. `headers` have names in lower case; see `visible_headers`.
    """

    text: str = ""
    model: str = "imprint"
    collection: str = ""
    compose: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CandidateFacts:
    """A document that the search has found, with the adapter that would answer.

    `score` is in -1..1, `confidence` (that its answer is right) in 0..1 or None without a calibration, `age` in days
    since the version that is served was posted, `state` one of "ready", "degraded", "stale". `rank` orders candidates;
    expressions do not see it, nor the adapter's ID.
    """

    adapter_id: str
    document_id: str
    score: float = 0.0
    confidence: float | None = None
    title: str = ""
    external_id: str = ""
    collection: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    state: str = "ready"
    age: float = 0.0
    rank: float = 0.0


FACTS: Mapping[str, Mapping[str, Type]] = {
    "request": {
        "text": Type.TEXT,
        "model": Type.TEXT,
        "collection": Type.TEXT,
        "compose": Type.NUMBER,
        "headers": Type.HEADERS,
    },
    "candidate": {
        "score": Type.NUMBER,
        "confidence": Type.NUMBER,
        "title": Type.TEXT,
        "document_id": Type.TEXT,
        "external_id": Type.TEXT,
        "collection": Type.TEXT,
        "metadata": Type.METADATA,
        "state": Type.TEXT,
        "age": Type.NUMBER,
    },
}
"""All that expressions can name. What is not here does not exist for them."""


class Evaluation:
    """The evaluation of one policy for one request: its facts, its budget, and what was found about the request.

    `known` holds the values of subexpressions without a candidate; each is found once for a request.
    """

    __slots__ = ("request", "candidate", "known", "left")

    def __init__(self, request: RequestFacts, budget: int = MAX_COST) -> None:
        self.request = request
        self.candidate: CandidateFacts | None = None
        self.known: dict[int, Any] = {}
        self.left = budget

    def spend(self, units: int) -> None:
        """Take units from the budget before they are used. Raises CostExceeded."""
        self.left -= units
        if self.left < 0:
            raise CostExceeded(f"the policy needs more than {MAX_COST:,} steps for this request")


def visible_header(name: str) -> bool:
    """Whether policies may look at a header of this name (in lower case): `x-…`, but nothing that may be a secret."""
    return name.startswith(HEADER_PREFIX) and not any(part in name for part in _SECRET)


def visible_headers(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The headers of a request that policies may look at, with names in lower case.

    At most MAX_HEADERS, none with a value of more than MAX_HEADER_LENGTH characters. Of one name the first counts.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        if visible_header(name) and len(value) <= MAX_HEADER_LENGTH and len(found) < MAX_HEADERS:
            found.setdefault(name, value)
    return found
