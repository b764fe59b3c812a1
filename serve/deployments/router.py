"""The router deployment: decides which of a tenant's adapters answers a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import anyio.to_thread

from router.decide import Decision, Reason, RouterSettings, abstain, decide, decide_part, pin
from router.embed import MiniLmEncoder
from router.index import Scope, State, TenantIndex
from router.query import query_text, shorten
from router.text import words
from serve.config import ImprintConfig
from serve.deployments.router_index import TenantIndexes
from serve.registry import Registry

BASE = "base"


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What to decide on. `messages` goes before `prompt`; `collection` is a `col_…` ID.

    `adapter_id` pins an adapter of the tenant, `document_id` a document, of which the best part answers;
    `adapter_ids` limits the search to some.
    """

    tenant_id: str
    model: str = "imprint"
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    collection: str | None = None
    adapter_id: str | None = None
    document_id: str | None = None
    adapter_ids: Sequence[str] | None = None

    @property
    def text(self) -> str:
        """The text to compare with documents; may be empty."""
        return query_text(self.messages) if self.messages is not None else shorten(self.prompt or "")


class RouterDeployment:
    """Undecorated; `serve.app` makes it a Ray deployment."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        """Load the encoder (a second or two) and open the registry. Raises RegistryNotMigrated."""
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._settings = RouterSettings(config.router.threshold, use_degraded=config.router.use_degraded)
        self._encoder = MiniLmEncoder.load(config.router.encoder, threads=1)
        self._registry = Registry.open(config.registry.url)
        self._indexes = TenantIndexes(self._registry, self._encoder)

    async def route(self, request: RouteRequest | Mapping[str, Any]) -> dict[str, Any]:
        """The decision as a dict: the fields of `router.decide.Decision`, `model`, and `timings` in seconds.

        Takes every change into account that was committed before the call. Raises TypeError for unknown fields.
        """
        asked = request if isinstance(request, RouteRequest) else RouteRequest(**request)
        return await anyio.to_thread.run_sync(self._route, asked)

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """L2-normalised vectors of texts. Raises ValueError for a blank text."""
        return (await anyio.to_thread.run_sync(self._encoder.embed, texts)).tolist()

    async def health(self) -> None:
        """Raise when routing cannot work: the registry does not answer or the encoder fails."""
        await anyio.to_thread.run_sync(self._registry.head, "")
        await self.embed(["health"])

    async def check_health(self) -> None:
        """Ray's question: raises when this replica has to be replaced."""
        await self.health()

    def _route(self, request: RouteRequest) -> dict[str, Any]:
        timings: dict[str, float] = {}
        started = time.perf_counter()
        decision = self._decide(request, timings)
        timings["total_s"] = time.perf_counter() - started
        return {**asdict(decision), "reason": str(decision.reason), "model": request.model, "timings": timings}

    def _decide(self, request: RouteRequest, timings: dict[str, float]) -> Decision:
        if request.model == BASE:
            return abstain(Reason.BASE_REQUESTED, self._settings)
        if request.adapter_id is not None:
            return self._pin_adapter(request.tenant_id, request.adapter_id)
        text = request.text
        if not text and request.document_id is None:
            return abstain(Reason.EMPTY_QUERY, self._settings)
        begun = time.perf_counter()
        index = self._indexes.current(request.tenant_id)
        synced = time.perf_counter()
        timings["sync_s"] = synced - begun
        if request.document_id is not None and not text:
            return self._pin_first_part(index, request.document_id)
        if len(index) == 0:
            return abstain(Reason.NO_CANDIDATES, self._settings)
        vector = self._encoder.embed([text])[0]
        embedded = time.perf_counter()
        timings["embed_s"] = embedded - synced
        if request.document_id is not None:
            decision = decide_part(index.search_parts(request.document_id, vector, words(text)), self._settings)
        else:
            scope = Scope(request.collection, request.adapter_ids)
            decision = decide(index.search(vector, words(text), scope), self._settings)
        timings["search_s"] = time.perf_counter() - embedded
        return decision

    def _pin_adapter(self, tenant_id: str, adapter_id: str) -> Decision:
        adapter = self._registry.get_adapter(tenant_id, adapter_id)
        if adapter is None:
            return abstain(Reason.NO_CANDIDATES, self._settings)
        degraded = adapter.state == State.DEGRADED
        return pin(adapter.id, adapter.document_id, self._settings, adapter.part, adapter.parts, degraded)

    def _pin_first_part(self, index: TenantIndex, document_id: str) -> Decision:
        """The client chose the document, and nothing tells its parts apart: it begins with the first."""
        entries = index.parts(document_id)
        if not entries:
            return abstain(Reason.NO_CANDIDATES, self._settings)
        first = entries[0]
        degraded = first.state is State.DEGRADED
        return pin(first.adapter_id, document_id, self._settings, first.part, first.parts, degraded)
