"""`POST /v1/responses`: OpenAI's Responses API, without its store of earlier answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from router.policy import visible_headers
from serve.api import generation
from serve.api.auth import TenantDep
from serve.api.bodies import read_json, validate
from serve.api.requests import ResponsesRequest, documented_body
from serve.api.selection import select
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1", tags=["generation"])

_TEXTS = ("input_text", "output_text", "text")


class ResponseObject(BaseModel):
    """OpenAI's `response` object with an `imprint` field."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    service_tier: str | None = None
    imprint: generation.ImprintField


@router.post(
    "/responses",
    response_model=None,
    openapi_extra=documented_body(ResponsesRequest),
    responses={**generation.RESPONSES, 200: {**generation.RESPONSES[200], "model": ResponseObject}},
)
async def create_response(request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Answer with the adapter that the router chooses, a pinned one, or the base model.

    Nothing is stored: `store`, `background`, `previous_response_id` and `conversation` are refused, and tools are
    functions of the client's.
    """
    body = await read_json(request, services.config.limits.max_request_bytes)
    asked = validate(ResponsesRequest, body)
    choice = await select(
        services,
        tenant,
        asked.model,
        messages=routing_messages(body["input"]),
        collection=asked.collection,
        adapters=asked.adapters,
        compose=asked.compose,
        explained=bool(asked.explain),
        headers=visible_headers(request.headers.items()),
    )
    return await generation.respond(request, services, tenant, "responses", body, choice)


def routing_messages(given: str | list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an `input` in the form of chat completions, as the router reads them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [
        {"role": item["role"], "content": _chat_content(item["content"])}
        for item in given
        if item.get("type", "message") == "message"
    ]


def _chat_content(content: str | list[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.get("text")} for part in content if part.get("type") in _TEXTS]
