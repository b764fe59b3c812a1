"""The router deployment: decides which of a tenant's adapters answers a request, or which ones together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import anyio.to_thread
import numpy as np

from router.calibrate import Calibration
from router.decide import MAX_LISTED, Chosen, Decision, Reason, RouterSettings, abstain, decide_part, pin
from router.embed import MiniLmEncoder, NotFinite, Vectors
from router.index import IndexDamaged, Scope, Scored, State, TenantIndex
from router.policy import RequestFacts
from router.query import query_text, shorten
from router.stickiness import Conversations
from router.text import words
from serve.config import ImprintConfig
from serve.deployments.heap import tend_heap
from serve.deployments.router_calibration import Calibrator, TenantCalibrations
from serve.deployments.router_encoders import Encoders, PreviousEncoder
from serve.deployments.router_index import TenantIndexes
from serve.deployments.router_policy import Deciding, TenantPolicies, dry_run
from serve.deployments.router_suggestions import LOOKED_AT, suggest
from serve.deployments.router_upkeep import IndexUpkeep
from serve.metrics import RouterMetrics
from serve.registry import Registry

logger = logging.getLogger(__name__)

BASE = "base"
_EMBED_PIECE = 8
_KEEPS_ITS_DOCUMENT = frozenset({Reason.BELOW_THRESHOLD, Reason.BELOW_REQUIRED, Reason.AMBIGUOUS})
"""A conversation that the base answers for these reasons ("thanks!") goes on with its document afterwards."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What to decide on. `messages` goes before `prompt`; `collection` is a `col_…` ID.

    `adapter_id` pins an adapter of the tenant, `document_id` a document, of which the best part answers;
    `adapter_ids` limits the search to some. With `compose` above 1 so many documents may answer together, fewer where
    fewer are close enough or their adapters' ranks add up to more than the engine holds. `headers` are those that
    policies may look at (`router.policy.visible_headers`).
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
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text to compare with documents; may be empty."""
        return query_text(self.messages) if self.messages is not None else shorten(self.prompt or "")


class RouterDeployment:
    """Undecorated; `serve.app` makes it a Ray deployment."""

    def __init__(self, config: ImprintConfig | dict[str, Any]) -> None:
        """Load the encoder (a second or two) and open the registry. Raises RegistryNotMigrated, and FileNotFoundError
        for encoders that are not there."""
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._max_rank = config.engine.max_lora_rank
        asked = config.router
        self._settings = RouterSettings(
            asked.threshold, asked.min_margin, asked.use_degraded, asked.confidence, asked.switch_margin
        )
        self._encoder = MiniLmEncoder.load(
            config.router.encoder, threads=1, cache_size=config.router.cached_texts, onnx=True
        )
        self._registry = Registry.open(config.registry.url)
        previous = PreviousEncoder(asked.previous_encoder, asked.cached_texts) if asked.previous_encoder else None
        self._encoders = Encoders(self._encoder, previous)
        folder = config.data_dir / "router-index"
        self._indexes = TenantIndexes(
            self._registry, self._encoder, folder, asked.index_memory_mb << 20, previous=previous
        )
        self._upkeep = IndexUpkeep(self._registry, self._indexes, folder)
        self._policies = TenantPolicies(self._registry)
        self._conversations = Conversations()
        self._metrics = RouterMetrics()
        self._calibrations = TenantCalibrations(self._registry)
        self._calibrator = Calibrator(
            self._registry,
            self._encoders,
            self._indexes,
            self._calibrations,
            self._metrics,
            asked.calibrate_every_s,
        )
        tend_heap()
        self._calibrator.start()
        self._upkeep.start()

    def __del__(self) -> None:
        """Ray's way to end a replica. Where the constructor failed there may be nothing to end."""
        for name in ("_calibrator", "_upkeep"):
            if name in self.__dict__:
                self.__dict__[name].stop()

    async def route(self, request: RouteRequest | Mapping[str, Any]) -> dict[str, Any]:
        """The decision as a dict: the fields of `router.decide.Decision`, `model`, `timings` in seconds, and
        `calibration`, what the confidence rests on (None: nothing).

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

    async def suggestions(self, tenant_id: str, least: int, limit: int) -> dict[str, Any]:
        """Subjects of recent questions that found no document: see `serve.deployments.router_suggestions.suggest`."""

        def work() -> dict[str, Any]:
            decisions = self._registry.recent_decisions(tenant_id, LOOKED_AT)
            return suggest(decisions, self._calibrator.embed, least, limit)

        return await anyio.to_thread.run_sync(work)

    async def check_policy(self, tenant_id: str, text: str, limit: int) -> dict[str, Any]:
        """What a policy would have changed about the tenant's newest `limit` decisions: see
        `serve.deployments.router_policy.dry_run`. Raises InvalidPolicy."""

        def work() -> dict[str, Any]:
            index = self._indexes.current(tenant_id)
            before = self._policies.current(tenant_id, self._indexes.seq(tenant_id))
            after = self._policies.proposed(tenant_id, text)
            calibration = self._calibrations.current(tenant_id, self._encoders.of(index))
            deciding = Deciding(self._settings, calibration=calibration)

            def find(document_id: str) -> Scored | None:
                # What was not found then has no score; a rule that uses it looks at none.
                parts = index.parts(document_id)
                return Scored(parts[0], 0.0, 0.0, 0.0, 0.0) if parts else None

            decisions = self._registry.recent_decisions(tenant_id, limit) if limit else []
            return dry_run(decisions, before, after, find, deciding)

        return await anyio.to_thread.run_sync(work)

    async def metrics(self) -> str:
        """Metrics of this replica as Prometheus text."""
        return self._metrics.text()

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
        try:
            decision = self._decide(request, timings)
        except IndexDamaged:
            # A file was changed since it was checked for this request; now it is noticed, and the index built anew.
            decision = self._decide(request, timings)
        timings["total_s"] = time.perf_counter() - started
        used = None
        if decision.confidence is not None:
            encoder = self._encoders.of(self._indexes.in_memory(request.tenant_id))
            used = self._calibrations.current(request.tenant_id, encoder)
        return {
            **asdict(decision),
            "reason": str(decision.reason),
            "model": request.model,
            "timings": timings,
            "calibration": _described(used),
        }

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
        encoder = self._encoders.of(index)
        vector = self._vector(request.tenant_id, encoder, text)
        if vector is None:
            if request.document_id is not None:
                return self._pin_first_part(index, request.document_id)
            return abstain(Reason.NOT_EMBEDDED, self._settings)
        embedded = time.perf_counter()
        timings["embed_s"] = embedded - synced
        query = words(text)
        if request.document_id is not None:
            decision = decide_part(index.search_parts(request.document_id, vector, query), self._settings)
            timings["search_s"] = time.perf_counter() - embedded
            return decision
        timings["search_s"] = 0.0

        def search(limit: int, document_id: str | None = None) -> Sequence[Scored]:
            begun = time.perf_counter()
            scope = Scope(request.collection, request.adapter_ids, document_id)
            results = index.search(vector, query, scope, limit=max(limit, request.compose + 1))
            timings["search_s"] += time.perf_counter() - begun
            return results

        return self._choose(request, encoder, search, timings)

    def _vector(self, tenant_id: str, encoder: MiniLmEncoder, text: str) -> Vectors | None:
        """float32 [dimension]; None, and a line in the log, where the encoder makes no numbers of the text."""
        try:
            return encoder.embed_one(text)
        except NotFinite as error:
            logger.error("a question of %s cannot be compared with documents: %s", tenant_id, error)
            return None

    def _choose(
        self,
        request: RouteRequest,
        encoder: MiniLmEncoder,
        search: Callable[..., Sequence[Scored]],
        timings: dict[str, float],
    ) -> Decision:
        """The decision on search results, with what the conversation was answered from, under the tenant's policy."""
        begun = time.perf_counter()
        conversation = request.tenant_id, request.collection or "", request.messages
        held = self._conversations.held(*conversation)
        calibration = self._calibrations.current(request.tenant_id, encoder)
        deciding = Deciding(self._settings, request.compose, calibration, held)
        policy = self._policies.current(request.tenant_id, self._indexes.seq(request.tenant_id))
        if policy is None:
            decision = deciding.decide(search(MAX_LISTED))
        else:
            collection = policy.collection_name(request.collection)
            facts = RequestFacts(request.text, request.model, collection, request.compose, request.headers)
            decision = policy.decide(facts, search, lambda name: next(iter(search(1, name)), None), deciding)
        keeps = held if decision.reason in _KEEPS_ITS_DOCUMENT else None
        self._conversations.note(*conversation, decision.document_id or keeps)
        decision = self._within_rank(request.tenant_id, decision)
        timings["decide_s"] = time.perf_counter() - begun - timings["search_s"]
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


def _described(calibration: Calibration | None) -> dict[str, Any] | None:
    """What a calibration is, without its numbers."""
    if calibration is None:
        return None
    return {
        "version": calibration.version,
        "method": calibration.method,
        "encoder": calibration.encoder,
        "generator": calibration.generator or None,
        "quality": None if calibration.quality is None else asdict(calibration.quality),
    }
