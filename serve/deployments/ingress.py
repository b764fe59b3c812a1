"""The ingress deployment: the HTTP API over the registry and the handles of engine, router and generator."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.api.application import create_app
from serve.api.services import Endpoint, Services
from serve.config import ImprintConfig
from serve.deployments.engine_context import EngineContext
from serve.metrics import IngressMetrics
from serve.registry import Registry


class EngineHandle:
    """The engine behind a Ray handle; see `serve.api.services.Engine`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = {
            "chat": handle.options(method_name="chat", stream=True),
            "completion": handle.options(method_name="completion", stream=True),
        }

    async def generate(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        """Start a request; closing the generator before its end aborts it in the engine."""
        response = self._streams[endpoint].remote(dict(body), context)
        finished = False
        try:
            async for item in response:
                yield item
            finished = True
        finally:
            if not finished:
                response.cancel()

    async def health(self) -> None:
        """Raise when the engine cannot serve."""
        await self._handle.health.remote()

    async def metrics(self) -> str:
        """vLLM's metrics as Prometheus text."""
        return await self._handle.metrics.remote()


class RouterHandle:
    """The router behind a Ray handle; see `serve.api.services.Router`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def route(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decide which adapter answers a request."""
        return await self._handle.route.remote(dict(request))

    async def health(self) -> None:
        """Raise when the router cannot serve."""
        await self._handle.health.remote()


class GeneratorHandle:
    """The generator behind a Ray handle; see `serve.api.services.Generator`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def health(self) -> None:
        """Raise when the generator cannot serve."""
        await self._handle.health.remote()

    async def metrics(self) -> str:
        """The generator's metrics as Prometheus text."""
        return await self._handle.metrics.remote()


@ray_serve.ingress()
class IngressDeployment:
    """Undecorated beyond the ASGI wrapper; `serve.app` makes it a Ray deployment. Light: neither vLLM nor torch."""

    def __init__(
        self,
        config: ImprintConfig | dict[str, Any],
        engine: DeploymentHandle,
        router: DeploymentHandle,
        generator: DeploymentHandle,
    ) -> None:
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        self._services = Services(
            config=config,
            registry=Registry.open(config.registry.url),
            engine=EngineHandle(engine),
            router=RouterHandle(router),
            generator=GeneratorHandle(generator),
            metrics=IngressMetrics(),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray calls this once the constructor is done."""
        return create_app(self._services)
