"""The ingress deployment: the HTTP API over the registry and the handles of engine, router and generator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.api.application import create_app
from serve.api.recording import DecisionRecorder
from serve.api.services import Endpoint, Queues, Services
from serve.config import ImprintConfig
from serve.deployments.engine_context import EngineContext
from serve.deployments.engine_failover import retry_unstarted
from serve.deployments.heap import tend_heap
from serve.deployments.ingress_port import take_port_again
from serve.metrics import IngressMetrics
from serve.registry import Registry

logger = logging.getLogger(__name__)


class EngineHandle:
    """The engine behind a Ray handle; see `serve.api.services.Engine`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)

    def generate(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        """Start a request, again if its replica dies before the first output; closing the generator before its end
        aborts it in the engine."""
        return retry_unstarted(lambda: self._attempt(endpoint, body, context), context.request_id)

    async def _attempt(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        response = self._generate.remote(endpoint, dict(body), context)
        finished = False
        try:
            head, first = await anext(response)
            yield head
            if first is not None:
                yield first
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

    async def slots(self) -> list[dict[str, Any]]:
        """Where the adapters are, for each replica that answers."""
        try:
            found = await self._handle.broadcast("slots").results_async(timeout_s=5, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError) as error:
            found = [error]
        for failure in found:
            if isinstance(failure, BaseException):
                logger.warning("an engine replica does not say where its adapters are: %r", failure)
        return [replica for replica in found if isinstance(replica, dict)]


class RouterHandle:
    """The router behind a Ray handle; see `serve.api.services.Router`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def route(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Decide which adapter answers a request."""
        return await self._handle.route.remote(dict(request))

    async def embeddings(self, texts: list[str], dimensions: int | None) -> dict[str, Any]:
        """The vectors of texts; cancelling the call ends the work."""
        response = self._handle.embeddings.remote(texts, dimensions)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def check_policy(self, tenant_id: str, text: str, limit: int) -> dict[str, Any]:
        """What a policy would have changed about recent decisions."""
        return await self._handle.check_policy.remote(tenant_id, text, limit)

    async def suggestions(self, tenant_id: str, least: int, limit: int) -> dict[str, Any]:
        """Subjects of questions that found no document."""
        return await self._handle.suggestions.remote(tenant_id, least, limit)

    async def metrics(self) -> str:
        """The router's metrics as Prometheus text."""
        return await self._handle.metrics.remote()

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
        take_port_again()
        config = ImprintConfig(**config) if isinstance(config, dict) else config
        metrics = IngressMetrics()
        registry = Registry.open(config.registry.url)
        self._services = Services(
            config=config,
            registry=registry,
            engine=EngineHandle(engine),
            router=RouterHandle(router),
            generator=GeneratorHandle(generator),
            metrics=metrics,
            queues=Queues(config, metrics),
            recorder=DecisionRecorder(registry, metrics, config.router.recorded_decisions),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray calls this once the constructor is done."""
        app = create_app(self._services)
        tend_heap()
        return app
