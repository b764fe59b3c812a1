"""What the ingress tells the engine about a request, and how the engine says no. Light: no vLLM, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineContext:
    """Facts about one request that the server decides, never the client.

    ``adapter_id`` None means the base model. ``cache_salt`` separates the tenants' prefix caches. ``priority``: lower
    is earlier.
    """

    request_id: str
    tenant_id: str
    adapter_id: str | None = None
    cache_salt: str | None = None
    priority: int = 0


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
