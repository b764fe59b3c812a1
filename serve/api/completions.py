"""`POST /v1/completions`: OpenAI's text completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from router.policy import visible_headers
from serve.api import generation
from serve.api.auth import TenantDep
from serve.api.bodies import read_json, validate
from serve.api.requests import CompletionRequest, documented_body
from serve.api.selection import select
from serve.api.services import ServicesDep

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post(
    "/completions",
    response_model=None,
    openapi_extra=documented_body(CompletionRequest),
    responses=generation.RESPONSES,
)
async def create_completion(request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Continue a text with the adapter that the router chooses, a pinned one, or the base model."""
    body = await read_json(request, services.config.limits.max_request_bytes)
    completion = validate(CompletionRequest, body)
    choice = await select(
        services,
        tenant,
        completion.model,
        prompt=_one_text(completion),
        collection=completion.collection,
        adapters=completion.adapters,
        compose=completion.compose,
        explained=bool(completion.explain),
        headers=visible_headers(request.headers.items()),
    )
    return await generation.respond(request, services, tenant, "completion", body, choice)


def _one_text(completion: CompletionRequest) -> str | None:
    """The prompt, if it is one text; None for token IDs and for several prompts."""
    prompt = completion.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]  # type: ignore[assignment]
    return prompt if isinstance(prompt, str) else None
