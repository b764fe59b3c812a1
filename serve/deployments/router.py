"""The router deployment: decides which of a tenant's adapters answers a request, or which ones together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import anyio.to_thread
import numpy as np

from router.decide import MAX_LISTED, Chosen, Decision, Reason, RouterSettings, abstain, decide, decide_part, pin
from router.embed import MiniLmEncoder
from router.index import Scope, State, TenantIndex
from router.query import query_text, shorten
from router.text import words
from serve.config import ImprintConfig
from serve.deployments.heap import tend_heap
from serve.deployments.router_index import TenantIndexes
from serve.registry import Registry

BASE = "base"
_EMBED_PIECE = 8


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What to decide on. `messages` goes before `prompt`; `collection` is a `col_…` ID.

    `adapter_id` pins an adapter of the tenant, `document_id` a document, of which the best part answers;
    `adapter_ids` limits the search to some. With `compose` above 1 so many documents may answer together, fewer where
    fewer are close enough or their adapters' ranks add up to more than the engine holds.
    """

    tenant_id: str
    model: str = "imprint"
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | None = None
    collection: str | None = None
    adapter_id: str | None = None
    document_id: str | None = None
    adapter_ids: Sequence[str] | None = None
    compose: int = 1

    @property
    def text(self) -> str:
        """The text to compare with documents; may be empty."""
        return query_text(self.messages) if self.messages is not None else shorten(self.prompt or "")


class RouterDeployment:
    """Undecorated; `serve.app` makes it a Ray deployment."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        """Load the encoder (a second or two) and open the registry. Raises RegistryNotMigrated."""
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._max_rank = config.engine.max_lora_rank
        self._settings = RouterSettings(config.router.threshold, use_degraded=config.router.use_degraded)
        self._encoder = MiniLmEncoder.load(config.router.encoder, threads=1, cache_size=config.router.cached_texts)
        self._registry = Registry.open(config.registry.url)
        self._indexes = TenantIndexes(self._registry, self._encoder)
        tend_heap()

    async def route(self, request: RouteRequest | Mapping[str, Any]) -> dict[str, Any]:
        """The decision as a dict: the fields of `router.decide.Decision`, `model`, and `timings` in seconds.

        Takes every change into account that was committed before the call. Raises TypeError for unknown fields.
        """
        asked = request if isinstance(request, RouteRequest) else RouteRequest(**request)
        return await anyio.to_thread.run_sync(self._route, asked)

    async def embeddings(self, texts: list[str], dimensions: int | None = None) -> dict[str, Any]:
        """{"dimension", "max_tokens", "tokens", "vectors"}: the L2-normalised vectors of texts, none of them blank.

        `tokens` counts each text's. `vectors` are rows of little-endian float32, and empty where a text has more than
        `max_tokens` or where `dimensions` is not the encoder's.
        """
        tokens = await anyio.to_thread.run_sync(self._encoder.count_tokens, texts)
        limit, dimension = self._encoder.max_tokens, self._encoder.dimension
        answer = {"dimension": dimension, "max_tokens": limit, "tokens": tokens, "vectors": b""}
        if dimensions not in (None, dimension) or (limit is not None and max(tokens, default=0) > limit):
            return answer
        vectors = np.empty((len(texts), dimension), dtype="<f4")
        # In pieces, since routing waits for the encoder; sorted, since a batch is padded to its longest text.
        order = sorted(range(len(texts)), key=tokens.__getitem__)
        for start in range(0, len(order), _EMBED_PIECE):
            piece = order[start : start + _EMBED_PIECE]
            chosen = [texts[row] for row in piece]
            vectors[piece] = await anyio.to_thread.run_sync(partial(self._encoder.embed, chosen, cached=False))
        return {**answer, "vectors": vectors.tobytes()}

    async def health(self) -> None:
        """Raise when routing cannot work: the registry does not answer or the encoder fails."""
        await anyio.to_thread.run_sync(self._registry.head, "")
        await anyio.to_thread.run_sync(self._encoder.embed, ["health"])

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
        vector = self._encoder.embed_one(text)
        embedded = time.perf_counter()
        timings["embed_s"] = embedded - synced
        if request.document_id is not None:
            decision = decide_part(index.search_parts(request.document_id, vector, words(text)), self._settings)
        else:
            scope = Scope(request.collection, request.adapter_ids)
            results = index.search(vector, words(text), scope, limit=max(MAX_LISTED, request.compose))
            decision = self._within_rank(request.tenant_id, decide(results, self._settings, request.compose))
        timings["search_s"] = time.perf_counter() - embedded
        return decision

    def _within_rank(self, tenant_id: str, decision: Decision) -> Decision:
        """The decision without those of several adapters whose rank does not fit beside that of better ones."""
        if len(decision.adapters) < 2:
            return decision
        left = self._max_rank
        kept: list[Chosen] = []
        for chosen in decision.adapters:
            adapter = self._registry.get_adapter(tenant_id, chosen.adapter_id)
            # The best one stays whatever has become of it: the engine says so, as it does for one adapter alone.
            if not kept or (adapter is not None and adapter.rank <= left):
                kept.append(chosen)
                left -= adapter.rank if adapter is not None else 0
        return replace(decision, adapters=tuple(kept))

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
