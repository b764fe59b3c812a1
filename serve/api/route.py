"""`POST /v1/route`: the routing decision without generation."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from router.policy import visible_headers
from serve.api.auth import TenantDep
from serve.api.bodies import read_json, validate
from serve.api.errors import ApiError, error_docs
from serve.api.explain import Explanation
from serve.api.requests import RouteQuery, documented_body
from serve.api.selection import select
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1/route", tags=["routing"])


class RouteDecision(BaseModel):
    """Who would answer. `score` is raw, `confidence` the calibrated probability that the adapter answers correctly,
    null without a calibration; that, or else the score, must reach `threshold`. `margin` is the lead in rank over the
    next document. The adapter covers part `part` (from 0) of `parts` of its
    document; `degraded` says that it failed the quality gate. `adapters` are all that would answer together, with their
    weights, the first being `adapter_id`. `candidates` are one for each document, or where `model`
    names a document, its parts."""

    model_config = ConfigDict(extra="allow")

    object: str = "route.decision"
    adapter_id: str | None
    document_id: str | None
    reason: str
    score: float | None
    confidence: float | None = None
    margin: float | None = None
    threshold: float | None = None
    part: int | None = None
    parts: int | None = None
    degraded: bool = False
    adapters: list[dict[str, Any]] = Field(default_factory=list)
    candidates: list[dict[str, Any]] = Field(default_factory=list)
    timings: dict[str, float] = Field(default_factory=dict)
    explain: Explanation | None = None


@router.post(
    "", openapi_extra=documented_body(RouteQuery), responses=error_docs(400, 401, 403, 404, 409, 413, 415)
)
async def route(request: Request, services: ServicesDep, tenant: TenantDep) -> RouteDecision:
    """Say which adapter would answer these messages or this prompt, and why."""
    body = await read_json(request, services.config.limits.max_request_bytes)
    query = validate(RouteQuery, body)
    if (query.messages is None) == (query.prompt is None):
        raise ApiError(400, "Send either 'messages' or 'prompt'.", param="messages", code="missing_field")
    choice = await select(
        services,
        tenant,
        query.model,
        messages=body.get("messages"),
        prompt=query.prompt,
        collection=query.collection,
        adapters=query.adapters,
        compose=query.compose,
        explained=bool(query.explain),
        headers=visible_headers(request.headers.items()),
    )
    details = {**choice.details, "adapter_id": choice.adapter_id, "document_id": choice.document_id}
    return RouteDecision.model_validate(
        {**details, "reason": choice.reason, "score": choice.score, "explain": choice.explanation}
    )
