"""What the HTTP routes work with, and the protocols of the deployments behind them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import anyio.to_thread
from fastapi import Depends, Request

from serve.config import ImprintConfig
from serve.deployments.engine_context import EngineContext
from serve.metrics import IngressMetrics
from serve.registry import Registry

T = TypeVar("T")
Endpoint = Literal["chat", "completion"]


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


class Router(Protocol):
    """The router deployment as the API sees it."""

    async def route(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decide which adapter answers a request."""
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


@dataclass(frozen=True)
class Services:
    """One replica's view of the system; lives in `app.state.services`."""

    config: ImprintConfig
    registry: Registry
    engine: Engine
    router: Router
    generator: Generator
    metrics: IngressMetrics

    async def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking call, such as one of the registry's, in a thread."""
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs))


def get_services(request: Request) -> Services:
    """FastAPI dependency: the application's services."""
    return request.app.state.services


ServicesDep = Annotated[Services, Depends(get_services)]
