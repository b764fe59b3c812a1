"""From the `model` of a request to the adapter that answers it, or the base."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.api.documents import find_collection
from serve.api.errors import ApiError
from serve.api.services import Services
from serve.registry.records import Adapter, Resolution, Tenant

ROUTED = "imprint"
BASE = "base"


@dataclass(frozen=True)
class Selection:
    """Who answers. `adapter_id` None: the base. `details` is the router's decision, or a short one of the same form."""

    adapter_id: str | None
    document_id: str | None
    reason: str
    score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        """The `x-imprint-*` response headers."""
        headers = {
            "x-imprint-adapter": self.adapter_id or BASE,
            "x-imprint-reason": self.reason,
        }
        if self.document_id is not None:
            headers["x-imprint-document"] = self.document_id
        if self.score is not None:
            headers["x-imprint-score"] = f"{self.score:.4f}"
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
        for name in ("margin", "threshold"):
            if name in self.details:
                summary[name] = self.details[name]
        if self._of_several_parts:
            summary["part"] = self.details["part"]
            summary["parts"] = self.details["parts"]
        if self.details.get("degraded"):
            summary["degraded"] = True
        return summary

    @property
    def _of_several_parts(self) -> bool:
        return self.adapter_id is not None and (self.details.get("parts") or 1) > 1


async def select(
    services: Services,
    tenant: Tenant,
    model: str,
    *,
    messages: list[dict[str, Any]] | None = None,
    prompt: str | None = None,
    collection: str | None = None,
) -> Selection:
    """Decide who answers. Raises ApiError 404 for an unknown model or collection, 409 for one that is not ready."""
    started = time.monotonic()
    if model == BASE:
        selection = _without_router(BASE, None, "base_requested", started)
    elif model == ROUTED:
        collection_id = None if collection is None else await find_collection(services, tenant.id, collection)
        selection = await _route(services, tenant, messages, prompt, collection_id)
    else:
        if collection is not None:
            raise ApiError(400, f"'collection' needs model '{ROUTED}'.", param="collection", code="invalid_value")
        resolution = await services.call(services.registry.resolve_model, tenant.id, model)
        selection = await _pinned(services, tenant, model, resolution, messages, prompt, started)
    services.metrics.decisions.labels(selection.reason, "adapter" if selection.adapter_id else "base").inc()
    return selection


async def _pinned(
    services: Services,
    tenant: Tenant,
    model: str,
    resolution: Resolution | None,
    messages: list[dict[str, Any]] | None,
    prompt: str | None,
    started: float,
) -> Selection:
    if resolution is None:
        raise ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    target = resolution.target
    if target.startswith("col_"):
        return await _route(services, tenant, messages, prompt, target)
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
    adapter = await services.call(services.registry.get_adapter, tenant.id, resolution.adapter_ids[0])
    if adapter is None:
        raise ApiError(404, f"The model '{model}' does not exist.", param="model", code="model_not_found")
    return _without_router(model, adapter, "pinned", started)


async def _route(
    services: Services,
    tenant: Tenant,
    messages: list[dict[str, Any]] | None,
    prompt: str | None,
    collection_id: str | None,
    document_id: str | None = None,
) -> Selection:
    if messages is None and prompt is None:
        what = f"Model '{ROUTED}'" if document_id is None else f"Document {document_id}, which has several parts,"
        raise ApiError(400, f"{what} needs one text as prompt.", param="prompt", code="invalid_value")
    decision = await services.router.route(
        {
            "tenant_id": tenant.id,
            "model": ROUTED,
            "messages": messages,
            "prompt": prompt,
            "collection": collection_id,
            "document_id": document_id,
        }
    )
    score = decision.get("score")
    if score is not None:
        services.metrics.score.observe(score)
    return Selection(decision["adapter_id"], decision.get("document_id"), str(decision["reason"]), score, decision)


def _without_router(model: str, adapter: Adapter | None, reason: str, started: float) -> Selection:
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
    }
    return Selection(details["adapter_id"], details["document_id"], reason, None, details)
