"""The fair queue, service tiers and request timeouts as clients of the HTTP API see them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve.api.services import Endpoint
from serve.deployments.engine_context import EngineContext
from tests.serve.api_helpers import Api, ScriptedEngine, error_of, events_of, make_api

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


@dataclass
class GatedEngine(ScriptedEngine):
    """Holds each request after its first item until `gate` is set."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(
        self, endpoint: Endpoint, body: Mapping[str, Any], context: EngineContext
    ) -> AsyncGenerator[Any, None]:
        items = super().generate(endpoint, body, context)
        try:
            yield await anext(items)
            await self.gate.wait()
            async for item in items:
                yield item
        finally:
            await items.aclose()


def gated(folder: Path, **sections: Any) -> tuple[Api, GatedEngine]:
    """An application whose engine is a GatedEngine."""
    api = make_api(folder, **sections)
    engine = GatedEngine()
    object.__setattr__(api.services, "engine", engine)
    return api, engine


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_waits_for_a_place_and_refuses_when_full(tmp_path: Path) -> None:
    api, engine = gated(tmp_path, admission={"max_running": 1, "max_queued": 4, "max_queued_per_tenant": 1})
    queue = api.services.queues.engine
    async with api.client() as acme, api.client(api.other_key) as globex:
        first = asyncio.create_task(acme.post(PATH, json=CHAT))
        await until(lambda: queue.running == 1)
        waiting = asyncio.create_task(acme.post(PATH, json={**CHAT, "stream": True}))
        await until(lambda: queue.queued == 1)
        refused = await acme.post(PATH, json=CHAT)
        error = error_of(refused, 429)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        # Another tenant has a queue of its own.
        other = asyncio.create_task(globex.post(PATH, json=CHAT))
        await until(lambda: queue.queued == 2)
        text = api.services.metrics.text()
        assert 'imprint_admission_queued{queue="engine"} 2.0' in text
        assert 'imprint_admission_running{queue="engine"} 1.0' in text
        assert 'imprint_admission_refused_total{queue="engine",reason="tenant_queue_full"} 1.0' in text
        assert len(engine.calls) == 1
        engine.gate.set()
        answers = await asyncio.gather(first, waiting, other)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert events_of(answers[1].text)[0]["imprint"]["reason"] == "base_requested"
    assert queue.running == queue.queued == 0
    assert 'imprint_admission_wait_seconds_count{queue="engine"} 3.0' in api.services.metrics.text()


async def test_waiting_too_long_is_a_429(tmp_path: Path) -> None:
    api, engine = gated(tmp_path, admission={"max_running": 1, "wait_s": 0.05})
    async with api.client() as client:
        first = asyncio.create_task(client.post(PATH, json=CHAT))
        await until(lambda: api.services.queues.engine.running == 1)
        assert error_of(await client.post(PATH, json=CHAT), 429)["code"] == "rate_limit_exceeded"
        engine.gate.set()
        assert (await first).status_code == 200


async def test_each_sequence_takes_a_place(tmp_path: Path) -> None:
    api, engine = gated(tmp_path, admission={"max_running": 100})
    queue = api.services.queues.engine
    for path, body, places in (
        (PATH, {**CHAT, "n": 3}, 3),
        ("/v1/completions", {"model": "base", "prompt": ["a", "b"], "n": 2}, 4),
        ("/v1/completions", {"model": "base", "prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"model": "base", "prompt": [[1], [2]]}, 2),
    ):
        engine.gate.clear()
        async with api.client() as client:
            task = asyncio.create_task(client.post(path, json=body))
            await until(lambda: queue.running)
            assert queue.running == places
            engine.gate.set()
            assert (await task).status_code == 200
        assert queue.running == 0


async def test_a_client_that_leaves_leaves_the_queue(tmp_path: Path) -> None:
    api, engine = gated(tmp_path, admission={"max_running": 1})
    queue = api.services.queues.engine
    async with api.client() as client:
        running, waiting = (asyncio.create_task(client.post(PATH, json=CHAT)) for _ in range(2))
        await until(lambda: queue.running == 1 and queue.queued == 1)
        waiting.cancel()
        await until(lambda: queue.queued == 0)
        running.cancel()
        await until(lambda: queue.running == 0)
    assert engine.aborted


@pytest.mark.parametrize("gone", ["at the head", "after the first event"])
async def test_a_stream_whose_client_has_gone_gives_its_place_back(tmp_path: Path, gone: str) -> None:
    api, engine = gated(tmp_path, admission={"max_running": 1})
    engine.gate.set()
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append("request")
            return {"type": "http.request", "body": json.dumps({**CHAT, "stream": True}).encode()}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message["type"])
        if gone == "at the head" or message["type"] == "http.response.body":
            raise OSError("the connection is closed")

    headers = [(b"authorization", f"Bearer {api.key}".encode()), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("imprint", 80), "root_path": "",
    }
    with pytest.raises(Exception):  # noqa: B017, PT011 (what Starlette makes of it is its own affair)
        await api.app(scope, receive, send)
    assert "http.response.start" in sent
    assert api.services.queues.engine.running == 0 and engine.aborted


async def test_service_tiers(tmp_path: Path) -> None:
    api = make_api(tmp_path, admission={"priority_tenants": ["globex"]})
    cases = [
        (api.key, None, None, 0), (api.key, "auto", "default", 0), (api.key, "default", "default", 0),
        (api.key, "flex", "flex", 1), (api.key, "priority", "default", 0), (api.other_key, "priority", "priority", -1),
    ]
    for key, asked, served, priority in cases:
        async with api.client(key) as client:
            answer = (await client.post(PATH, json={**CHAT, "service_tier": asked})).json()
            stream = await client.post(PATH, json={**CHAT, "service_tier": asked, "stream": True})
        assert answer.get("service_tier") == served
        assert events_of(stream.text)[0].get("service_tier") == served
        assert {call[2].priority for call in api.engine.calls[-2:]} == {priority}
        assert all("service_tier" not in call[1] for call in api.engine.calls)
    async with api.client() as client:
        error = error_of(await client.post(PATH, json={**CHAT, "service_tier": "gold"}), 400)
    assert error["param"] == "service_tier"


async def test_timeout_before_the_first_output(tmp_path: Path) -> None:
    api = make_api(tmp_path, limits={"request_timeout_s": 0.05})
    api.engine.hang = True
    for stream in (False, True):
        async with api.client() as client:
            response = await client.post(PATH, json={**CHAT, "stream": stream})
        assert error_of(response, 504)["code"] == "timeout"
        assert response.headers["x-should-retry"] == "false"
        assert api.engine.aborted and api.services.queues.engine.running == 0


async def test_timeout_of_a_stream_is_its_last_event(tmp_path: Path) -> None:
    api, engine = gated(tmp_path, limits={"request_timeout_s": 0.05})
    async with api.client() as client:
        response = await client.post(PATH, json={**CHAT, "stream": True})
    assert response.status_code == 200
    (error,) = events_of(response.text)
    assert error["error"]["code"] == "timeout" and error["error"]["type"] == "server_error"
    assert engine.aborted and api.services.queues.engine.running == 0


async def test_the_wait_for_a_place_counts(tmp_path: Path) -> None:
    api = make_api(tmp_path, admission={"max_running": 1}, limits={"request_timeout_s": 0.05})
    queue = api.services.queues.engine
    async with api.client() as client, queue.slot("someone"):
        assert error_of(await client.post(PATH, json=CHAT), 504)["code"] == "timeout"
        assert queue.queued == 0
    assert not api.engine.calls
