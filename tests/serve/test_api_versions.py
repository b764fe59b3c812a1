"""Listing versions and rolling back over HTTP, with a real registry."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.api_helpers import Api, error_of, make_api
from tests.serve.registry_helpers import one_part, several_parts


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, limits={"max_wait_s": 5})
    yield api
    api.registry.close()


def acme(api: Api) -> str:
    tenant = api.registry.get_tenant("acme")
    assert tenant is not None
    return tenant.id


def make_versions(api: Api, count: int = 2, external_id: str = "handbook/prices") -> tuple[str, list[list[str]]]:
    """A document whose versions have as many parts as their number; its ID and the adapters of each version."""
    sets: list[list[str]] = []
    for number in range(1, count + 1):
        posted = api.registry.post_document(acme(api), f"T{number}", f"text {number}", external_id)
        api.registry.lease_jobs("w", 1, 60)
        parts = several_parts(number)
        api.registry.publish(posted.job.id, "w", parts)
        sets.append([adapter.id for adapter, _ in parts])
    return posted.document.id, sets


async def test_rollback_answers_with_the_document(api: Api) -> None:
    document_id, sets = make_versions(api, 3)
    async with api.client() as client:
        response = await client.post(f"/v1/documents/{document_id}/rollback", json={"version": 1})
        assert response.status_code == 200, response.text
        body = response.json()
        assert (body["id"], body["version"], body["current_version"], body["latest_version"]) == (document_id, 1, 1, 3)
        assert body["adapter_ids"] == sets[0] and body["status"] == "ready" and body["title"] == "T1"
        assert body["job"]["id"] == body["job_id"] and body["job"]["status"] == "succeeded"
        shown = (await client.get(f"/v1/documents/{document_id}")).json()
        assert shown["text"] == "text 1" and shown["adapter_ids"] == sets[0]
        # By external ID, slashes and all, and without a body: the version before.
        forward = await client.post("/v1/documents/handbook/prices/rollback", json={"version": 3})
        assert forward.json()["adapter_ids"] == sets[2]
        for content in (None, b"{}", b'{"version": null}'):
            back = await client.post("/v1/documents/handbook%2Fprices/rollback", content=content)
            assert back.status_code == 200, back.text
            assert back.json()["adapter_ids"] == sets[1]
            await client.post(f"/v1/documents/{document_id}/rollback", json={"version": 3})


async def test_rollback_that_must_generate_is_202(api: Api) -> None:
    document_id, sets = make_versions(api)
    api.registry.mark_stale("base-2", "gen-1")
    async with api.client() as client:
        (leased,) = api.registry.lease_jobs("w", 1, 60)
        new = one_part(base="base-2")
        api.registry.publish(leased.job.id, "w", new)
        response = await client.post(f"/v1/documents/{document_id}/rollback", json={"version": 1})
        assert response.status_code == 202
        body = response.json()
        assert (body["status"], body["version"], body["current_version"]) == ("processing", 1, 2)
        assert body["job"]["status"] == "queued" and body["adapter_ids"] == [new[0][0].id]
        waiting = asyncio.create_task(
            client.post(f"/v1/documents/{document_id}/rollback?wait=5", json={"version": 1})
        )
        await asyncio.sleep(0.1)
        (leased,) = api.registry.lease_jobs("w", 1, 60)
        again = one_part(base="base-2")
        api.registry.publish(leased.job.id, "w", again)
        done = await waiting
        assert done.status_code == 200, done.text
        assert (done.json()["adapter_ids"], done.json()["status"]) == ([again[0][0].id], "ready")
        assert done.json()["job"]["status"] == "succeeded"
    assert sets[0] != [again[0][0].id]


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "says"),
    [
        ({"version": 3}, 404, "version", "version_not_found", "no version 3; it has versions 1 to 2"),
        ({"version": 0}, 400, "version", "invalid_value", "greater than or equal to 1"),
        ({"version": "1"}, 400, "version", "invalid_value", "integer"),
        ({"version": True}, 400, "version", "invalid_value", "integer"),
        ({"to": 1}, 400, "to", "unknown_field", "to"),
        ([1], 400, "body", "invalid_json", "object"),
    ],
)
async def test_bad_rollbacks(api: Api, body: Any, status: int, param: str, code: str, says: str) -> None:
    document_id, sets = make_versions(api)
    async with api.client() as client:
        response = await client.post(f"/v1/documents/{document_id}/rollback", json=body)
        error = error_of(response, status)
        assert (error["param"], error["code"]) == (param, code) and says in error["message"]
        assert (await client.get(f"/v1/documents/{document_id}")).json()["adapter_ids"] == sets[1]


async def test_refusals_of_rollback(api: Api) -> None:
    document_id, _ = make_versions(api, 1)
    path = f"/v1/documents/{document_id}/rollback"
    async with api.client() as client, api.client(api.other_key) as stranger, api.client("") as nobody:
        error = error_of(await client.post(path), 409)
        assert error["code"] == "no_earlier_version" and "'version'" in error["message"]
        assert error_of(await stranger.post(path, json={"version": 1}), 404)["code"] == "document_not_found"
        error_of(await stranger.get(f"/v1/documents/{document_id}/versions"), 404)
        error_of(await nobody.post(path, json={"version": 1}), 401)
        error_of(await client.post(path, content=b"version=1", headers={"Content-Type": "text/plain"}), 415)
        error_of(await client.post(path, content=b" " * 5000), 413)
        error_of(await client.post(f"{path}?wait=6", json={"version": 1}), 400)


async def test_versions_are_listed_by_page(api: Api) -> None:
    document_id, sets = make_versions(api, 3)
    await_text = api.registry.post_document(acme(api), "T4", "text 4", "handbook/prices")
    async with api.client() as client:
        page = (await client.get("/v1/documents/handbook/prices/versions?limit=2")).json()
        assert page["object"] == "list" and page["has_more"]
        assert [one["version"] for one in page["data"]] == [4, 3]
        assert page["data"][0]["status"] == "processing" and page["data"][0]["job_id"] == await_text.job.id
        newest = page["data"][1]
        assert (newest["status"], newest["current"], newest["adapter_ids"]) == ("ready", True, sets[2])
        assert newest["document_id"] == document_id and "text" not in newest
        rest = (
            await client.get(f"/v1/documents/{document_id}/versions", params={"cursor": page["next_cursor"]})
        ).json()
        assert [(one["version"], one["current"]) for one in rest["data"]] == [(2, False), (1, False)]
        assert not rest["has_more"] and rest["next_cursor"] is None
        error_of(await client.get(f"/v1/documents/{document_id}/versions?cursor=x"), 400)
        error_of(await client.get(f"/v1/documents/{document_id}/versions?limit=0"), 400)
        error_of(await client.get("/v1/documents/none/versions"), 404)


async def test_external_ids_cannot_hide_a_list_of_versions(api: Api) -> None:
    async with api.client() as client:
        error = error_of(
            await client.post("/v1/documents", json={"text": "Nine.", "external_id": "api/versions"}), 400
        )
        assert error["param"] == "external_id" and "'/versions'" in error["message"]
        for name in ("versions", "rollback", "a/rollback", "a/versions/b"):
            posted = await client.post("/v1/documents", json={"text": "Nine.", "external_id": name})
            assert posted.status_code == 202, posted.text
            found = await client.get(f"/v1/documents/{name}")
            assert found.status_code == 200 and found.json()["external_id"] == name


def test_openapi_describes_both(api: Api) -> None:
    schema = api.app.openapi()
    operation = schema["paths"]["/v1/documents/{document_id}/rollback"]["post"]
    assert operation["requestBody"]["required"] is False
    assert {"200", "202", "404", "409"} <= operation["responses"].keys()
    assert "RollbackPost" in schema["components"]["schemas"]
    assert "get" in schema["paths"]["/v1/documents/{document_id}/versions"]
