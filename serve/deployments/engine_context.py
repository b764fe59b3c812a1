"""What the ingress tells the engine about a request, and how the engine says no. Light: no vLLM, no Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Member = tuple[str, float]
"""An adapter of a composition, by ID, and the weight of its update."""
COMPOSITION = "cmp_"
"""What the IDs of compositions begin with; see `composition_id`."""

ENGINE_DEAD = "engine_dead"  # error code: the replica that had the request cannot answer it, another one can


@dataclass(frozen=True, slots=True)
class EngineContext:
    """Facts about one request that the server decides, never the client.

    ``adapter_id`` None means the base model. Where ``members`` is not empty these are composed, and ``adapter_id`` is
    their `composition_id`. ``cache_salt`` separates the tenants' prefix caches. ``priority``: lower is earlier.
    ``on_missing_adapter``: whether the base may answer when the adapter cannot be had. The ingress has looked the
    adapter, or each of those composed, up for this very request; the engine trusts that it was not deleted then.
    ``sequences``: how many answers there will be, prompts times `n`.
    """

    request_id: str
    tenant_id: str
    adapter_id: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    on_missing_adapter: Literal["base", "refuse"] = "refuse"
    members: tuple[Member, ...] = ()
    sequences: int = 1


def composition_id(members: Iterable[Member]) -> str:
    """The ID of adapters composed, whatever their order: `cmp_` and a SHA-256 over their IDs and weights.

    An adapter's ID stands for its content: adapters never change, and no ID is used twice. So this one stands for the
    composition's content too, and vLLM, which keys its prefix cache by names, cannot take one for another.
    """
    text = json.dumps(sorted((adapter_id, float(weight)) for adapter_id, weight in members))
    return f"{COMPOSITION}{hashlib.sha256(text.encode()).hexdigest()}"


class EngineRefusal(Exception):
    """A request that the engine answers with an error. ``kind`` and ``code`` are OpenAI's error type and code."""

    def __init__(self, status: int, message: str, kind: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The answer in OpenAI's error format."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
