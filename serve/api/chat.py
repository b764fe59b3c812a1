"""`POST /v1/chat/completions`, as OpenAI's clients send it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from router.policy import visible_headers
from serve.api import generation
from serve.api.auth import TenantDep
from serve.api.bodies import read_json, validate
from serve.api.requests import ChatRequest, documented_body
from serve.api.selection import select
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1/chat", tags=["generation"])


@router.post(
    "/completions",
    response_model=None,
    openapi_extra=documented_body(ChatRequest),
    responses=generation.RESPONSES,
)
async def create_chat_completion(request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Answer a conversation with the adapter that the router chooses, a pinned one, or the base model.

    The messages reach the model as they are: no document text is added to them.
    """
    body = await read_json(request, services.config.limits.max_request_bytes)
    chat = validate(ChatRequest, body)
    choice = await select(
        services,
        tenant,
        chat.model,
        messages=body["messages"],
        collection=chat.collection,
        adapters=chat.adapters,
        compose=chat.compose,
        explained=bool(chat.explain),
        headers=visible_headers(request.headers.items()),
    )
    return await generation.respond(request, services, tenant, "chat", body, choice)
