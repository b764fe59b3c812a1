"""What the HTTP routes work with, and the protocols of the deployments behind them."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import anyio.to_thread
from fastapi import Depends, Request

from serve.admission import Admission
from serve.api.recording import DecisionRecorder
from serve.config import ImprintConfig
from serve.deployments.engine_context import EngineContext
from serve.metrics import IngressMetrics
from serve.registry import Registry
from serve.registry.read_cache import MISSING

T = TypeVar("T")
Endpoint = Literal["chat", "completion", "responses"]


class Engine(Protocol):
    """The engine deployment as the API sees it."""

    def generate(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        """Start a request: the first item is {"status", "stream", "headers"}, then the answer's object or SSE texts.

        Closing the iterator aborts generation.
        """
        ...

    async def health(self) -> None:
        """Raise when it cannot serve."""
        ...

    async def metrics(self) -> str:
        """vLLM's metrics as Prometheus text."""
        ...

    async def slots(self) -> list[dict[str, Any]]:
        """Where the adapters are, for each replica that answers; see `serve.api.slots`."""
        ...


class Router(Protocol):
    """The router deployment as the API sees it."""

    async def route(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decide which adapter answers a request."""
        ...

    async def check_policy(self, tenant_id: str, text: str, limit: int) -> dict[str, Any]:
        """What a policy would have changed about recent decisions, see `serve.deployments.router_policy.dry_run`."""
        ...

    async def suggestions(self, tenant_id: str, least: int, limit: int) -> dict[str, Any]:
        """Subjects of questions that found no document, see `serve.deployments.router_suggestions`."""
        ...

    async def metrics(self) -> str:
        """The router's metrics as Prometheus text."""
        ...

    async def embeddings(self, texts: list[str], dimensions: int | None) -> dict[str, Any]:
        """{"dimension", "max_tokens", "tokens", "vectors"}, see `serve.deployments.router`."""
        ...

    async def health(self) -> None:
        """Raise when it cannot serve."""
        ...


class Generator(Protocol):
    """The generator deployment as the API sees it."""

    async def health(self) -> None:
        """Raise when it cannot serve."""
        ...

    async def metrics(self) -> str:
        """The generator's metrics as Prometheus text."""
        ...


class Queues:
    """The fair queues of one ingress replica: before the engine, and before the encoder. Each ingress replica gives
    out its part of the places."""

    def __init__(self, config: ImprintConfig, metrics: IngressMetrics) -> None:
        settings, engine = config.admission, config.engine
        max_running = settings.max_running or 2 * engine.max_num_seqs

        def queue(name: str, limit: int) -> Admission:
            own = math.ceil(limit / config.ingress.num_replicas)
            queue = Admission(
                own, settings.max_queued, settings.max_queued_per_tenant, settings.weights, settings.wait_s
            )
            metrics.admission_queued.labels(name).set_function(lambda: queue.queued)
            metrics.admission_running.labels(name).set_function(lambda: queue.running)
            return queue

        self.engine = queue("engine", max_running * engine.most_replicas)
        # Routing waits for the same encoder, so embeddings take turns at it.
        self.encoder = queue("encoder", config.router.num_replicas)


@dataclass(frozen=True)
class Services:
    """One replica's view of the system; lives in `app.state.services`."""

    config: ImprintConfig
    registry: Registry
    engine: Engine
    router: Router
    generator: Generator
    metrics: IngressMetrics
    queues: Queues
    recorder: DecisionRecorder

    async def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking call, such as one of the registry's, in a thread."""
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs))

    async def read(self, function: Callable[..., T], *args: Hashable) -> T:
        """Run a read of the registry in a thread, or give its last result where nothing was committed since.

        For reads that every request needs. The result is shared, so it must be immutable.
        """
        reads, key = self.registry.reads, (function.__qualname__, *args)
        version = reads.version()
        result = reads.get(key)
        if result is MISSING:
            result = await self.call(function, *args)
            reads.put(version, key, result)
        return result


async def get_services(request: Request) -> Services:
    """FastAPI dependency: the application's services. Not blocking, so no thread is asked for it."""
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(get_services)]
