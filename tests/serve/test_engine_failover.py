"""A request whose replica dies is taken by another while its client has seen nothing; else it ends with an error."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError

from serve.deployments.engine_context import ENGINE_DEAD, EngineRefusal
from serve.deployments.engine_failover import ATTEMPTS, retry_unstarted


def call_error(code: str) -> grpc.aio.AioRpcError:
    """The end of a gRPC call, as Ray lets it through from a replica."""
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode[code], nothing, nothing)


STREAM = {"status": 200, "stream": True, "headers": {"x-request-id": "req_1"}}
WHOLE = {"status": 200, "stream": False, "headers": {"x-request-id": "req_1"}}
DEAD = EngineRefusal(503, "the engine has stopped", "server_error", ENGINE_DEAD).body()
LOST = [ActorDiedError(), ActorUnavailableError("gone", None), NodeDiedError("gone"), call_error("CANCELLED")]


class FakeAttempts:
    """Attempts as they would go on replicas: each a list of items, with an exception where the replica dies."""

    def __init__(self, *attempts: list[Any]) -> None:
        self.attempts = list(attempts)
        self.begun = 0
        self.closed = 0

    async def start(self) -> AsyncGenerator[Any, None]:
        items = self.attempts[self.begun]
        self.begun += 1
        try:
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


async def collect(start: Callable[[], AsyncGenerator[Any, None]]) -> list[Any]:
    return [item async for item in retry_unstarted(start, "req_1", pause_s=0)]


async def test_what_succeeds_passes_unchanged() -> None:
    fake = FakeAttempts([STREAM, "data: 1\n\n", "data: 2\n\n"])
    assert await collect(fake.start) == [STREAM, "data: 1\n\n", "data: 2\n\n"]
    answer = {"id": "chatcmpl-1"}
    assert await collect(FakeAttempts([WHOLE, answer]).start) == [WHOLE, answer]
    # An error that is not the engine's end is the answer.
    other = [{"status": 404, "stream": False, "headers": {}}, {"error": {"code": "model_not_found"}}]
    fake = FakeAttempts(other)
    assert await collect(fake.start) == other and fake.begun == 1


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("before", [[], [STREAM]], ids=["before the head", "after the head"])
async def test_a_replica_lost_before_the_first_output_is_replaced(before: list[Any], error: Exception) -> None:
    fake = FakeAttempts([*before, error], [STREAM, "data: 1\n\n"])
    assert await collect(fake.start) == [STREAM, "data: 1\n\n"]
    assert fake.begun == fake.closed == 2


@pytest.mark.parametrize("head", [STREAM, {"status": 503, "stream": False, "headers": {}}])
async def test_a_replica_that_says_its_engine_is_dead_is_left(head: dict[str, Any]) -> None:
    fake = FakeAttempts([head, DEAD], [head, DEAD], [WHOLE, {"id": "chatcmpl-1"}])
    assert await collect(fake.start) == [WHOLE, {"id": "chatcmpl-1"}]
    assert fake.closed == 3


@pytest.mark.parametrize("end", [DEAD, LOST[0]], ids=["engine", "replica"])
async def test_a_stream_that_has_begun_ends_with_an_error_event_and_is_not_sent_again(end: Any) -> None:
    fake = FakeAttempts([STREAM, "data: 1\n\n", end], [STREAM, "data: 1\n\n"])
    *before, last = await collect(fake.start)
    assert before == [STREAM, "data: 1\n\n"]
    error, done, rest = last.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == ENGINE_DEAD
    assert done == "data: [DONE]" and not rest
    assert fake.begun == 1


async def test_where_every_attempt_is_lost_the_client_may_try_again() -> None:
    fake = FakeAttempts(*[[LOST[0]] for _ in range(ATTEMPTS)])
    head, body = await collect(fake.start)
    assert head["status"] == 503 and not head["stream"] and int(head["headers"]["retry-after"]) > 0
    assert body["error"]["code"] == ENGINE_DEAD
    assert fake.begun == ATTEMPTS


@pytest.mark.parametrize("error", [ZeroDivisionError(), call_error("RESOURCE_EXHAUSTED")])
async def test_errors_that_come_from_the_request_are_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        await collect(FakeAttempts([error]).start)


async def test_closing_it_closes_the_attempt() -> None:
    fake = FakeAttempts([STREAM, "data: 1\n\n", "data: 2\n\n"])
    items = retry_unstarted(fake.start, "req_1")
    assert await anext(items) == STREAM and fake.closed == 0
    await items.aclose()
    assert fake.closed == 1
