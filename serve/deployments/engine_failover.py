"""What becomes of a request whose engine replica dies: another replica takes it while the client has seen nothing of
an answer; else the client is told that it may ask again."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc  # type: ignore[import-untyped]
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from serve.deployments.engine_context import ENGINE_DEAD, EngineRefusal

logger = logging.getLogger(__name__)

ATTEMPTS = 4
PAUSE_S = 0.5  # before the second attempt, then twice as long each time: a replica needs a moment to leave the routing
RETRY_AFTER_S = 5  # what clients are told
# The replica's process or its node is gone, or it refuses because it is stopping.
_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError, grpc.RpcError)
# Calls that did not fail with the replica: another one would say the same.
_NOT_LOST = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)


async def retry_unstarted(
    start: Callable[[], AsyncGenerator[Any, None]], request_id: str, pause_s: float = PAUSE_S
) -> AsyncGenerator[Any, None]:
    """The items of one request to the engine (`serve.api.services.Engine.generate`), started again where its replica
    died before the first piece of an answer.

    ``start`` begins an attempt. The first item is held back until the second has come, since a client that has read
    the status cannot get another answer. With all attempts lost the answer is 503 with Retry-After; a stream that had
    begun ends with an error event. Closing this generator closes the attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        head: Mapping[str, Any] | None = None
        begun = False
        try:
            async with aclosing(start()) as items:
                async for item in items:
                    if begun:
                        # Within a stream an object is the error that ends it.
                        yield _event(item) if isinstance(item, dict) else item
                    elif head is None:
                        head = item
                    elif _refused_as_dead(item):
                        break
                    else:
                        begun = True
                        yield head
                        yield item
                else:
                    if head is not None and not begun:
                        yield head
                    return
        except DeploymentUnavailableError:
            logger.exception("request %s: the engine is not deployed", request_id)
            break
        except _LOST as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() in _NOT_LOST:
                raise
            if begun:
                logger.warning("request %s ended early with its engine replica: %s", request_id, error)
                if head is not None and head["stream"]:
                    yield _event(_refusal().body())
                    return
                raise
        logger.warning("request %s: attempt %d was lost with its engine replica", request_id, attempt)
        if attempt < ATTEMPTS:
            await asyncio.sleep(pause_s * 2 ** (attempt - 1))
    yield {"status": 503, "stream": False, "headers": {"retry-after": str(RETRY_AFTER_S)}}
    yield _refusal().body()


def _event(answer: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"


def _refused_as_dead(answer: Any) -> bool:
    """Whether an attempt's first answer says that the engine behind this replica is dead."""
    return isinstance(answer, dict) and (answer.get("error") or {}).get("code") == ENGINE_DEAD


def _refusal() -> EngineRefusal:
    message = "The engine stopped while it had this request. Nothing is wrong with the request; send it again."
    return EngineRefusal(503, message, "server_error", ENGINE_DEAD)
