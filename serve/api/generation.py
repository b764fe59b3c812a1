"""What all generating endpoints share: wait for a place in the engine, run it, mark the answer, notice disconnects."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import Receive, Scope, Send

from router.policy.facts import visible_headers
from serve.api.errors import ErrorResponse, error_docs
from serve.api.events import error_event, mark_first_event, mark_responses
from serve.api.explain import Explanation
from serve.api.places import hold_place, timed_out, within
from serve.api.requests import SERVER_FIELDS
from serve.api.selection import Selection
from serve.api.services import Endpoint, Services
from serve.api.tiers import service_tier
from serve.deployments.engine_context import EngineContext
from serve.registry.records import Tenant

_LAST_SEND_S = 10.0  # for the end of a stream whose time is up to reach the client


class ComposedAdapter(BaseModel):
    """One of several adapters that answered together. `score` is null where the client named it."""

    adapter_id: str
    document_id: str | None
    weight: float
    score: float | None


class ImprintField(BaseModel):
    """Who answered and why; `adapter_id` null means the base model. In streams it stands in the first chunk.

    Where adapters were composed, or one had a weight, `adapters` are all of them, and `adapter_id` is the first.
    """

    adapter_id: str | None
    document_id: str | None
    reason: str
    score: float | None
    margin: float | None = None
    confidence: float | None = None
    threshold: float | None = None
    part: int | None = None
    parts: int | None = None
    degraded: bool = False
    adapters: list[ComposedAdapter] | None = None
    explain: Explanation | None = None


class GenerationObject(BaseModel):
    """An OpenAI `chat.completion` or `text_completion` object with an `imprint` field."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    service_tier: str | None = None
    imprint: ImprintField


_HEADER_DOCS = {
    "x-imprint-adapter": "The adapter's ID, or `base`. Of several composed all, with commas between them.",
    "x-imprint-document": "The adapter's document, or those of all.",
    "x-imprint-part": "Which part of its document the adapter covers, from 0; only where there are several.",
    "x-imprint-reason": "Why this adapter, or none.",
    "x-imprint-score": "The best candidate's score.",
    "x-imprint-confidence": "The calibrated probability that the best candidate's adapter answers correctly.",
    "x-request-id": "The server's ID of this request.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerationObject,
        "description": "An OpenAI object, or with `stream` its chunks as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADER_DOCS.items()},
    },
    **error_docs(400, 401, 403, 404, 409, 413, 415, 429, 503, 504),
}


async def respond(
    request: Request, services: Services, tenant: Tenant, endpoint: Endpoint, body: dict[str, Any], choice: Selection
) -> Response:
    """Run a checked request body on the engine and answer in OpenAI's form, streamed if the body asks for it.

    Raises ApiError 429 when the queue before the engine is full and 504 when the time is up before the first output.
    """
    clock = _Clock(services, endpoint, bool(body.get("stream")))
    deadline = asyncio.get_running_loop().time() + services.config.limits.request_timeout_s
    tier = service_tier(services.config, tenant.name, body.get("service_tier"))
    context = EngineContext(
        request_id=request.state.request_id,
        tenant_id=tenant.id,
        adapter_id=choice.engine_id,
        members=choice.members,
        cache_salt=cache_salt(tenant.id),
        priority=tier.priority,
        on_missing_adapter="refuse" if choice.named else services.config.engine.on_missing_adapter,
        sequences=_sequences(body),
    )
    # A null means what an absent field means, also where vLLM takes no null.
    passed = {name: value for name, value in body.items() if name not in SERVER_FIELDS and value is not None}
    async with AsyncExitStack() as held:
        async with within(deadline, services.config.limits):
            place = hold_place(services, services.queues.engine, "engine", tenant, tier.priority, context.sequences)
            await held.enter_async_context(place)
            items = services.engine.generate(endpoint, passed, context)
            # On a client's disconnect this coroutine is cancelled; closing the items aborts generation in the engine.
            held.push_async_callback(items.aclose)
            head = await anext(items)
            answer: dict[str, Any] = {} if head["stream"] else await anext(items)
        if head.get("unavailable"):
            choice = choice.by_base()
        if head["status"] < 400:
            headers_seen = visible_headers(request.headers.items())
            details = {**choice.details, "adapter_id": choice.adapter_id, "reason": choice.reason}
            services.recorder.note(context.request_id, tenant.id, choice.model, choice.text, headers_seen, details)
        marks: dict[str, Any] = {"imprint": choice.summary()}
        if body.get("service_tier") or endpoint == "responses":
            marks["service_tier"] = tier.name
        headers = {**head.get("headers", {}), **choice.headers(), "x-request-id": context.request_id}
        if head["stream"]:
            mark = mark_responses if endpoint == "responses" else mark_first_event
            events = _mark_stream(items, partial(mark, marks=marks), clock, deadline, services)
            return _HoldingStream(events, head["status"], headers, held.pop_all(), deadline + _LAST_SEND_S)
        if head["status"] >= 400:
            ErrorResponse.model_validate(answer)
            return JSONResponse(answer, head["status"], headers)
        clock.first_output()
        return JSONResponse({**answer, **marks}, head["status"], headers)


def cache_salt(tenant_id: str) -> str:
    """What keeps one tenant's prefix cache from answering, or timing, another's requests."""
    return hashlib.sha256(f"imprint prefix cache of {tenant_id}".encode()).hexdigest()


async def _mark_stream(
    items: AsyncGenerator[Any, None],
    mark: Callable[[str, bool], str],
    clock: _Clock,
    deadline: float,
    services: Services,
) -> AsyncGenerator[str, None]:
    """The engine's events, marked; after `deadline` an error event instead of further ones."""
    first = True
    while True:
        try:
            async with asyncio.timeout_at(deadline) as limit:
                text = await anext(items, None)
        except TimeoutError:
            if not limit.expired():
                raise
            yield error_event(timed_out(services.config.limits))
            return
        if text is None:
            return
        if first:
            clock.first_output()
        yield mark(text, first)
        first = False


class _HoldingStream(StreamingResponse):
    """A stream that gives back what its request holds when it has ended, however that is, and even if it never began:
    the body of a response whose client has gone is not iterated at all, and one that does not read blocks `send`."""

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        status: int,
        headers: Mapping[str, str],
        held: AsyncExitStack,
        deadline: float,
    ) -> None:
        super().__init__(events, status, headers, media_type="text/event-stream")
        self._held = held
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, asyncio.timeout_at(self._deadline):
            await super().__call__(scope, receive, send)


def _sequences(body: Mapping[str, Any]) -> int:
    """How many sequences a request is for the engine: its prompts times `n`."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * (body.get("n") or 1)


class _Clock:
    """Measures the time to the first output once."""

    def __init__(self, services: Services, endpoint: Endpoint, stream: bool) -> None:
        self._started = time.monotonic()
        self._histogram = services.metrics.first_chunk_seconds.labels(endpoint, str(stream).lower())

    def first_output(self) -> None:
        self._histogram.observe(time.monotonic() - self._started)
