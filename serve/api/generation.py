"""What chat and text completions share: select who answers, run the engine, mark the answer, notice disconnects."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from serve.api.errors import ErrorResponse, error_docs
from serve.api.requests import SERVER_FIELDS
from serve.api.selection import Selection
from serve.api.services import Endpoint, Services
from serve.deployments.engine_context import EngineContext
from serve.registry.records import Tenant


class ImprintField(BaseModel):
    """Who answered and why; `adapter_id` null means the base model. In streams it stands in the first chunk."""

    adapter_id: str | None
    document_id: str | None
    reason: str
    score: float | None
    margin: float | None = None
    threshold: float | None = None
    part: int | None = None
    parts: int | None = None
    degraded: bool = False


class GenerationObject(BaseModel):
    """An OpenAI `chat.completion` or `text_completion` object with an `imprint` field."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    imprint: ImprintField


_HEADER_DOCS = {
    "x-imprint-adapter": "The adapter's ID, or `base`.",
    "x-imprint-document": "The adapter's document.",
    "x-imprint-part": "Which part of its document the adapter covers, from 0; only where there are several.",
    "x-imprint-reason": "Why this adapter, or none.",
    "x-imprint-score": "The best candidate's score.",
    "x-request-id": "The server's ID of this request.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerationObject,
        "description": "An OpenAI object, or with `stream` its chunks as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADER_DOCS.items()},
    },
    **error_docs(400, 401, 403, 404, 409, 413, 415, 503),
}


async def respond(
    request: Request, services: Services, tenant: Tenant, endpoint: Endpoint, body: dict[str, Any], choice: Selection
) -> Response:
    """Run a checked request body on the engine and answer in OpenAI's form, streamed if the body asks for it."""
    clock = _Clock(services, endpoint, bool(body.get("stream")))
    context = EngineContext(
        request_id=request.state.request_id,
        tenant_id=tenant.id,
        adapter_id=choice.adapter_id,
        cache_salt=cache_salt(tenant.id),
    )
    passed = {name: value for name, value in body.items() if name not in SERVER_FIELDS}
    items = services.engine.generate(endpoint, passed, context)
    streaming = False
    try:
        head = await anext(items)
        headers = {**head.get("headers", {}), **choice.headers(), "x-request-id": context.request_id}
        if head["stream"]:
            streaming = True
            return StreamingResponse(
                _mark_stream(items, choice, clock), head["status"], headers, media_type="text/event-stream"
            )
        answer: dict[str, Any] = await anext(items)
        if head["status"] >= 400:
            ErrorResponse.model_validate(answer)
            return JSONResponse(answer, head["status"], headers)
        clock.first_output()
        return JSONResponse({**answer, "imprint": choice.summary()}, head["status"], headers)
    finally:
        # On a client's disconnect this coroutine is cancelled; closing the items aborts generation in the engine.
        if not streaming:
            await items.aclose()


def cache_salt(tenant_id: str) -> str:
    """What keeps one tenant's prefix cache from answering, or timing, another's requests."""
    return hashlib.sha256(f"imprint prefix cache of {tenant_id}".encode()).hexdigest()


def mark_first_event(text: str, field: Mapping[str, Any]) -> str:
    """Put the `imprint` field into the first server-sent event of `text`, if that is a JSON object."""
    event, separator, rest = text.partition("\n\n")
    if not event.startswith("data: {"):
        return text
    chunk = json.loads(event.removeprefix("data: "))
    if "error" in chunk:
        return text
    chunk["imprint"] = dict(field)
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}{separator}{rest}"


async def _mark_stream(
    items: AsyncGenerator[Any, None], choice: Selection, clock: _Clock
) -> AsyncGenerator[str, None]:
    try:
        first = True
        async for text in items:
            if first:
                clock.first_output()
                text = mark_first_event(text, choice.summary())
                first = False
            yield text
    finally:
        await items.aclose()


class _Clock:
    """Measures the time to the first output once."""

    def __init__(self, services: Services, endpoint: Endpoint, stream: bool) -> None:
        self._started = time.monotonic()
        self._histogram = services.metrics.first_chunk_seconds.labels(endpoint, str(stream).lower())

    def first_output(self) -> None:
        self._histogram.observe(time.monotonic() - self._started)
