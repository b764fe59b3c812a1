"""An in-process application over a real registry, with scripted parts where Ray deployments would be.

What the API does with real ones is tested in tests/e2e.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from serve.api.application import create_app
from serve.api.recording import DecisionRecorder
from serve.api.services import Endpoint, Queues, Services
from serve.config import ImprintConfig
from serve.deployments.engine_context import EngineContext
from serve.metrics import IngressMetrics, RouterMetrics
from serve.registry import Registry, migrate


@dataclass
class ScriptedEngine:
    """Answers with `status` and `answer`, or streams `events`; notes what it was given and whether it was aborted."""

    status: int = 200
    answer: dict[str, Any] = field(default_factory=lambda: {"id": "x", "object": "chat.completion", "choices": []})
    events: list[str] = field(default_factory=lambda: ['data: {"id":"x"}\n\ndata: {"id":"x"}\n\n', "data: [DONE]\n\n"])
    hang: bool = False
    calls: list[tuple[str, dict[str, Any], EngineContext]] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: bool = False
    unavailable: bool = False
    replicas: list[dict[str, Any]] = field(default_factory=list)

    async def generate(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        self.calls.append((endpoint, dict(body), context))
        self.started.set()
        finished = False
        try:
            if self.hang:
                await asyncio.Event().wait()
            stream = bool(body.get("stream")) and self.status == 200
            head = {"status": self.status, "stream": stream, "headers": {"x-engine": "yes"}}
            yield {**head, "unavailable": self.unavailable}
            if stream:
                for event in self.events:
                    yield event
            else:
                yield self.answer
            finished = True
        finally:
            self.aborted = not finished

    async def health(self) -> None:
        if self.status >= 500:
            raise RuntimeError("dead")

    async def slots(self) -> list[dict[str, Any]]:
        return self.replicas

    async def metrics(self) -> str:
        return "# HELP vllm:x Help.\n# TYPE vllm:x counter\nvllm:x 1.0\n"


@dataclass
class ScriptedRouter:
    """Decides as told."""

    decision: dict[str, Any] = field(
        default_factory=lambda: {"adapter_id": None, "document_id": None, "reason": "no_candidates", "score": None}
    )
    calls: list[dict[str, Any]] = field(default_factory=list)
    dry_run: dict[str, Any] = field(default_factory=lambda: {"compared": 0, "changes": []})

    async def route(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append(dict(request))
        return self.decision

    async def check_policy(self, tenant_id: str, text: str, limit: int) -> dict[str, Any]:
        self.calls.append({"tenant_id": tenant_id, "text": text, "limit": limit})
        return self.dry_run

    async def suggestions(self, tenant_id: str, least: int, limit: int) -> dict[str, Any]:
        self.calls.append({"tenant_id": tenant_id, "least": least, "limit": limit})
        return {"questions": 0, "data": []}

    async def metrics(self) -> str:
        return RouterMetrics().text()

    async def health(self) -> None:
        return


class IdleGenerator:
    """A generator that never takes a job."""

    async def health(self) -> None:
        return

    async def metrics(self) -> str:
        return "# TYPE imprint_generation_jobs gauge\nimprint_generation_jobs 0.0\n"


@dataclass
class Api:
    """The application, its parts, and keys of two tenants."""

    app: FastAPI
    services: Services
    registry: Registry
    engine: ScriptedEngine
    router: ScriptedRouter
    key: str
    other_key: str
    admin_key: str

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        """A client as the holder of `key` (the first tenant's by default; empty: no key)."""
        key = self.key if key is None else key
        return httpx.AsyncClient(
            # A bug must come out as the 500 that a client would see.
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://imprint",
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )


def make_api(folder: Path, **sections: Any) -> Api:
    """A new application with its registry in `folder`; tenants acme and globex have a key each."""
    config = ImprintConfig(data_dir=folder, **sections)
    template, keys = _registry_with_keys()
    shutil.copy(template, folder / "registry.db")
    registry = Registry.open(config.registry.url)
    engine, router = ScriptedEngine(), ScriptedRouter()
    metrics = IngressMetrics()
    recorder = DecisionRecorder(registry, metrics, config.router.recorded_decisions)
    services = Services(config, registry, engine, router, IdleGenerator(), metrics, Queues(config, metrics), recorder)
    return Api(create_app(services), services, registry, engine, router, *keys)


@functools.cache
def _registry_with_keys() -> tuple[Path, tuple[str, str, str]]:
    """Made once, since migrating takes longer than most tests."""
    path = Path(tempfile.mkdtemp()) / "registry.db"
    atexit.register(shutil.rmtree, path.parent)
    url = f"sqlite:///{path}"
    migrate(url)
    registry = Registry.open(url)
    acme, globex = (registry.create_key(registry.create_tenant(name).id, "tenant")[1] for name in ("acme", "globex"))
    admin = registry.create_key(None, "admin")[1]
    registry.close()  # moves the write-ahead log into the file
    return path, (acme, globex, admin)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, after checking status and form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"]
    return body["error"]


def events_of(text: str) -> list[dict[str, Any]]:
    """The decoded server-sent events before [DONE], which must be there."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", text
    return [json.loads(line) for line in lines[:-1]]
