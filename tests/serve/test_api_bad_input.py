"""Every kind of bad input is a 4xx in OpenAI's format that names the field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.api_helpers import Api, error_of, make_api

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
DOCUMENT = {"title": "Notice", "text": "The pool opens at nine."}
PROBE = {"question": "When does the pool open?", "answer": "At nine."}
# Such files begin so; what follows stands for compressed data, without NUL, for that alone is refused.
PNG = b"\x89PNG\r\n\x1a\n" + bytes(byte for byte in range(1, 256))


def part(value: Any) -> dict[str, Any]:
    """A message whose second part is this."""
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, value]}]}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, limits={"max_document_bytes": 1000, "max_request_bytes": 4000})
    yield api
    api.registry.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/v1/documents", {"title": "t", "text": ""}, 400, "text", "empty_text"),
        ("/v1/documents", {"title": "t", "text": " \n\t\ufeff"}, 400, "text", "empty_text"),
        ("/v1/documents", {"title": "t"}, 400, "text", "missing_field"),
        ("/v1/documents", {"title": "t", "text": 7}, 400, "text", "invalid_value"),
        ("/v1/documents", {"title": "t", "text": "a\x00b"}, 400, "text", "invalid_value"),
        ("/v1/documents", {"title": "t", "text": "ä" * 501}, 413, "text", "too_large"),
        ("/v1/documents", {"title": "x" * 301, "text": "t"}, 400, "title", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "colour": 1}, 400, "colour", "unknown_field"),
        ("/v1/documents", {**DOCUMENT, "metadata": {"a": {"b": 1}}}, 400, "metadata.a", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "metadata": {"a": "b\x00"}}, 400, "metadata", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "external_id": ""}, 400, "external_id", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "external_id": ".."}, 400, "external_id", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "external_id": "a/./b"}, 400, "external_id", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "external_id": "a\nb"}, 400, "external_id", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "external_id": "doc_7"}, 400, None, "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "collection": ""}, 400, "collection", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "mode": "tasks"}, 400, "mode", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "mode": None}, 400, "mode", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "mode": "task"}, 400, "mode", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": []}, 400, "probes", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": "When?"}, 400, "probes", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [PROBE] * 33}, 400, "probes", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [PROBE, "When?"]}, 400, "probes.1", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [PROBE, {"answer": "x"}]}, 400, "probes.1.question", "missing_field"),
        ("/v1/documents", {**DOCUMENT, "probes": [{**PROBE, "weight": 1}]}, 400, "probes.0.weight", "unknown_field"),
        ("/v1/documents", {**DOCUMENT, "probes": [{"question": ""}]}, 400, "probes.0.question", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [{"question": " \n"}]}, 400, "probes.0.question", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [{"question": "a\x00"}]}, 400, "probes.0.question", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [{"question": "x" * 501}]}, 400, "probes.0.question", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [{**PROBE, "answer": ""}]}, 400, "probes.0.answer", "invalid_value"),
        ("/v1/documents", {**DOCUMENT, "probes": [{**PROBE, "answer": 9}]}, 400, "probes.0.answer", "invalid_value"),
        (
            "/v1/documents",
            {**DOCUMENT, "probes": [{**PROBE, "answer": "x" * 501}]},
            400,
            "probes.0.answer",
            "invalid_value",
        ),
        ("/v1/documents", {**DOCUMENT, "text": "\ufffd"}, 400, "text", "not_text"),
        ("/v1/documents", {**DOCUMENT, "text": "\x7fELF\x02\x01\x01 and so on"}, 400, "text", "not_text"),
        ("/v1/documents", {**DOCUMENT, "text": PNG.decode(errors="replace")}, 400, "text", "not_text"),
        ("/v1/documents", {**DOCUMENT, "text": PNG.decode("latin-1")}, 400, "text", "not_text"),
        ("/v1/chat/completions", {**CHAT, "cache_salt": "x"}, 400, "cache_salt", "unknown_field"),
        ("/v1/chat/completions", {**CHAT, "priority": 1}, 400, "priority", "unknown_field"),
        ("/v1/chat/completions", {**CHAT, "request_id": "x"}, 400, "request_id", "unknown_field"),
        ("/v1/chat/completions", {**CHAT, "vllm_xargs": {}}, 400, "vllm_xargs", "unknown_field"),
        ("/v1/chat/completions", {**CHAT, "chat_template": "{{1}}"}, 400, "chat_template", "unknown_field"),
        ("/v1/chat/completions", {**CHAT, "model": "nope"}, 404, "model", "model_not_found"),
        ("/v1/chat/completions", {**CHAT, "model": "adp_" + "0" * 26}, 404, "model", "model_not_found"),
        ("/v1/chat/completions", {**CHAT, "model": "a\x00b"}, 404, "model", "model_not_found"),
        ("/v1/chat/completions", {**CHAT, "model": None}, 400, "model", "invalid_value"),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}, 400, "model", "missing_field"),
        ("/v1/chat/completions", {"model": "base"}, 400, "messages", "missing_field"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"content": "x"}]}, 400, "messages.0.role", "missing_field"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content", ""),
        (
            "/v1/chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": "x", "prompt_embeds": "x"}]},
            400,
            "messages.0.prompt_embeds",
            "unknown_field",
        ),
        ("/v1/chat/completions", {**CHAT, **part({"type": "x"})}, 400, "messages.0.content.1.type", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, **part({"text": "x"})}, 400, "messages.0.content.1.type", "missing_field"),
        ("/v1/route", part({"type": "prompt_embeds", "data": "x"}), 400, "messages.0.content.1.type", "invalid_value"),
        ("/v1/route", part({"type": "text"}), 400, "messages.0.content.1", "invalid_value"),
        ("/v1/route", part({"type": "text", "text": 5}), 400, "messages.0.content.1.text", "invalid_value"),
        ("/v1/route", part("x"), 400, "messages.0.content.1", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "x", "content": "x"}]}, 400, "messages.0.role", None),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}, 400, "messages.0", None),
        ("/v1/chat/completions", {**CHAT, "stream": "yes"}, 400, "stream", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "n": 1000}, 400, "n", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "model": "imprint", "collection": "no"}, 404, "collection", None),
        ("/v1/completions", {"model": "base", "prompt": "x", "prompt_embeds": "x"}, 400, "prompt_embeds", None),
        ("/v1/completions", {"model": "base"}, 400, "prompt", "missing_field"),
        ("/v1/completions", {"model": "imprint", "prompt": ["a", "b"]}, 400, "prompt", "invalid_value"),
        ("/v1/route", {"model": "imprint"}, 400, "messages", "missing_field"),
        ("/v1/route", {"prompt": "x", "cache_salt": "x"}, 400, "cache_salt", "unknown_field"),
    ],
)
async def test_bad_fields(
    api: Api, path: str, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    async with api.client() as client:
        error = error_of(await client.post(path, json=body), status)
    if param is not None:
        assert error["param"] == param
    assert not code or error["code"] == code
    assert not api.engine.calls


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"title": "t", "text": ', "body"),
        (b"", "body"),
        (b"[]", "body"),
        (b'{"text": NaN}', "body"),
        (b'{"title": "t", "text": "caf\xe9"}', "text"),
        (b'{"title": "\xff", "text": "cafe"}', "title"),
        (b'{"title": "t", "metadata": {"a": "\xe9"}, "text": "x"}', "metadata.a"),
        (b'{"title": "t", "text": "\\ud800"}', "text"),
        (b"\xff\xfe{\x00}\x00", "body"),
        (b"[" * 3900, "body"),
        (b'{"text": ' + b"[" * 1500 + b"]" * 1500 + b"}", "body"),
        (b'{"text": "x", "metadata": {"a": 1e999}}', None),
    ],
)
async def test_malformed_json(api: Api, raw: bytes, param: str | None) -> None:
    async with api.client() as client:
        response = await client.post("/v1/documents", content=raw, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert param is None or error["param"] == param


async def test_too_large_by_content_length_is_not_kept(api: Api) -> None:
    raw = json.dumps({"title": "t", "text": "x" * 5000}).encode()
    async with api.client() as client:
        error = error_of(
            await client.post("/v1/documents", content=raw, headers={"Content-Type": "application/json"}), 413
        )
    assert error["param"] == "body"
    assert "4000" in error["message"]


async def test_too_large_without_content_length(api: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"title": "t", "text": "'
        for _ in range(100):
            yield b"x" * 1000
        yield b'"}'

    async with api.client() as client:
        response = await client.post("/v1/documents", content=chunks(), headers={"Content-Type": "application/json"})
    assert error_of(response, 413)["param"] == "body"


async def test_task_mode_without_a_checkpoint_for_it(api: Api) -> None:
    body = {**DOCUMENT, "mode": "task"}
    async with api.client() as client:
        posted = (await client.post("/v1/documents", json=DOCUMENT)).json()
        for response in (await client.post("/v1/documents", json=body),
                         await client.put(f"/v1/documents/{posted['id']}", json=body)):
            error = error_of(response, 400)
            assert (error["param"], error["code"]) == ("mode", "invalid_value")
            assert "generator.task.checkpoint" in error["message"] and "'document' is allowed" in error["message"]
        assert len((await client.get("/v1/documents")).json()["data"]) == 1, "nothing was stored"
    (leased,) = api.registry.lease_jobs("w", 10, 60)
    assert leased.version.mode == "document"


async def test_content_type(api: Api) -> None:
    async with api.client() as client:
        for path in ("/v1/documents", "/v1/chat/completions"):
            response = await client.post(path, content=b"x", headers={"Content-Type": "application/pdf"})
            assert error_of(response, 415)["param"] == "Content-Type"


@pytest.mark.parametrize(
    ("files", "data", "status", "param"),
    [
        ({"file": ("a.pdf", b"x")}, {}, 415, "file"),
        ({"file": ("a.txt", b"caf\xe9")}, {}, 400, "file"),
        ({"file": ("a.txt", b"")}, {}, 400, "file"),
        ({"file": ("a.txt", b"a\x00b")}, {}, 400, "file"),
        ({"file": ("a.txt", b"\x01\x02\x03")}, {}, 400, "file"),
        ({"file": ("a.txt", PNG)}, {}, 400, "file"),
        ({"file": ("a.txt", b"x" * 1001)}, {}, 413, "file"),
        ({"file": ("a.txt", b"x")}, {"mode": "other"}, 400, "mode"),
        ({"file": ("a.txt", b"x")}, {"mode": "task"}, 400, "mode"),
        ({"file": ("a.txt", b"x")}, {"probes": "["}, 400, "probes"),
        ({"file": ("a.txt", b"x")}, {"probes": '{"question": "When?"}'}, 400, "probes"),
        ({"file": ("a.txt", b"x")}, {"probes": '[{"question": NaN}]'}, 400, "probes"),
        ({"file": ("a.txt", b"x")}, {"probes": '[{"question": "\\ud800"}]'}, 400, "probes"),
        ({"file": ("a.txt", b"x")}, {"probes": "[{}]"}, 400, "probes.0.question"),
        ({"upload": ("a.txt", b"x")}, {}, 400, "upload"),
        ({"file": ("a.txt", b"x")}, {"cache_salt": "x"}, 400, "cache_salt"),
        ({"file": ("a.txt", b"x")}, {"metadata": "{"}, 400, "metadata"),
        ({"other": (None, b"x")}, {}, 400, "file"),
    ],
)
async def test_bad_forms(api: Api, files: Any, data: dict[str, str], status: int, param: str) -> None:
    async with api.client() as client:
        error = error_of(await client.post("/v1/documents", files=files, data=data), status)
    assert error["param"] == param


async def test_broken_multipart(api: Api) -> None:
    async with api.client() as client:
        for content_type in ("multipart/form-data", "multipart/form-data; boundary=xyz"):
            response = await client.post("/v1/documents", content=b"--abc\r\n", headers={"Content-Type": content_type})
            error_of(response, 400)


async def test_keys(api: Api) -> None:
    async with api.client("") as client:
        missing = await client.get("/v1/models")
        assert error_of(missing, 401)["code"] == "missing_api_key"
        assert missing.headers["www-authenticate"] == "Bearer"
        for text in ("imp_a_b", "sk-123", api.key[:-1], "ü"):
            response = await client.get("/v1/models", headers={"Authorization": f"Bearer {text}".encode()})
            assert error_of(response, 401)["param"] == "Authorization"
    key, secret = api.registry.create_key(api.registry.create_tenant("acme").id, "tenant")
    async with api.client(secret) as client:
        assert (await client.get("/v1/models")).status_code == 200
        api.registry.revoke_key(key.id)
        assert error_of(await client.get("/v1/models"), 401)["code"] == "invalid_api_key"


async def test_tenants(api: Api) -> None:
    service = api.registry.create_key(None, "service", tenants=["acme"])[1]
    cases = [
        (api.key, None, 200),
        (api.key, "acme", 200),
        (api.key, "globex", 403),
        (api.key, "nobody", 403),
        (service, "acme", 200),
        (service, None, 400),
        (service, "globex", 403),
        (service, "nobody", 403),
        (api.admin_key, None, 403),
        (api.admin_key, "acme", 403),
    ]
    for key, header, status in cases:
        headers = {} if header is None else {"X-Tenant-ID": header}
        async with api.client(key) as client:
            response = await client.get("/v1/documents", headers=headers)
        if status == 200:
            assert response.status_code == 200
        else:
            assert error_of(response, status)["param"] == "X-Tenant-ID"


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "/v1/documents/", 404, "document_id"),
        ("GET", "/v1/documents/a/b", 404, "document_id"),
        ("GET", "/v1/documents/" + "x" * 513, 400, "document_id"),
        ("GET", "/v1/documents/doc_nope", 404, "document_id"),
        ("PUT", "/v1/documents/doc_nope", 404, "document_id"),
        ("DELETE", "/v1/documents/doc_nope", 404, "document_id"),
        ("GET", "/v1/documents?limit=0", 400, "limit"),
        ("GET", "/v1/documents?limit=x", 400, "limit"),
        ("GET", "/v1/documents?cursor=%00", 400, None),
        ("GET", "/v1/documents?cursor=zzz", 400, None),
        ("GET", "/v1/documents?collection=zzz", 404, "collection"),
        ("GET", "/v1/documents/%00", 404, "document_id"),
        ("POST", "/v1/documents?wait=-1", 400, "wait"),
        ("POST", "/v1/documents?wait=1e9", 400, "wait"),
        ("POST", "/v1/documents?wait=nan", 400, "wait"),
        ("GET", "/v1/jobs/job_nope", 404, "job_id"),
        ("GET", "/v1/adapters/adp_nope", 404, "adapter_id"),
        ("GET", "/v1/models/nope", 404, "model"),
        ("GET", "/v1/nothing", 404, None),
        ("PATCH", "/v1/documents", 405, None),
        ("GET", "/v1/keys", 403, "Authorization"),
        ("GET", "/metrics", 403, "Authorization"),
    ],
)
async def test_paths_and_queries(api: Api, method: str, path: str, status: int, param: str | None) -> None:
    body = {"json": DOCUMENT} if method in ("POST", "PUT") else {}
    async with api.client() as client:
        error = error_of(await client.request(method, path, **body), status)
    assert param is None or error["param"] == param


async def test_a_bug_shows_no_inner_text(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(api.registry, "list_collections", fail)
    async with api.client() as client:
        response = await client.get("/v1/models")
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
