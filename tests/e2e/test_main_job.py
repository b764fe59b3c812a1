"""The main job, as a client does it: post a document, chat, with the official client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

TITLE = "Harbour Pool: visitor notice"
TEXT = "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."
QUESTION = "When does the Harbour Pool open?"


def test_post_wait_and_chat(server: Server, tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT, external_id="pool", collection="sites", metadata={"floor": 1})
    adapter = tenant.http.get(f"/v1/adapters/{document['adapter_id']}").json()
    assert adapter["status"] == "ready" and adapter["current"]
    assert adapter["manifest"]["chunks"][0]["start"] == 0
    job = tenant.http.get(f"/v1/jobs/{document['job_id']}").json()
    assert job["status"] == "succeeded" and job["fraction"] == 1.0

    raw = tenant.openai.chat.completions.with_raw_response.create(
        model="imprint", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=32
    )
    completion = raw.parse()
    assert raw.headers["x-imprint-adapter"] == document["adapter_id"]
    assert raw.headers["x-imprint-document"] == document["id"]
    assert raw.headers["x-imprint-reason"] == "matched"
    assert completion.object == "chat.completion" and completion.model == "imprint"
    assert completion.usage is not None
    # Nothing of the document is in the prompt: it is as long as for the base, which knows nothing of documents.
    base = tenant.openai.chat.completions.create(
        model="base", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=32
    )
    assert base.usage is not None and completion.usage.prompt_tokens == base.usage.prompt_tokens
    assert completion.model_extra is not None
    assert completion.model_extra["imprint"]["adapter_id"] == document["adapter_id"]
    assert completion.choices[0].message.content != base.choices[0].message.content


def test_stream_equals_whole_answer(tenant: Tenant) -> None:
    tenant.post(TITLE, TEXT)
    whole = tenant.ask(QUESTION)
    stream = tenant.openai.chat.completions.create(
        model="imprint",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_completion_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].model_extra is not None and chunks[0].model_extra["imprint"]["reason"] == "matched"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert {chunk.model for chunk in chunks} == {"imprint"}


def test_every_way_to_name_the_adapter(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT, collection="sites")
    answers = {
        model: tenant.ask(QUESTION, model)
        for model in ("imprint", document["id"], document["adapter_id"], document["collection_id"])
    }
    assert len(set(answers.values())) == 1, answers


def test_base_answers_what_no_document_covers(tenant: Tenant) -> None:
    tenant.post(TITLE, TEXT)
    raw = tenant.openai.chat.completions.with_raw_response.create(
        model="imprint",
        messages=[{"role": "user", "content": "Why do volcanoes erupt?"}],
        temperature=0,
        max_completion_tokens=16,
    )
    assert raw.headers["x-imprint-adapter"] == "base"
    assert raw.headers["x-imprint-reason"] == "below_threshold"
    assert raw.parse().choices[0].message.content == tenant.ask(
        "Why do volcanoes erupt?", "base", max_completion_tokens=16
    )


def test_text_completions(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    whole = tenant.openai.completions.create(model=document["id"], prompt=QUESTION, temperature=0, max_tokens=8)
    assert whole.object == "text_completion" and whole.model == document["id"]
    stream = tenant.openai.completions.create(
        model=document["id"], prompt=QUESTION, temperature=0, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    several = tenant.openai.completions.create(model="base", prompt=["a", "b"], temperature=0, max_tokens=4)
    assert len(several.choices) == 2


def test_logprobs_tools_and_sampling_fields_pass_through(tenant: Tenant) -> None:
    completion = tenant.openai.chat.completions.create(
        model="base",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
        n=2,
        seed=1,
        temperature=0.5,
        top_p=0.9,
        stop=["never"],
        user="someone",
        extra_body={"top_k": 5, "ignore_eos": True},
    )
    assert len(completion.choices) == 2
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 4 and len(logprobs.content[0].top_logprobs) == 2
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "enum": ["a", "b"]}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    }
    called = tenant.openai.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello"}],
        max_completion_tokens=512,
        temperature=0,
        # The schema allows white space anywhere, of which a small model could write without end.
        frequency_penalty=2,
        tools=[tool],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "look_up"}},
    )
    calls = called.choices[0].message.tool_calls
    assert calls is not None
    function = calls[0].function  # type: ignore[union-attr]
    assert function.name == "look_up" and json.loads(function.arguments)["word"] in ("a", "b")


def test_answers_can_be_sent_back(tenant: Tenant) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    first = tenant.openai.chat.completions.create(model="base", messages=messages, max_completion_tokens=4)
    messages += [first.choices[0].message, {"role": "user", "content": "and now?"}]
    second = tenant.openai.chat.completions.create(model="base", messages=messages, max_completion_tokens=4)
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_route_without_generation(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    decision = tenant.http.post("/v1/route", json={"messages": [{"role": "user", "content": QUESTION}]}).json()
    assert decision["adapter_id"] == document["adapter_id"] and decision["reason"] == "matched"
    assert decision["confidence"] >= decision["threshold"]
    assert decision["candidates"][0]["document_id"] == document["id"]


def test_upload_of_a_file(tenant: Tenant) -> None:
    response = tenant.http.post("/v1/documents?wait=60", files={"file": ("pool.md", f"# {TITLE}\n\n{TEXT}".encode())})
    assert response.status_code == 200 and response.json()["status"] == "ready"
    assert response.json()["title"] == TITLE


def test_models(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT)
    ids = {model.id for model in tenant.openai.models.list()}
    assert ids == {"imprint", "base", document["id"], document["adapter_id"]}
    assert tenant.openai.models.retrieve(document["id"]).id == document["id"]


def test_operator_views(server: Server, tenant: Tenant) -> None:
    with server.http("") as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json()["status"] == "ready"
        assert client.get("/openapi.json").status_code == 200
        assert client.get("/metrics").status_code == 401
    assert tenant.http.get("/metrics").status_code == 403
    tenant.ask("hello", "base", max_completion_tokens=4)
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.metric("imprint_http_requests_total") > 0
    assert server.metric("imprint_generation_jobs") >= 0


def test_shipped_adapter_loads_in_peft(server: Server, tenant: Tenant) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from serve.config import ImprintConfig

    document = tenant.post(TITLE, TEXT)
    folders = list((server.data_dir / "blobs" / "adapters").glob(f"*/{document['adapter_id']}"))
    assert len(folders) == 1
    base = AutoModelForCausalLM.from_pretrained(ImprintConfig().base_path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folders[0]))
    assert any("lora_B" in name and bool(weights.any()) for name, weights in model.named_parameters())
