"""A place behind a fair queue, and the time within which a request must end, with the errors that clients get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from serve.admission import Admission, AdmissionRefused
from serve.api.errors import ApiError
from serve.api.services import Services
from serve.config import LimitsConfig
from serve.registry.records import Tenant

_REFUSALS = {
    "queue_full": "The server has too many waiting requests.",
    "tenant_queue_full": "This tenant has too many waiting requests.",
    "waited_too_long": "The server was too busy to start this request in time.",
}


@asynccontextmanager
async def hold_place(
    services: Services, queue: Admission, name: str, tenant: Tenant, priority: int = 0, cost: int = 1
) -> AsyncGenerator[None, None]:
    """Wait for a place behind `queue`, named `name` in the metrics. Raises ApiError 429 with Retry-After."""
    try:
        async with queue.slot(tenant.name, priority, cost) as waited_s:
            services.metrics.admission_wait_seconds.labels(name).observe(waited_s)
            yield
    except AdmissionRefused as refused:
        services.metrics.admission_refused.labels(name, refused.reason).inc()
        raise ApiError(
            429,
            f"{_REFUSALS[refused.reason]} Try again in {refused.retry_after_s} s.",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(refused.retry_after_s)},
        ) from None


@asynccontextmanager
async def within(deadline: float, limits: LimitsConfig) -> AsyncGenerator[None, None]:
    """End what is done inside at `deadline`, a time of the event loop. Raises ApiError 504 then."""
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise timed_out(limits) from None


def timed_out(limits: LimitsConfig) -> ApiError:
    """The error of a request that took too long."""
    return ApiError(
        504,
        f"The request was not finished within {limits.request_timeout_s:g} s and was ended.",
        code="timeout",
        # OpenAI's clients would send it again, to take as long again.
        headers={"x-should-retry": "false"},
    )
