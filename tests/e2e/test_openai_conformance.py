"""What OpenAI's API promises, held against the real server with the official client. The main path, tools and plain
errors are in test_main_job.py and test_bad_input.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TITLE = "Harbour Pool: visitor notice"
TEXT = "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."
QUESTION = "When does the Harbour Pool open?"
GREEDY: dict[str, Any] = {"model": "base", "messages": HELLO, "temperature": 0}
# Ends only at its length, so that there is time to go away.
LONG: dict[str, Any] = {**GREEDY, "max_completion_tokens": 1900, "extra_body": {"ignore_eos": True}}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
# A schema allows white space anywhere, of which a small model could write without end.
BRIEF_JSON: dict[str, Any] = {"max_completion_tokens": 512, "temperature": 0, "frequency_penalty": 2}


class Colour(BaseModel):
    """SCHEMA as the client's helpers take it."""

    colour: Literal["red", "blue"]
    sure: bool


def text_of(completion: Any) -> str:
    return completion.choices[0].message.content or ""


def greedy(tenant: Tenant, **options: Any) -> Any:
    """A greedy answer of 16 tokens by the base that does not end earlier."""
    options = {"max_completion_tokens": 16, "extra_body": {"ignore_eos": True}, **options}
    return tenant.openai.chat.completions.create(**{**GREEDY, **options})


def many(server: Server, tenant: Tenant) -> openai.AsyncOpenAI:
    """An official client for any number of requests at a time."""
    http = httpx.AsyncClient(trust_env=False, timeout=120, limits=httpx.Limits(max_connections=None))
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=tenant.key, max_retries=0, http_client=http)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def engine_is(server: Server, busy: bool) -> bool:
    """Whether vLLM runs a request now, and the queue before it agrees."""
    running = server.metric("vllm:num_requests_running") > 0
    admitted = server.metric("imprint_admission_running", queue="engine") > 0
    return running == admitted == busy


def test_usage_in_streams(tenant: Tenant) -> None:
    whole = greedy(tenant)
    plain = list(greedy(tenant, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in plain)
    *chunks, last = greedy(tenant, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage is not None
    assert all(chunk.usage is None for chunk in chunks)
    for usage in (last.usage, whole.usage):
        assert usage.completion_tokens == 16 and usage.total_tokens == usage.prompt_tokens + 16
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]


def test_length_by_either_name_and_its_finish_reason(tenant: Tenant) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        cut = tenant.openai.chat.completions.create(**GREEDY, **{name: 3}, extra_body={"ignore_eos": True})
        assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    ended = tenant.openai.chat.completions.create(**GREEDY, max_completion_tokens=500)
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens < 500
    completion = tenant.openai.completions.create(model="base", prompt="hello", max_tokens=2)
    assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 2


def test_stop_texts(tenant: Tenant) -> None:
    whole = text_of(greedy(tenant))
    words = [word for word in whole.split() if len(word) > 1]
    stop = words[len(words) // 2]
    before = whole[: whole.index(stop)]
    for given in (stop, [stop], ["never said", stop]):
        answer = greedy(tenant, stop=given)
        assert text_of(answer) == before and answer.choices[0].finish_reason == "stop"
        chunks = list(greedy(tenant, stop=given, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert text_of(greedy(tenant, stop="never said")) == whole


def test_several_choices(tenant: Tenant) -> None:
    sampled = {"temperature": 2.0, "seed": 7, "n": 3}
    whole = greedy(tenant, **sampled)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == 48
    texts = ["", "", ""]
    for chunk in greedy(tenant, **sampled, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_seeds(tenant: Tenant) -> None:
    same = {text_of(greedy(tenant, temperature=2.0, seed=11)) for _ in range(3)}
    assert len(same) == 1
    assert len({text_of(greedy(tenant, temperature=2.0, seed=seed)) for seed in range(4)}) > 1


async def test_greedy_answers_repeat_also_in_a_full_batch(server: Server, tenant: Tenant) -> None:
    expected = text_of(greedy(tenant))
    options: dict[str, Any] = {**GREEDY, "max_completion_tokens": 16, "extra_body": {"ignore_eos": True}}
    async with many(server, tenant) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**options) for _ in range(24)))
    assert {text_of(answer) for answer in answers} == {expected}


def test_logprobs(tenant: Tenant) -> None:
    answer = greedy(tenant, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    # nano's first token brings the space that stands between question and answer.
    assert len(content) == 16 and "".join(token.token for token in content).lstrip() == text_of(answer)
    for token in content:
        assert token.logprob <= 0 and bytes(token.bytes).decode() == token.token
        scores = [top.logprob for top in token.top_logprobs]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert token.top_logprobs[0].token == token.token  # greedy
    streamed = [
        token
        for chunk in greedy(tenant, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [(token.token, pytest.approx(token.logprob, abs=1e-4)) for token in streamed] == [
        (token.token, token.logprob) for token in content
    ]
    assert greedy(tenant).choices[0].logprobs is None
    old = tenant.openai.completions.create(
        model="base", prompt="hello", temperature=0, max_tokens=4, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert len(old.choices[0].logprobs.tokens) == len(old.choices[0].logprobs.token_logprobs) == 4
    assert all(2 <= len(top) <= 3 for top in old.choices[0].logprobs.top_logprobs)


def test_structured_output(tenant: Tenant) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": SCHEMA}}
    answer = tenant.openai.chat.completions.create(
        model="base", messages=HELLO, response_format=schema, **BRIEF_JSON
    )
    said = json.loads(text_of(answer))
    assert said["colour"] in ("red", "blue") and isinstance(said["sure"], bool) and len(said) == 2
    assert answer.choices[0].finish_reason == "stop"
    stream = tenant.openai.chat.completions.create(
        model="base", messages=HELLO, response_format=schema, stream=True, **BRIEF_JSON
    )
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream)) == said
    parsed = tenant.openai.chat.completions.parse(model="base", messages=HELLO, response_format=Colour, **BRIEF_JSON)
    assert isinstance(parsed.choices[0].message.parsed, Colour)


def test_structured_output_by_an_adapter(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": SCHEMA}}
    answer = tenant.openai.chat.completions.create(
        model="imprint", messages=[{"role": "user", "content": QUESTION}], response_format=schema, **BRIEF_JSON
    )
    assert Colour.model_validate_json(text_of(answer))
    assert answer.model_extra["imprint"]["document_id"] == document["id"]


def test_tool_calls_in_a_stream_and_their_results(tenant: Tenant) -> None:
    tool: Any = {"type": "function", "function": {"name": "paint", "strict": True, "parameters": SCHEMA}}
    request: dict[str, Any] = {"model": "base", "messages": HELLO, "tools": [tool], **BRIEF_JSON}
    name, arguments, reasons = "", "", []
    for chunk in tenant.openai.chat.completions.create(
        **request, tool_choice={"type": "function", "function": {"name": "paint"}}, stream=True
    ):
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert name == "paint" and Colour.model_validate_json(arguments)
    assert reasons[-1] in ("stop", "tool_calls") and not any(reasons[:-1])
    required = tenant.openai.chat.completions.create(**request, tool_choice="required")
    (call,) = required.choices[0].message.tool_calls or ()
    assert call.id and call.function.name == "paint" and Colour.model_validate_json(call.function.arguments)
    assert required.choices[0].finish_reason == "tool_calls"
    none = tenant.openai.chat.completions.create(**{**request, "max_completion_tokens": 4}, tool_choice="none")
    assert not none.choices[0].message.tool_calls
    messages = [*HELLO, required.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    after = tenant.openai.chat.completions.create(model="base", messages=messages, max_completion_tokens=4)
    assert after.usage is not None and after.usage.completion_tokens > 0


def test_completions_echo_and_suffix(tenant: Tenant) -> None:
    whole = tenant.openai.completions.create(model="base", prompt="hello there", temperature=0, max_tokens=4)
    echoed = tenant.openai.completions.create(
        model="base", prompt="hello there", temperature=0, max_tokens=4, echo=True
    )
    assert echoed.choices[0].text == "hello there" + whole.choices[0].text
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.openai.completions.create(model="base", prompt="hello", suffix="there", max_tokens=2)
    assert "suffix" in refused.value.message


def test_user_and_service_tier(tenant: Tenant) -> None:
    assert text_of(greedy(tenant, user="someone")) == text_of(greedy(tenant))
    assert greedy(tenant).service_tier is None
    assert greedy(tenant, service_tier="flex").service_tier == "flex"
    assert greedy(tenant, service_tier="auto").service_tier == "default"
    first = next(iter(greedy(tenant, service_tier="flex", stream=True)))
    assert first.service_tier == "flex"


def test_models(tenant: Tenant) -> None:
    listed = {model.id: model for model in tenant.openai.models.list()}
    assert {"imprint", "base"} <= listed.keys()
    for name in ("imprint", "base"):
        assert tenant.openai.models.retrieve(name).to_dict() == listed[name].to_dict()
        assert listed[name].object == "model" and listed[name].owned_by and isinstance(listed[name].created, int)
    with pytest.raises(openai.NotFoundError) as unknown:
        tenant.openai.models.retrieve("nope")
    assert unknown.value.code == "model_not_found"


def test_a_client_that_leaves_frees_the_engine(server: Server, tenant: Tenant) -> None:
    until(lambda: engine_is(server, busy=False))
    stream = tenant.openai.chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    assert engine_is(server, busy=True)
    stream.close()
    until(lambda: engine_is(server, busy=False), 10)
    # And one that waits for a whole answer.
    with pytest.raises(openai.APITimeoutError):
        tenant.openai.with_options(timeout=2).chat.completions.create(**LONG)
    until(lambda: engine_is(server, busy=False), 10)
    with pytest.raises(openai.APITimeoutError):
        tenant.openai.with_options(timeout=2).responses.create(
            model="base", input="hello", extra_body={"ignore_eos": True, "max_output_tokens": 1900}
        )
    until(lambda: engine_is(server, busy=False), 10)


async def test_a_busy_tenant_does_not_hold_up_another(server: Server, tenant: Tenant, other_tenant: Tenant) -> None:
    options: dict[str, Any] = {**GREEDY, "max_completion_tokens": 64, "extra_body": {"ignore_eos": True}}
    async with many(server, tenant) as busy, many(server, other_tenant) as other:
        requests = [asyncio.create_task(busy.chat.completions.create(**options)) for _ in range(500)]
        # The engine's places are taken, and hundreds wait.
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        started = time.monotonic()
        await other.chat.completions.create(**options)
        mine = time.monotonic() - started
        # It did not wait for those that were there before it.
        unanswered = sum(not request.done() for request in requests)
        answers = await asyncio.gather(*requests)
    assert unanswered >= 50, f"{mine:.1f} s of {time.monotonic() - started:.1f} s"
    assert {answer.usage.completion_tokens for answer in answers if answer.usage} == {64}
    assert server.metric("imprint_admission_wait_seconds_sum", queue="engine") > 1


def test_embeddings(tenant: Tenant) -> None:
    texts = ["How heavy is the lamp?", "What does the lamp weigh?", "Trains leave at noon."]
    answer = tenant.openai.embeddings.create(model="imprint-embed", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [len(vector) for vector in vectors] == [384] * 3 and answer.usage.total_tokens > 15

    def cosine(one: int, other: int) -> float:
        return sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))

    assert cosine(0, 0) == pytest.approx(1, abs=1e-4) and cosine(0, 1) > 0.6 > cosine(0, 2) + 0.2
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.openai.embeddings.create(model="imprint-embed", input=[[1, 2, 3]])
    assert refused.value.param == "input"


def test_responses(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    chat = tenant.openai.chat.completions.create(
        model="imprint", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=64
    )
    request: dict[str, Any] = {"model": "imprint", "input": QUESTION, "temperature": 0, "max_output_tokens": 64}
    answer = tenant.openai.responses.create(**request)
    assert answer.object == "response" and answer.id.startswith("resp_") and answer.model == "imprint"
    assert answer.status == "completed" and answer.output_text == text_of(chat)
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.model_extra["imprint"]["document_id"] == document["id"]
    turns = [{"role": "user", "content": QUESTION}, *answer.output, {"role": "user", "content": "And the lifeguard?"}]
    longer = tenant.openai.responses.create(**{**request, "input": turns, "instructions": "Be brief."})
    assert longer.usage is not None and longer.usage.input_tokens > answer.usage.input_tokens
    pinned = tenant.openai.responses.create(**{**request, "model": document["id"], "service_tier": "flex"})
    assert pinned.output_text == answer.output_text and pinned.service_tier == "flex"


def test_responses_in_a_stream(tenant: Tenant) -> None:
    request: dict[str, Any] = {"model": "base", "input": "hello", "temperature": 0, "max_output_tokens": 24}
    whole = tenant.openai.responses.create(**request)
    events = list(tenant.openai.responses.create(**request, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    for event in (events[0], events[-1]):
        assert event.response.model_extra["imprint"]["reason"] == "base_requested"
        assert event.response.id == events[0].response.id != whole.id
    with tenant.openai.responses.stream(**request) as stream:
        assert stream.get_final_response().output_text == whole.output_text
    cut = tenant.openai.responses.create(**{**request, "max_output_tokens": 2}, extra_body={"ignore_eos": True})
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_responses_with_tools_and_formats(tenant: Tenant) -> None:
    brief: dict[str, Any] = {
        "model": "base", "input": "hello", "temperature": 0, "max_output_tokens": 512,
        "extra_body": {"frequency_penalty": 2},
    }
    parsed = tenant.openai.responses.parse(**brief, text_format=Colour)
    assert isinstance(parsed.output_parsed, Colour)
    called = tenant.openai.responses.create(
        **brief,
        tools=[{"type": "function", "name": "paint", "strict": True, "parameters": SCHEMA}],
        tool_choice="required",
    )
    (call,) = (item for item in called.output if item.type == "function_call")
    assert call.name == "paint" and Colour.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = tenant.openai.responses.create(
        model="base", input=[{"role": "user", "content": "hello"}, call, result], max_output_tokens=4
    )
    assert after.usage is not None and after.usage.output_tokens > 0
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.openai.responses.create(model="base", input="hello", store=True)
    assert refused.value.param == "store"
