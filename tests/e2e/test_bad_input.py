"""Bad input on the real server: each a clear 4xx, none a 500, and it keeps serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

MEGABYTE = 10**6
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(autouse=True)
def _keeps_serving(tenant: Tenant) -> Iterator[None]:
    yield
    assert tenant.http.post("/v1/chat/completions", json=CHAT).status_code == 200


def refused(response: httpx.Response, status: int, param: str) -> None:
    """Check status, form and the field that is named."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["message"] and error["type"]


def json_pieces(total: int) -> Iterator[bytes]:
    """A document of `total` bytes as a chunked body, without Content-Length."""
    yield b'{"title": "t", "text": "'
    for _ in range(total // MEGABYTE):
        yield b"x" * MEGABYTE
    yield b'"}'


def test_empty_text(tenant: Tenant) -> None:
    refused(tenant.http.post("/v1/documents", json={"title": "t", "text": ""}), 400, "text")


def test_50_megabytes(tenant: Tenant) -> None:
    refused(tenant.http.post("/v1/documents", json={"title": "t", "text": "x" * 50 * MEGABYTE}), 413, "body")
    headers = {"Content-Type": "application/json"}
    refused(
        tenant.http.post("/v1/documents", content=json_pieces(50 * MEGABYTE), headers=headers), 413, "body"
    )
    refused(
        tenant.http.post("/v1/documents", files={"file": ("a.txt", b"x" * 50 * MEGABYTE)}), 413, "body"
    )
    refused(tenant.http.post("/v1/documents", json={"title": "t", "text": "x" * 2 * MEGABYTE}), 413, "text")


def test_document_too_long_for_an_adapter_fails_its_job_alone(tenant: Tenant) -> None:
    response = tenant.http.post("/v1/documents?wait=60", json={"title": "t", "text": "word " * 180_000})
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "failed"
    assert "tokens" in response.json()["job"]["error"]
    tenant.post("A short one", "The lamp costs 12 euros.")


def test_invalid_utf8(tenant: Tenant) -> None:
    headers = {"Content-Type": "application/json"}
    raw = b'{"title": "t", "text": "caf\xe9"}'
    refused(tenant.http.post("/v1/documents", content=raw, headers=headers), 400, "text")
    refused(tenant.http.post("/v1/documents", files={"file": ("a.txt", b"caf\xe9")}), 400, "file")


def test_malformed_json(tenant: Tenant) -> None:
    headers = {"Content-Type": "application/json"}
    for raw in (b'{"title": ', b"", b"[]", b"[" * 100_000):
        refused(tenant.http.post("/v1/documents", content=raw, headers=headers), 400, "body")
        refused(tenant.http.post("/v1/chat/completions", content=raw, headers=headers), 400, "body")


def test_keys_and_tenants(server: Server, tenant: Tenant, other_tenant: Tenant) -> None:
    path = "/v1/documents"
    with server.http("") as client:
        refused(client.get(path), 401, "Authorization")
    with server.http("imp_0000_0000") as client:
        refused(client.get(path), 401, "Authorization")
    for name in (other_tenant.name, "nobody"):
        refused(tenant.http.get(path, headers={"X-Tenant-ID": name}), 403, "X-Tenant-ID")
    assert tenant.http.get(path, headers={"X-Tenant-ID": tenant.name}).status_code == 200
    with server.http(server.admin_key) as admin:
        refused(admin.get(path), 403, "X-Tenant-ID")
        service = admin.post("/v1/keys", json={"scope": "service", "tenants": [tenant.name]}).json()
        with server.http(service["secret"]) as client:
            refused(client.get(path), 400, "X-Tenant-ID")
            refused(client.get(path, headers={"X-Tenant-ID": "nobody"}), 403, "X-Tenant-ID")
            assert client.get(path, headers={"X-Tenant-ID": tenant.name}).status_code == 200
            assert admin.delete(f"/v1/keys/{service['id']}").status_code == 200
            refused(client.get(path, headers={"X-Tenant-ID": tenant.name}), 401, "Authorization")


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"cache_salt": "x"}, 400, "cache_salt"),
        ({"priority": -1}, 400, "priority"),
        ({"kv_transfer_params": {}}, 400, "kv_transfer_params"),
        ({"colour": "red"}, 400, "colour"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, None),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, None),
        ({"temperature": -1}, 400, None),
        ({"temperature": 1e308}, 400, None),
        ({"top_p": 2}, 400, None),
        ({"max_tokens": -1}, 400, None),
        ({"max_tokens": 10**9}, 400, None),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"99999999": 1}}, 400, None),
        ({"logit_bias": {"x": 1}}, 400, None),
        ({"stop_token_ids": [-1]}, 400, None),
        ({"min_tokens": 5, "max_tokens": 2}, 400, None),
        ({"response_format": {"type": "nonsense"}}, 400, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, 400, None),
        ({"tools": [{"type": "function"}]}, 400, None),
        ({"tool_choice": "required"}, 400, None),
        ({"stream_options": {"include_usage": True}}, 400, None),
    ],
)
def test_bad_chat(tenant: Tenant, change: dict[str, Any], status: int, param: str | None) -> None:
    response = tenant.http.post("/v1/chat/completions", json={**CHAT, **change})
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    if param is not None:
        refused(response, status, param)
    assert error["message"]


@pytest.mark.parametrize("change", [{"prompt": []}, {"prompt": ""}, {"prompt": [-1]}, {"prompt": [10**9]}, {"n": 0}])
def test_bad_completion(tenant: Tenant, change: dict[str, Any]) -> None:
    response = tenant.http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 2, **change})
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["message"]


def test_strange_but_valid_routing(tenant: Tenant) -> None:
    tenant.post("Lamp", "The lamp costs 12 euros.")
    for messages in (
        [{"role": "system", "content": "only"}],
        [{"role": "user", "content": "  "}],
        [{"role": "user", "content": "\U0001f600" * 50}],
        [{"role": "user", "content": [{"type": "text", "text": "What does the lamp cost?"}]}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "lamp"}],
    ):
        response = tenant.http.post("/v1/route", json={"messages": messages})
        assert response.status_code == 200, response.text


def test_errors_reach_the_official_client(tenant: Tenant) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        tenant.ask("x", "nope")
    assert not_found.value.code == "model_not_found" and not_found.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        tenant.ask("x", "base", extra_body={"cache_salt": "x"})
    assert bad.value.param == "cache_salt"
