"""`/v1/responses` over HTTP: what is refused, what reaches router and engine, and where the `imprint` field stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.api.events import mark_responses
from tests.serve.api_helpers import Api, error_of, make_api

PATH = "/v1/responses"
ANSWER = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "m", "output": []}


def event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path)
    api.engine.answer = ANSWER
    yield api
    api.registry.close()


async def test_router_and_engine_get_the_input(api: Api) -> None:
    earlier = [
        {"role": "user", "content": "What is the Corvo?"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A lamp."}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "3 kg"},
        {"role": "user", "content": [{"type": "input_text", "text": "And its weight?"}]},
    ]
    async with api.client() as client:
        for given in ("What does it weigh?", earlier):
            body = {"model": "imprint", "input": given, "instructions": "Be brief.", "collection": None, "store": False}
            response = await client.post(PATH, json={**body, "service_tier": "flex", "stop": None})
            assert response.status_code == 200, response.text
            assert response.json() == {
                **ANSWER,
                "imprint": {"adapter_id": None, "document_id": None, "reason": "no_candidates", "score": None},
                "service_tier": "flex",
            }
            endpoint, passed, context = api.engine.calls[-1]
            assert endpoint == "responses" and passed["input"] == given and passed["instructions"] == "Be brief."
            assert not {"stop", "service_tier", "collection"} & passed.keys()
            assert context.priority == 1 and context.cache_salt
    one, several = (call["messages"] for call in api.router.calls)
    assert one == [{"role": "user", "content": "What does it weigh?"}]
    assert [message["role"] for message in several] == ["user", "assistant", "user"]
    assert several[-1]["content"] == [{"type": "text", "text": "And its weight?"}]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"store": True}, "store", "not stored"),
        ({"background": True}, "background", "not stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "in 'input'"),
        ({"conversation": "conv_1"}, "conversation", "in 'input'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": [{"role": "user"}]}, "input.0", "content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "message"),
        ({"max_output_tokens": "4"}, "max_output_tokens", "integer"),
        ({"cache_salt": "x"}, "cache_salt", "Unknown"),
        ({"priority": -1}, "priority", "Unknown"),
        ({"request_id": "x"}, "request_id", "Unknown"),
        ({"previous_input_messages": []}, "previous_input_messages", "Unknown"),
        ({"max_tokens": 4}, "max_tokens", "Unknown"),
    ],
)
async def test_refused(api: Api, change: dict[str, Any], param: str, says: str) -> None:
    async with api.client() as client:
        error = error_of(await client.post(PATH, json={"model": "base", "input": "hi", **change}), 400)
    assert error["param"] == param and says in error["message"], error
    assert not api.engine.calls


async def test_stream_with_the_official_client(api: Api) -> None:
    part = {"item_id": "i", "output_index": 0, "content_index": 0}
    api.engine.events = [
        event("response.created", response=ANSWER, sequence_number=0)
        + event("response.in_progress", response=ANSWER, sequence_number=1),
        event("response.output_text.delta", delta="event: response.created\ndata: {", sequence_number=2, **part),
        event("response.completed", response=ANSWER, sequence_number=3),
    ]
    async with openai.AsyncOpenAI(base_url="http://imprint/v1", api_key=api.key, http_client=api.client()) as client:
        stream = await client.responses.create(model="base", input="hi", stream=True)
        events = [item async for item in stream]
    assert [item.sequence_number for item in events] == [0, 1, 2, 3]
    for item in (events[0], events[1], events[3]):
        assert item.response.model_extra["imprint"]["reason"] == "base_requested"  # type: ignore[union-attr]
    assert events[2].delta == "event: response.created\ndata: {"  # type: ignore[union-attr]


async def test_clients_do_not_repeat_what_timed_out(tmp_path: Path) -> None:
    api = make_api(tmp_path, limits={"request_timeout_s": 0.05})
    api.engine.hang = True
    async with openai.AsyncOpenAI(
        base_url="http://imprint/v1", api_key=api.key, http_client=api.client(), max_retries=3
    ) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.responses.create(model="base", input="hi")
    # Not tried again.
    assert failed.value.status_code == 504 and failed.value.code == "timeout" and len(api.engine.calls) == 1


def test_events_without_a_response_stay_as_they_are() -> None:
    text = event("response.output_text.delta", delta="x") + 'data: {"error": {"message": "m"}}\n\n'
    assert mark_responses(text, True, {"imprint": {}}) == text
