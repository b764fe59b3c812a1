"""The FastAPI application: routes, error handling, request IDs, metrics, and an OpenAPI document that is true."""

from __future__ import annotations

import secrets
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import (
    adapters,
    chat,
    completions,
    documents,
    embeddings,
    errors,
    feedback,
    jobs,
    keys,
    models,
    operations,
    policy,
    responses,
    route,
    slots,
    versions,
)
from serve.api.requests import body_schemas
from serve.api.services import Services
from serve.metrics import IngressMetrics

_DESCRIPTION = """Post documents, chat with what they became.

A posted document turns into a LoRA adapter; OpenAI's endpoints answer with the adapter that fits the question."""


def create_app(services: Services) -> FastAPI:
    """The application over these services."""
    app = FastAPI(title="Imprint", version=_version(), description=_DESCRIPTION, redirect_slashes=False)
    app.state.services = services
    errors.install(app)
    # versions before documents, whose IDs may hold slashes and would take in "/versions".
    for module in (
        versions, documents, jobs, adapters, chat, completions, responses, embeddings, models, route, policy, feedback,
        keys, slots, operations,
    ):  # fmt: skip
        app.include_router(module.router)
    app.add_middleware(Observe, metrics=services.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class Observe:
    """ASGI middleware: gives each request its ID and counts and times it under its route's template."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # the client went away before an answer

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, (b"x-request-id", request_id.encode())]}
            await send(message)

        started = time.monotonic()
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            status = 500  # the outermost middleware answers it
            raise
        finally:
            self._metrics.in_flight.dec()
            template = getattr(scope.get("route"), "path_format", "unmatched")
            method = scope["method"] if template != "unmatched" else "other"
            self._metrics.requests.labels(template, method, str(status)).inc()
            self._metrics.request_seconds.labels(template, method).observe(time.monotonic() - started)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, completed by the bodies that routes read themselves, without its own error shape."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        components.update(body_schemas())
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema


def _version() -> str:
    try:
        return version("imprint")
    except PackageNotFoundError:
        return "0"
