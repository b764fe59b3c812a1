"""Chat and text completions over HTTP: what the engine is given, what the client gets, streams and disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.api.events import mark_first_event
from serve.api.generation import cache_salt
from tests.serve.api_helpers import Api, error_of, events_of, make_api
from tests.serve.registry_helpers import make_ready, one_part, several_parts

MESSAGES = [{"role": "user", "content": "When does the pool open?"}]
DECISION = {
    "adapter_id": "adp_1",
    "document_id": "doc_1",
    "reason": "matched",
    "score": 0.71,
    "margin": 0.2,
    "threshold": 0.4,
    "candidates": [{"adapter_id": "adp_1", "score": 0.71}],
    "timings": {"embed_s": 0.01},
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path)
    yield api
    api.registry.close()


async def test_routed_chat(api: Api) -> None:
    api.router.decision = DECISION
    body = {"model": "imprint", "messages": MESSAGES, "temperature": 0, "logprobs": True, "tools": [{"a": 1}]}
    async with api.client() as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.json()["imprint"] == {
        "adapter_id": "adp_1",
        "document_id": "doc_1",
        "reason": "matched",
        "score": 0.71,
        "margin": 0.2,
        "threshold": 0.4,
    }
    assert response.headers["x-imprint-adapter"] == "adp_1"
    assert response.headers["x-imprint-document"] == "doc_1"
    assert response.headers["x-imprint-reason"] == "matched"
    assert response.headers["x-imprint-score"] == "0.7100"
    assert response.headers["x-request-id"].startswith("req_")
    ((endpoint, passed, context),) = api.engine.calls
    tenant = api.registry.get_tenant("acme")
    assert tenant is not None
    assert endpoint == "chat" and passed == body
    assert context.tenant_id == tenant.id and context.adapter_id == "adp_1"
    assert context.cache_salt == cache_salt(tenant.id) and context.request_id == response.headers["x-request-id"]
    (asked,) = api.router.calls
    assert asked["tenant_id"] == tenant.id and asked["messages"] == MESSAGES


async def test_stream(api: Api) -> None:
    async with api.client() as client:
        body = {"model": "base", "messages": MESSAGES, "stream": True}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-imprint-reason"] == "base_requested"
    first, second = events_of(response.text)
    assert first["imprint"]["adapter_id"] is None and first["id"] == "x"
    assert "imprint" not in second
    assert not api.engine.aborted and not api.router.calls


async def test_completion_prompts(api: Api) -> None:
    async with api.client() as client:
        for prompt, asked in (("a b", "a b"), (["a b"], "a b")):
            response = await client.post("/v1/completions", json={"model": "imprint", "prompt": prompt})
            assert response.status_code == 200
            assert api.router.calls[-1]["prompt"] == asked
        for prompt in ([1, 2], [[1, 2]], ["a", "b"]):
            response = await client.post("/v1/completions", json={"model": "base", "prompt": prompt})
            assert response.status_code == 200, response.text
    assert [call[0] for call in api.engine.calls] == ["completion"] * 5


async def test_engine_errors_pass_through(api: Api) -> None:
    api.engine.status = 409
    api.engine.answer = {"error": {"message": "m", "type": "invalid_request_error", "param": None, "code": "c"}}
    for stream in (False, True):
        async with api.client() as client:
            body = {"model": "base", "messages": MESSAGES, "stream": stream}
            error = error_of(await client.post("/v1/chat/completions", json=body), 409)
        assert error["code"] == "c"


async def test_collection_is_not_passed_on(api: Api) -> None:
    async with api.client() as client:
        await client.post("/v1/documents", json={"text": "x", "collection": "c"})
        body = {"model": "imprint", "messages": MESSAGES, "collection": "c"}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert api.router.calls[0]["collection"].startswith("col_")
    assert "collection" not in api.engine.calls[0][1]


async def test_route(api: Api) -> None:
    api.router.decision = DECISION
    async with api.client() as client:
        decision = (await client.post("/v1/route", json={"messages": MESSAGES})).json()
        assert decision["adapter_id"] == "adp_1" and decision["candidates"] == DECISION["candidates"]
        base = (await client.post("/v1/route", json={"model": "base", "prompt": "x"})).json()
        assert base["adapter_id"] is None and base["reason"] == "base_requested"
    assert not api.engine.calls


async def test_a_part_and_a_degraded_adapter_are_told(api: Api) -> None:
    api.router.decision = {**DECISION, "part": 2, "parts": 7, "degraded": True}
    async with api.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": "imprint", "messages": MESSAGES})
        decision = (await client.post("/v1/route", json={"messages": MESSAGES})).json()
    field = response.json()["imprint"]
    assert (field["part"], field["parts"], field["degraded"]) == (2, 7, True)
    assert response.headers["x-imprint-part"] == "2"
    assert (decision["part"], decision["parts"], decision["degraded"]) == (2, 7, True)


async def test_nothing_is_said_of_parts_where_there_is_one_or_where_the_base_answers(api: Api) -> None:
    for change in ({"part": 0, "parts": 1}, {"adapter_id": None, "part": None, "parts": None}):
        api.router.decision = {**DECISION, "degraded": False, **change}
        async with api.client() as client:
            response = await client.post("/v1/chat/completions", json={"model": "imprint", "messages": MESSAGES})
        assert not {"part", "parts", "degraded"} & response.json()["imprint"].keys()
        assert "x-imprint-part" not in response.headers


async def test_a_named_document_of_several_parts_goes_through_the_router(api: Api) -> None:
    tenant = api.registry.get_tenant("acme")
    assert tenant is not None
    event = make_ready(api.registry, tenant.id, "Pool", parts=several_parts(3))
    adapters = [adapter.id for adapter in api.registry.current_adapters_of(tenant.id, event.document_id)]
    api.registry.set_alias(tenant.id, "pool", event.document_id)
    api.router.decision = {
        **DECISION, "adapter_id": adapters[1], "document_id": event.document_id, "reason": "pinned",
        "part": 1, "parts": 3, "degraded": True,
    }
    async with api.client() as client:
        for model in (event.document_id, "pool"):
            response = await client.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})
            assert response.json()["imprint"]["adapter_id"] == adapters[1]
            assert response.headers["x-imprint-part"] == "1" and response.headers["x-imprint-reason"] == "pinned"
        assert api.engine.calls[-1][2].adapter_id == adapters[1]
        assert [call["document_id"] for call in api.router.calls] == [event.document_id] * 2
        # Naming one of its adapters needs no router.
        response = await client.post("/v1/chat/completions", json={"model": adapters[2], "messages": MESSAGES})
        assert response.json()["imprint"]["part"] == 2 and len(api.router.calls) == 2
        # Nothing tells parts apart without a text.
        body = {"model": event.document_id, "prompt": [1, 2]}
        assert error_of(await client.post("/v1/completions", json=body), 400)["param"] == "prompt"
        # It was deleted since its name was looked up.
        api.router.decision = {"adapter_id": None, "document_id": None, "reason": "no_candidates", "score": None}
        body = {"model": event.document_id, "messages": MESSAGES}
        assert error_of(await client.post("/v1/chat/completions", json=body), 409)["code"] == "model_not_ready"


async def test_a_named_document_of_one_part_needs_no_router_even_when_it_is_degraded(api: Api) -> None:
    tenant = api.registry.get_tenant("acme")
    assert tenant is not None
    event = make_ready(api.registry, tenant.id, "Pool", parts=one_part(state="degraded"))
    async with api.client() as client:
        body = {"model": event.document_id, "messages": MESSAGES}
        response = await client.post("/v1/chat/completions", json=body)
    field = response.json()["imprint"]
    assert (field["adapter_id"], field["reason"], field["degraded"]) == (event.adapter_id, "pinned", True)
    assert "part" not in field and not api.router.calls


async def test_disconnect_aborts(api: Api) -> None:
    api.engine.hang = True
    async with api.client() as client:
        task = asyncio.create_task(
            client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES}, timeout=60)
        )
        await api.engine.started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert api.engine.aborted


def test_mark_first_event() -> None:
    assert mark_first_event("data: [DONE]\n\n", True, {"a": 1}) == "data: [DONE]\n\n"
    error = 'data: {"error":{"message":"m"}}\n\n'
    assert mark_first_event(error, True, {"a": 1}) == error
    assert mark_first_event('data: {"x":1}\n\n', False, {"a": 1}) == 'data: {"x":1}\n\n'
    assert mark_first_event('data: {"x":1}\n\nrest', True, {"a": 1}) == 'data: {"x":1,"a":1}\n\nrest'
