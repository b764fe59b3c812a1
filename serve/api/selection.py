"""From the `model` of a request to the adapter that answers it, several composed, or the base."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router.query import query_text, shorten
from serve.api.composing import find_adapters
from serve.api.documents import find_collection
from serve.api.errors import ApiError
from serve.api.explain import Explanation, explain
from serve.api.requests import WeightedAdapter
from serve.api.services import Services
from serve.deployments.engine_context import Member, composition_id
from serve.registry.records import Adapter, Resolution, Tenant

ROUTED = "imprint"
BASE = "base"
_SUMMARISED = ("margin", "confidence", "threshold")


@dataclass(frozen=True)
class Selection:
    """Who answers. `adapter_id` None: the base. `details` is the router's decision, or a short one of the same form.

    Where several adapters are composed, or one with a weight, `members` are all of them, and `adapter_id` is the first.
    """

    adapter_id: str | None
    document_id: str | None
    reason: str
    score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    model: str = ROUTED
    text: str = ""
    """What was compared with documents, or would have been."""
    explanation: Explanation | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """(adapter ID, weight) of each adapter that is composed; empty where one answers as it is, or the base."""
        return tuple((one["adapter_id"], one["weight"]) for one in self._composed)

    @property
    def engine_id(self) -> str | None:
        """What the engine attaches: an adapter's ID, that of a composition, or None for the base."""
        return composition_id(self.members) if self.members else self.adapter_id

    @property
    def named(self) -> bool:
        """Whether the client named what answers, instead of leaving it to the router."""
        return self.reason == "pinned"

    def by_base(self) -> Selection:
        """The same where the base answered, since the adapter could not be had."""
        kept = {name: self.details[name] for name in _SUMMARISED if name in self.details}
        return replace(self, adapter_id=None, reason="adapter_unavailable", details=kept)

    def headers(self) -> dict[str, str]:
        """The `x-imprint-*` response headers."""
        adapters = [one["adapter_id"] for one in self._composed] or [self.adapter_id or BASE]
        documents = [one["document_id"] for one in self._composed] or [self.document_id]
        headers = {
            "x-imprint-adapter": ",".join(adapters),
            "x-imprint-reason": self.reason,
        }
        if any(documents):
            headers["x-imprint-document"] = ",".join(document or "" for document in documents)
        if self.score is not None:
            headers["x-imprint-score"] = f"{self.score:.4f}"
        if self.details.get("confidence") is not None:
            headers["x-imprint-confidence"] = f"{self.details['confidence']:.4f}"
        if self._of_several_parts:
            headers["x-imprint-part"] = str(self.details["part"])
        return headers

    def summary(self) -> dict[str, Any]:
        """The `imprint` field of responses."""
        summary: dict[str, Any] = {
            "adapter_id": self.adapter_id,
            "document_id": self.document_id,
            "reason": self.reason,
            "score": self.score,
        }
        for name in _SUMMARISED:
            if name in self.details:
                summary[name] = self.details[name]
        if self._of_several_parts:
            summary["part"] = self.details["part"]
            summary["parts"] = self.details["parts"]
        if self._composed:
            names = ("adapter_id", "document_id", "weight", "score")
            summary["adapters"] = [{name: one[name] for name in names} for one in self._composed]
        if self.details.get("degraded") or any(one.get("degraded") for one in self._composed):
            summary["degraded"] = True
        if self.explanation is not None:
            summary["explain"] = self.explanation.model_dump()
        return summary

    @property
    def _composed(self) -> Sequence[Mapping[str, Any]]:
        # The base may answer although adapters were chosen, when these cannot be had.
        adapters: Sequence[Mapping[str, Any]] = self.details.get("adapters") or () if self.adapter_id else ()
        return adapters if len(adapters) > 1 or any(one["weight"] != 1 for one in adapters) else ()

    @property
    def _of_several_parts(self) -> bool:
        return self.adapter_id is not None and not self._composed and (self.details.get("parts") or 1) > 1


async def select(
    services: Services,
    tenant: Tenant,
    model: str,
    *,
    messages: list[dict[str, Any]] | None = None,
    prompt: str | None = None,
    collection: str | None = None,
    adapters: Sequence[WeightedAdapter] | None = None,
    compose: int = 1,
    explained: bool = False,
    headers: Mapping[str, str] | None = None,
) -> Selection:
    """Decide who answers; where it is `explained`, with all that led to it. `headers` are those that policies see.

    Raises ApiError: 404 for an unknown model, collection or adapter, 409 for one that is not ready, 400 for fields that
    do not go together and for too many adapters.
    """
    started = time.monotonic()
    _check_fields(services, model, collection, adapters, compose)
    if model == BASE:
        selection = _without_router(BASE, (), "base_requested", started)
    elif adapters is not None:
        selection = await _named(services, tenant, adapters, messages, prompt, started)
    elif model == ROUTED:
        collection_id = None if collection is None else await find_collection(services, tenant.id, collection)
        selection = await _route(services, tenant, messages, prompt, collection_id, compose=compose, headers=headers)
    else:
        resolution = await services.read(services.registry.resolve_model, tenant.id, model)
        selection = await _pinned(services, tenant, model, resolution, messages, prompt, compose, headers, started)
    answered_by = "composition" if selection.members else "adapter" if selection.adapter_id else "base"
    services.metrics.decisions.labels(selection.reason, answered_by).inc()
    text = query_text(messages) if messages is not None else shorten(prompt or "")
    explanation = await explain(services, selection.details) if explained else None
    return replace(selection, model=model, text=text, explanation=explanation)


def _check_fields(
    services: Services, model: str, collection: str | None, adapters: Sequence[WeightedAdapter] | None, compose: int
) -> None:
    if model != ROUTED:
        for name, value in (("collection", collection), ("adapters", adapters)):
            if value is not None:
                raise ApiError(400, f"'{name}' needs model '{ROUTED}'.", param=name, code="invalid_value")
    if adapters is not None:
        for name, given in (("collection", collection is not None), ("compose", compose > 1)):
            if given:
                message = f"'{name}' and 'adapters' exclude each other: with 'adapters' nothing is searched."
                raise ApiError(400, message, param=name, code="invalid_value")
    most = services.config.router.max_composed
    if compose > most:
        message = f"'compose' is {compose}; 1 to {most} is allowed (router.max_composed)."
        raise ApiError(400, message, param="compose", code="invalid_value")
    if compose > 1 and model == BASE:
        raise _not_composable()


async def _named(
    services: Services,
    tenant: Tenant,
    named: Sequence[WeightedAdapter],
    messages: list[dict[str, Any]] | None,
    prompt: str | None,
    started: float,
) -> Selection:
    async def best_part(document_id: str) -> str | None:
        return (await _route(services, tenant, messages, prompt, None, document_id=document_id)).adapter_id

    return _without_router(ROUTED, await find_adapters(services, tenant.id, named, best_part), "pinned", started)


async def _pinned(
    services: Services,
    tenant: Tenant,
    model: str,
    resolution: Resolution | None,
    messages: list[dict[str, Any]] | None,
    prompt: str | None,
    compose: int,
    headers: Mapping[str, str] | None,
    started: float,
) -> Selection:
    if resolution is None:
        raise ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    target = resolution.target
    if target.startswith("col_"):
        return await _route(services, tenant, messages, prompt, target, model, compose=compose, headers=headers)
    if compose > 1:
        raise _not_composable()
    not_ready = ApiError(
        409,
        f"The model '{model}' has no adapter yet; its document is being processed or has failed.",
        param="model",
        code="model_not_ready",
    )
    if not resolution.adapter_ids:
        raise not_ready
    if len(resolution.adapter_ids) > 1:
        selection = await _route(services, tenant, messages, prompt, None, document_id=target)
        if selection.adapter_id is None:  # a new version or a deletion came between, or no part can be searched
            raise not_ready
        return selection
    adapter = await services.read(services.registry.get_adapter, tenant.id, resolution.adapter_ids[0])
    if adapter is None:
        raise ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    return _without_router(model, [(adapter, 1.0)], "pinned", started)


async def _route(
    services: Services,
    tenant: Tenant,
    messages: list[dict[str, Any]] | None,
    prompt: str | None,
    collection_id: str | None,
    model: str = ROUTED,
    *,
    document_id: str | None = None,
    compose: int = 1,
    headers: Mapping[str, str] | None = None,
) -> Selection:
    if messages is None and prompt is None:
        what = f"Model '{ROUTED}'" if document_id is None else f"Document {document_id}, which has several parts,"
        raise ApiError(400, f"{what} needs one text as prompt.", param="prompt", code="invalid_value")
    decision = await services.router.route(
        {
            "tenant_id": tenant.id,
            "model": model,
            "messages": messages,
            "prompt": prompt,
            "collection": collection_id,
            "document_id": document_id,
            "compose": compose,
            "headers": headers or {},
        }
    )
    score = decision.get("score")
    if score is not None:
        services.metrics.score.observe(score)
    if decision.get("confidence") is not None:
        services.metrics.confidence.observe(decision["confidence"])
    return Selection(decision["adapter_id"], decision.get("document_id"), str(decision["reason"]), score, decision)


def _not_composable() -> ApiError:
    message = f"'compose' needs model '{ROUTED}' or a collection: something to choose several documents from."
    return ApiError(400, message, param="compose", code="invalid_value")


def _without_router(model: str, chosen: Sequence[tuple[Adapter, float]], reason: str, started: float) -> Selection:
    adapter = chosen[0][0] if chosen else None
    details: dict[str, Any] = {
        "adapter_id": adapter.id if adapter else None,
        "document_id": adapter.document_id if adapter else None,
        "model": model,
        "score": None,
        "margin": None,
        "threshold": None,
        "reason": reason,
        "candidates": [],
        "timings": {"total_s": time.monotonic() - started},
        "part": adapter.part if adapter else None,
        "parts": adapter.parts if adapter else None,
        "degraded": adapter is not None and adapter.state == "degraded",
        "adapters": [
            {
                "adapter_id": one.id,
                "document_id": one.document_id,
                "score": None,
                "weight": weight,
                "degraded": one.state == "degraded",
            }
            for one, weight in chosen
        ],
    }
    return Selection(details["adapter_id"], details["document_id"], reason, None, details)
