"""`/v1/embeddings` over HTTP, with the real encoder in the router's place."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from router.embed import MiniLmEncoder
from serve.deployments.router import RouterDeployment
from tests.serve.api_helpers import Api, error_of, make_api

PATH = "/v1/embeddings"
TEXTS = ["How heavy is the lamp?", "The lamp weighs 3 kg.", "Trains leave at noon."]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, limits={"max_embedding_inputs": 30})
    object.__setattr__(api.services, "router", RouterDeployment(api.services.config))
    yield api
    api.registry.close()


def official(api: Api) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://imprint/v1", api_key=api.key, max_retries=0, http_client=api.client())


async def test_the_official_client_gets_the_encoders_vectors(api: Api) -> None:
    expected = MiniLmEncoder.load(threads=1).embed(TEXTS)
    async with official(api) as client:
        by_default = await client.embeddings.create(model="imprint-embed", input=TEXTS)
        floats = await client.embeddings.create(
            model="minilm", input=TEXTS, encoding_format="float", dimensions=384, user="someone"
        )
        alone = await client.embeddings.create(model="imprint-embed", input=TEXTS[0])
    for answer in (by_default, floats):
        assert answer.object == "list" and [item.index for item in answer.data] == [0, 1, 2]
        assert {item.object for item in answer.data} == {"embedding"}
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-5)
    assert (by_default.model, floats.model) == ("imprint-embed", "minilm")
    np.testing.assert_allclose(alone.data[0].embedding, expected[0], atol=1e-5)
    assert by_default.usage.prompt_tokens == by_default.usage.total_tokens == 8 + 8 + 7
    assert alone.usage.prompt_tokens == 8


async def test_base64_is_little_endian_float32(api: Api) -> None:
    async with api.client() as client:
        body = {"model": "imprint-embed", "input": TEXTS, "encoding_format": "base64"}
        data = (await client.post(PATH, json=body)).json()["data"]
        floats = (await client.post(PATH, json={**body, "encoding_format": "float"})).json()["data"]
    for coded, plain in zip(data, floats, strict=True):
        assert np.frombuffer(base64.b64decode(coded["embedding"]), "<f4").tolist() == plain["embedding"]


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": ["a", " \n"]}, 400, "input.1", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": ["a"] * 31}, 400, "input", "invalid_value"),
        ({"input": [1, 2]}, 400, "input", "invalid_value"),
        ({"input": [[1, 2]]}, 400, "input", "invalid_value"),
        ({"input": None}, 400, "input", "invalid_value"),
        ({"input": "word " * 300}, 400, "input", "context_length_exceeded"),
        ({"input": ["a", "word " * 300]}, 400, "input.1", "context_length_exceeded"),
        ({"dimensions": 100}, 400, "dimensions", "invalid_value"),
        ({"dimensions": 0}, 400, "dimensions", "invalid_value"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
        ({"model": "imprint"}, 404, "model", "model_not_found"),
        ({"truncate": True}, 400, "truncate", "unknown_field"),
    ],
)
async def test_bad_input_names_the_field(
    api: Api, change: dict[str, Any], status: int, param: str, code: str
) -> None:
    async with api.client() as client:
        error = error_of(await client.post(PATH, json={"model": "imprint-embed", "input": "a", **change}), status)
        assert (error["param"], error["code"]) == (param, code), error
        missing = error_of(await client.post(PATH, json={"model": "imprint-embed"}), 400)
    assert missing["param"] == "input"


async def test_it_needs_a_tenant_and_waits_its_turn(api: Api) -> None:
    body = {"model": "imprint-embed", "input": "a"}
    async with api.client("") as nobody, api.client(api.admin_key) as admin:
        assert error_of(await nobody.post(PATH, json=body), 401)
        assert error_of(await admin.post(PATH, json=body), 403)
    api.services.config.limits.request_timeout_s = 0.05
    queue = api.services.queues.encoder
    async with api.client() as client, queue.slot("someone"):
        assert error_of(await client.post(PATH, json=body), 504)["code"] == "timeout"
    assert queue.running == queue.queued == 0


async def test_the_model_is_found_but_not_listed_among_those_for_chat(api: Api) -> None:
    async with official(api) as client:
        assert (await client.models.retrieve("imprint-embed")).id == "imprint-embed"
        assert "imprint-embed" not in {model.id async for model in client.models.list()}
