"""`/healthz`, `/readyz` and `/metrics`, for operators and their tools."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from serve import metrics
from serve.api.auth import AdminDep
from serve.api.errors import error_docs
from serve.api.services import Services, ServicesDep

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operation"])

_CHECK_TIMEOUT_S = 5.0


class Health(BaseModel):
    """The HTTP front is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served, part by part."""

    status: Literal["ready", "unready"]
    parts: dict[str, Literal["ok", "unavailable"]]


@router.get("/healthz")
async def healthz() -> Health:
    """200 as long as this process answers."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Some part cannot serve"}})
async def readyz(services: ServicesDep) -> Response:
    """200 when registry, engine, router and generator all serve, else 503."""
    readiness = await check_parts(services)
    return JSONResponse(readiness.model_dump(), 200 if readiness.status == "ready" else 503)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus text"}, **error_docs(401, 403)},
)
async def get_metrics(services: ServicesDep, _: AdminDep) -> Response:
    """Imprint's and vLLM's metrics. Needs an admin key."""
    pages = await asyncio.gather(
        _page("engine", services.engine.metrics()),
        _page("router", services.router.metrics()),
        _page("generator", services.generator.metrics()),
    )
    return Response(metrics.merge_texts(services.metrics.text(), *pages), media_type=metrics.CONTENT_TYPE)


async def check_parts(services: Services) -> Readiness:
    """Ask every part whether it serves."""
    checks = {
        "registry": services.call(services.registry.count_jobs),
        "engine": services.engine.health(),
        "router": services.router.health(),
        "generator": services.generator.health(),
    }
    results = await asyncio.gather(*(_check(name, check) for name, check in checks.items()))
    parts: dict[str, Literal["ok", "unavailable"]] = {
        name: "ok" if good else "unavailable" for name, good in zip(checks, results, strict=True)
    }
    return Readiness(status="ready" if all(results) else "unready", parts=parts)


async def _check(name: str, check: Awaitable[Any]) -> bool:
    try:
        await asyncio.wait_for(check, _CHECK_TIMEOUT_S)
    except Exception as error:
        logger.warning("%s is not ready: %r", name, error)
        return False
    return True


async def _page(name: str, text: Awaitable[str]) -> str:
    """A deployment's metrics; none when it does not answer, so that the others can still be read."""
    try:
        return await asyncio.wait_for(text, _CHECK_TIMEOUT_S)
    except Exception as error:
        logger.warning("no metrics from %s: %r", name, error)
        return ""
