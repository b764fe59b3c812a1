"""`/v1/policy` with a real registry; what a policy does is tested with the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.api_helpers import Api, error_of, make_api

YAML = {"Content-Type": "application/yaml"}
FIRST = """version: 1
rules:
  - name: drafts
    when: candidate.metadata["stage"] == "draft"
    forbid: true
"""
SECOND = FIRST.replace("draft\"", "old\"")


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path)
    yield api
    api.registry.close()


async def test_a_policy_is_put_read_and_rolled_back(api: Api) -> None:
    async with api.client() as client:
        assert error_of(await client.get("/v1/policy"), 404)["code"] == "policy_not_found"
        saved = await client.put("/v1/policy", content=FIRST, headers=YAML)
        assert saved.status_code == 200, saved.text
        body = saved.json()
        assert (body["object"], body["version"], body["text"], body["warnings"]) == ("policy", 1, FIRST, [])
        assert body["created_by"].startswith("key_") and body["restored_from"] is None
        assert (await client.put("/v1/policy", content=FIRST, headers=YAML)).json()["version"] == 1
        assert (await client.put("/v1/policy", content=SECOND, headers=YAML)).json()["version"] == 2
        shown = (await client.get("/v1/policy")).json()
        assert (shown["version"], shown["text"]) == (2, SECOND)
        assert (await client.get("/v1/policy?version=1")).json()["text"] == FIRST
        assert error_of(await client.get("/v1/policy?version=3"), 404)["code"] == "version_not_found"
        back = (await client.post("/v1/policy/rollback", json={})).json()
        assert (back["version"], back["text"], back["restored_from"]) == (3, FIRST, 1)
        forward = (await client.post("/v1/policy/rollback", json={"version": 2})).json()
        assert (forward["version"], forward["text"]) == (4, SECOND)
        page = (await client.get("/v1/policy/versions?limit=3")).json()
        assert [one["version"] for one in page["data"]] == [4, 3, 2] and page["has_more"]
        rest = (await client.get("/v1/policy/versions", params={"cursor": page["next_cursor"]})).json()
        assert [one["version"] for one in rest["data"]] == [1] and not rest["has_more"]


async def test_json_is_taken_too(api: Api) -> None:
    document = {"version": 1, "rules": [{"name": "a", "when": 'request.headers["x-é"] == "é"', "fall_back": "base"}]}
    async with api.client() as client:
        saved = (await client.put("/v1/policy", json=document)).json()
        assert saved["version"] == 1 and json.loads(saved["text"]) == document
        assert (await client.put("/v1/policy", content=FIRST)).json()["version"] == 2


@pytest.mark.parametrize("path", ["PUT /v1/policy", "POST /v1/policy/check"])
@pytest.mark.parametrize(
    ("text", "param", "says"),
    [
        (FIRST.replace("candidate.metadata", "candidat.metadata"), "rules.0.when",
         ["rule 'drafts'", "line 4, column 11", "did you mean 'candidate'"]),
        (FIRST.replace("== ", "== 3 == "), "rules.0.when", ["line 4, column 47", "never equal"]),
        (FIRST.replace("forbid", "forbd"), "rules.0.forbd", ["line 5, column 5", "no field 'forbd'"]),
        (FIRST.replace("forbid: true", "cap: 0"), "rules.0.cap", ["line 5, column 10", "greater than or equal to 1"]),
        ("version: 2\nrules: []", "version", ["line 1, column 10"]),
        ("rules: [", "policy", ["line 1", "not YAML"]),
        ("", "policy", ["empty"]),
        (FIRST.replace('candidate.metadata["stage"] == "draft"', '"' + "not " * 400 + 'True"'), "rules.0.when",
         ["deep"]),
    ],
)  # fmt: skip
async def test_errors_name_field_line_and_column(api: Api, path: str, text: str, param: str, says: list[str]) -> None:
    method, url = path.split()
    async with api.client() as client:
        error = error_of(await client.request(method, url, content=text, headers=YAML), 400)
        assert (error["param"], error["code"], error["type"]) == (param, "invalid_policy", "invalid_request_error")
        assert all(part in error["message"] for part in says), error["message"]
        error_of(await client.get("/v1/policy"), 404)
        assert api.router.calls == []


async def test_places_in_compact_json(api: Api) -> None:
    body = b'{"version": 1, "rules": [{"name": "a", "when": "request.headers[\\"x-a\\"] == \\"b\\" or tru", "cap": 1}]}'
    async with api.client() as client:
        error = error_of(
            await client.put("/v1/policy", content=body, headers={"Content-Type": "application/json"}), 400
        )
        column = body.decode().index(" tru") + 2
        assert f"line 1, column {column}" in error["message"] and error["param"] == "rules.0.when"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"\xff\xfe", YAML, 400, "invalid_utf8"),
        (b'{"a": "\\ud800"}', {"Content-Type": "application/json"}, 400, "invalid_utf8"),
        (b"rules", {"Content-Type": "application/json"}, 400, "invalid_json"),
        (b"rules", {"Content-Type": "text/html"}, 415, None),
        (b"#" * 70_000, YAML, 400, "invalid_policy"),
        (b"#" * 300_000, YAML, 413, "too_large"),
    ],
)
async def test_bad_bodies(api: Api, content: bytes, headers: dict[str, str], status: int, code: str | None) -> None:
    async with api.client() as client:
        for method, url in (("PUT", "/v1/policy"), ("POST", "/v1/policy/check")):
            error = error_of(await client.request(method, url, content=content, headers=headers), status)
            assert error["code"] == code


async def test_conflicts(api: Api) -> None:
    async with api.client() as client:
        assert error_of(await client.post("/v1/policy/rollback", json={}), 404)["type"] == "not_found_error"
        await client.put("/v1/policy?expected_version=0", content=FIRST, headers=YAML)
        error = error_of(await client.put("/v1/policy?expected_version=0", content=SECOND, headers=YAML), 409)
        assert (error["param"], error["code"]) == ("expected_version", "version_conflict")
        assert error_of(await client.post("/v1/policy/rollback", json={}), 409)["code"] == "no_earlier_version"
        assert error_of(await client.post("/v1/policy/rollback", json={"version": 7}), 404)["param"] == "version"
        error_of(await client.post("/v1/policy/rollback", json={"version": "1"}), 400)
        error_of(await client.post("/v1/policy/rollback", json={"to": 1}), 400)
        error_of(await client.get("/v1/policy/versions?cursor=x"), 400)
        error_of(await client.get("/v1/policy?version=0"), 400)


async def test_tenants_have_policies_of_their_own(api: Api) -> None:
    async with api.client() as client, api.client(api.other_key) as other, api.client("") as nobody:
        await client.put("/v1/policy", content=FIRST, headers=YAML)
        error_of(await other.get("/v1/policy"), 404)
        error_of(await other.get("/v1/policy?version=1"), 404)
        error_of(await other.post("/v1/policy/rollback", json={"version": 1}), 404)
        for method, url in (("GET", ""), ("PUT", ""), ("GET", "/versions"), ("POST", "/rollback"), ("POST", "/check")):
            error_of(await nobody.request(method, f"/v1/policy{url}"), 401)


async def test_a_check_shows_the_dry_run_and_changes_nothing(api: Api) -> None:
    answer: dict[str, Any] = {"adapter_id": None, "document_id": None, "reason": "policy_forbids", "confidence": None}
    change = {"response_id": "req_1", "created_at": 5.0, "text": "How heavy?", "steps": [{"rule": "drafts"}],
              "before": {**answer, "adapter_id": "adp_1", "document_id": "doc_1", "reason": "matched"},
              "after": answer}  # fmt: skip
    api.router.dry_run = {"compared": 9, "changes": [change]}
    text = FIRST + "  - {name: b, use: handbook}\n"
    async with api.client() as client:
        found = (await client.post("/v1/policy/check?limit=7", content=text, headers=YAML)).json()
        assert (found["object"], found["rules"], found["compared"], found["changed"]) == ("policy.check", 2, 9, 1)
        assert found["changes"] == [change]
        assert found["warnings"] == ["There is no document 'handbook' that a rule could use."]
        tenant = api.registry.get_tenant("acme")
        assert tenant is not None
        assert api.router.calls == [{"tenant_id": tenant.id, "text": text, "limit": 7}]
        error_of(await client.get("/v1/policy"), 404)
        api.registry.post_document(tenant.id, "Handbook", "text", external_id="handbook")
        assert (await client.put("/v1/policy", content=text, headers=YAML)).json()["warnings"] == []


async def test_headers_reach_the_router(api: Api) -> None:
    sent = {"X-Role": "staff", "X-Api-Key": "secret"}
    chat = {"model": "imprint", "messages": [{"role": "user", "content": "Hello"}]}
    async with api.client() as client:
        for path, body in (
            ("chat/completions", chat),
            ("completions", {"model": "imprint", "prompt": "Hello"}),
            ("route", {"prompt": "Hello"}),
        ):
            answer = await client.post(f"/v1/{path}", json=body, headers=sent)
            assert answer.status_code == 200, answer.text
            assert api.router.calls[-1]["headers"] == {"x-role": "staff"}


def test_openapi_describes_policies(api: Api) -> None:
    schema = api.app.openapi()
    assert {"get", "put"} <= schema["paths"]["/v1/policy"].keys()
    bodies = schema["paths"]["/v1/policy/check"]["post"]["requestBody"]["content"]
    assert bodies.keys() == {"application/json", "application/yaml"}
    assert {"PolicyDocument", "Rule", "PolicyCheck"} <= schema["components"]["schemas"].keys()
