"""Documents, jobs, adapters, models, keys, metrics and the OpenAPI document over HTTP, with a real registry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from serve.ids import new_id
from serve.registry.records import AdapterState, DocumentState, JobState, NewAdapter, NewCentroids
from tests.serve.api_helpers import Api, error_of, make_api
from tests.serve.registry_helpers import centroids, new_adapter


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path, limits={"max_wait_s": 5})
    yield api
    api.registry.close()


@pytest.fixture
def task_api(tmp_path: Path) -> Iterator[Api]:
    """As a server with a Text-to-LoRA checkpoint, which only its generator would open."""
    api = make_api(tmp_path, generator={"task": {"checkpoint": "tasks", "encoder": "encoder"}})
    yield api
    api.registry.close()


def publish_parts(api: Api, *gates: dict[str, Any], refine_after_s: float | None = None) -> list[str]:
    """Publish the one waiting job with a part for each gate report, degraded where it says so; returns their IDs."""
    (leased,) = api.registry.lease_jobs("w", 100, 60)
    parts = [
        new_adapter(state=gate["state"], part=part, parts=len(gates), manifest={"gate": gate})
        for part, gate in enumerate(gates)
    ]
    api.registry.publish(
        leased.job.id, "w", [(adapter, centroids()) for adapter in parts], refine_after_s=refine_after_s
    )
    return [adapter.id for adapter in parts]


def finish_jobs(api: Api) -> list[str]:
    """Publish an adapter for every waiting job, as the generator does; returns the adapters' IDs."""
    adapter_ids = []
    for leased in api.registry.lease_jobs("w", 100, 60):
        adapter = NewAdapter(new_id("adp"), "lora", 8, 8.0, ("down_proj",), "adapters/x", "0" * 64, 10, "b", "g")
        api.registry.publish(leased.job.id, "w", [(adapter, NewCentroids("e", "1", np.ones((1, 2), np.float32)))])
        adapter_ids.append(adapter.id)
    return adapter_ids


async def test_life_of_a_document(api: Api) -> None:
    async with api.client() as client:
        response = await client.post(
            "/v1/documents",
            json={
                "title": " Pool  hours ",
                "text": "Nine.",
                "external_id": "e1",
                "collection": "c",
                "metadata": {"a": 1},
            },
        )
        assert response.status_code == 202
        posted = response.json()
        assert posted["created"] and posted["status"] == "processing" and posted["title"] == "Pool hours"
        assert posted["job"]["id"] == posted["job_id"] and posted["version"] == 1
        same = await client.post("/v1/documents", json={"title": "Pool hours", "text": "Nine.", "external_id": "e1"})
        assert same.status_code == 202 and not same.json()["created"] and same.json()["id"] == posted["id"]

        pinned = await client.post(
            "/v1/chat/completions", json={"model": posted["id"], "messages": [{"role": "user", "content": "?"}]}
        )
        assert error_of(pinned, 409)["code"] == "model_not_ready"

        (first,) = finish_jobs(api)
        job = (await client.get(f"/v1/jobs/{posted['job_id']}")).json()
        assert job["status"] == "succeeded" and job["adapter_id"] == first
        detail = (await client.get("/v1/documents/e1")).json()
        assert detail["status"] == "ready" and detail["adapter_id"] == first and detail["text"] == "Nine."

        put = await client.put(f"/v1/documents/{posted['id']}", json={"title": "Pool hours", "text": "Ten."})
        assert put.status_code == 202 and put.json()["version"] == 2 and put.json()["adapter_id"] == first
        (second,) = finish_jobs(api)
        adapters = (await client.get("/v1/adapters", params={"document_id": "e1"})).json()["data"]
        assert [(row["id"], row["current"]) for row in adapters] == [(second, True), (first, False)]
        assert (await client.get(f"/v1/adapters/{first}")).json()["version"] == 1

        ids = {model["id"]: model["kind"] for model in (await client.get("/v1/models")).json()["data"]}
        assert ids == {
            "imprint": "router",
            "base": "base",
            posted["collection_id"]: "collection",
            posted["id"]: "document",
            second: "adapter",
        }
        assert (await client.get(f"/v1/models/{posted['id']}")).json()["kind"] == "document"

        deleted = await client.delete("/v1/documents/e1")
        assert deleted.json() == {"id": posted["id"], "object": "document.deleted", "deleted": True}
        for path in (f"/v1/documents/{posted['id']}", f"/v1/adapters/{first}", f"/v1/models/{second}"):
            error_of(await client.get(path), 404)
        assert (await client.get("/v1/documents")).json()["data"] == []


PASSED = {"state": "ready", "score": 0.9, "threshold": 0.5, "reasons": []}
REFUSED = {"state": "degraded", "score": 0.1, "threshold": 0.5, "reasons": ["the score 0.10 is below 0.50"]}


async def test_a_document_of_several_parts(api: Api) -> None:
    async with api.client() as client:
        posted = (await client.post("/v1/documents", json={"text": "Nine.", "external_id": "e1"})).json()
        assert posted["adapter_ids"] == [] and posted["job"]["kind"] == "generate"
        made = publish_parts(api, PASSED, REFUSED, PASSED)
        detail = (await client.get("/v1/documents/e1")).json()
        assert (detail["status"], detail["adapter_id"], detail["adapter_ids"]) == ("ready", made[0], made)
        assert detail["degraded_parts"] == [1]
        listed = (await client.get("/v1/documents")).json()["data"][0]
        assert listed["status"] == "ready" and listed["degraded_parts"] == [1] and listed["adapter_ids"] == made
        adapters = [(await client.get(f"/v1/adapters/{adapter_id}")).json() for adapter_id in made]
        assert [(one["part"], one["parts"], one["status"], one["current"]) for one in adapters] == [
            (0, 3, "ready", True), (1, 3, "degraded", True), (2, 3, "ready", True)
        ]  # fmt: skip
        assert [one["manifest"]["gate"] for one in adapters] == [PASSED, REFUSED, PASSED]
        models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert set(made) <= set(models)
        again = await client.post("/v1/documents?wait=1", json={"text": "Nine.", "external_id": "e1"})
        assert again.status_code == 200 and again.json()["degraded_parts"] == [1] and not again.json()["created"]


async def test_a_refinement_does_not_show_in_its_document(api: Api) -> None:
    async with api.client() as client:
        posted = (await client.post("/v1/documents", json={"text": "Nine."})).json()
        made = publish_parts(api, PASSED, refine_after_s=0)
        (leased,) = api.registry.lease_jobs("w", 1, 60)
        path = f"/v1/documents/{posted['id']}"
        detail = (await client.get(path, params={"wait": 5})).json()
        assert (detail["status"], detail["job_id"], detail["job"]["kind"]) == ("ready", posted["job_id"], "generate")
        job = (await client.get(f"/v1/jobs/{leased.job.id}")).json()
        assert (job["kind"], job["status"], job["note"]) == ("refine", "running", None)
        api.registry.finish_job(leased.job.id, "w", "no better")
        job = (await client.get(f"/v1/jobs/{leased.job.id}")).json()
        assert (job["status"], job["note"], job["adapter_id"]) == ("succeeded", "no better", None)
        assert (await client.get(path)).json()["adapter_ids"] == made


@pytest.mark.parametrize("form", [False, True])
async def test_mode_and_probes(task_api: Api, form: bool) -> None:
    probes = [{"question": "Wann öffnet das Bad?", "answer": "Um neun."}, {"question": "Where is it?"}]
    stored = [probes[0], {"question": "Where is it?", "answer": None}]
    fields = {"external_id": "e1", "mode": "task"}

    async def send(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
        if form:
            data = {**fields, **{name: json.dumps(value) for name, value in more.items()}}
            files = {"file": ("a.txt", b"Answer in rhymes.")}
            return (await client.post("/v1/documents", files=files, data=data)).json()
        body = {"text": "Answer in rhymes.", "title": "a", **fields, **more}
        return (await client.post("/v1/documents", json=body)).json()

    async with task_api.client() as client:
        assert (await send(client, probes=probes))["mode"] == "task"
        assert not (await send(client, probes=probes))["created"]
        detail = (await client.get("/v1/documents/e1")).json()
        assert (detail["mode"], detail["probes"], detail["version"]) == ("task", stored, 1)
        assert (await send(client))["version"] == 2, "other probes, other content"
        put = (await client.put("/v1/documents/e1", json={"text": "Nine.", "probes": probes[:1]})).json()
        assert (put["mode"], put["version"]) == ("document", 3), "PUT replaces all of the content"
        assert (await client.get("/v1/documents/e1")).json()["probes"] == stored[:1]
    (_, _, leased) = task_api.registry.lease_jobs("w", 10, 60)
    assert leased.version.probes == tuple(stored[:1])


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[32mok\x1b[0m " + "a line of a log " * 20,
        "Tab\there\r\nForm feed\x0c and \x85 next line",
        "One lost letter: caf\ufffd. " + "The rest is readable. " * 5,
        "表 😀 עברית ไทย \u200d\u00ad",
        "x",
    ],
)
async def test_text_with_odd_but_readable_characters(api: Api, text: str) -> None:
    async with api.client() as client:
        assert (await client.post("/v1/documents", json={"text": text})).status_code == 202


async def test_external_id_cannot_change(api: Api) -> None:
    async with api.client() as client:
        await client.post("/v1/documents", json={"text": "x", "external_id": "e1"})
        response = await client.put("/v1/documents/e1", json={"text": "y", "external_id": "e2"})
    assert error_of(response, 400)["param"] == "external_id"


@pytest.mark.parametrize(
    "external_id", ["handbook/returns.md", "/etc/motd", "a//b", "a/", "https://x.example/a?b=c#d", "ü/%2F", "..."]
)
async def test_external_ids_with_slashes(api: Api, external_id: str) -> None:
    async with api.client() as client:
        posted = (await client.post("/v1/documents", json={"text": "x", "external_id": external_id})).json()
        for safe in ("", "/"):
            path = f"/v1/documents/{quote(external_id, safe=safe)}"
            assert (await client.get(path)).json()["id"] == posted["id"]
        assert (await client.put(path, json={"text": "y"})).json()["version"] == 2
        listed = await client.get("/v1/adapters", params={"document_id": external_id})
        assert listed.status_code == 200
        assert (await client.delete(path)).json()["id"] == posted["id"]
        error_of(await client.get(path), 404)
    async with api.client(api.admin_key) as client:
        text = (await client.get("/metrics")).text
    assert 'route="/v1/documents/{document_id}"' in text


async def test_other_tenants_see_nothing(api: Api) -> None:
    async with api.client() as client:
        posted = (await client.post("/v1/documents", json={"text": "x", "external_id": "e1"})).json()
    (adapter_id,) = finish_jobs(api)
    async with api.client(api.other_key) as client:
        for path in (
            f"/v1/documents/{posted['id']}",
            "/v1/documents/e1",
            f"/v1/jobs/{posted['job_id']}",
            f"/v1/adapters/{adapter_id}",
            f"/v1/models/{adapter_id}",
        ):
            error_of(await client.get(path), 404)
        assert (await client.get("/v1/documents")).json()["data"] == []
        assert len((await client.get("/v1/models")).json()["data"]) == 2
        chat = {"model": adapter_id, "messages": [{"role": "user", "content": "?"}]}
        error_of(await client.post("/v1/chat/completions", json=chat), 404)
        error_of(await client.delete("/v1/documents/e1"), 404)
    assert not api.engine.calls


async def test_wait_holds_the_answer(api: Api) -> None:
    async with api.client() as client:
        waiting = asyncio.create_task(client.post("/v1/documents?wait=5", json={"text": "x"}))
        while not finish_jobs(api):
            await asyncio.sleep(0.01)
        response = await waiting
        assert response.status_code == 200
        assert response.json()["status"] == "ready" and response.json()["job"]["status"] == "succeeded"
        response = await client.post("/v1/documents?wait=0.1", json={"text": "y"})
        assert response.status_code == 202 and response.json()["status"] == "processing"


async def test_wait_ends_with_a_failed_job(api: Api) -> None:
    async with api.client() as client:
        waiting = asyncio.create_task(client.post("/v1/documents?wait=5", json={"text": "x"}))
        while not (leased := api.registry.lease_jobs("w", 1, 60)):
            await asyncio.sleep(0.01)
        api.registry.fail_job(leased[0].job.id, "w", "too long")
        response = await waiting
    assert response.status_code == 200
    assert response.json()["status"] == "failed" and response.json()["job"]["error"] == "too long"


async def test_idempotency_key(api: Api) -> None:
    async with api.client() as client:
        headers = {"Idempotency-Key": "k1"}
        first = await client.post("/v1/documents", json={"text": "x"}, headers=headers)
        again = await client.post("/v1/documents", json={"text": "x"}, headers=headers)
        assert again.json()["id"] == first.json()["id"] and again.json()["job_id"] == first.json()["job_id"]
        other = await client.post("/v1/documents", json={"text": "y"}, headers=headers)
        assert error_of(other, 409)["param"] == "Idempotency-Key"
        assert len((await client.get("/v1/documents")).json()["data"]) == 1


@pytest.mark.parametrize(
    ("files", "data", "title", "text"),
    [
        ({"file": ("pool hours.txt", b"Nine.")}, {}, "pool hours", "Nine."),
        ({"file": ("a.md", "# Pöol\n\nNine.".encode())}, {}, "Pöol", "# Pöol\n\nNine."),
        ({"file": ("a.MD", b"\xef\xbb\xbfNine.")}, {"title": "T"}, "T", "Nine."),
        ({"file": ("../../etc/passwd.txt", b"Nine.")}, {"collection": "c"}, "passwd", "Nine."),
    ],
)
async def test_multipart(api: Api, files: Any, data: dict[str, str], title: str, text: str) -> None:
    async with api.client() as client:
        response = await client.post("/v1/documents", files=files, data={**data, "metadata": '{"a": "b"}'})
        assert response.status_code == 202, response.text
        detail = (await client.get(f"/v1/documents/{response.json()['id']}")).json()
    assert (detail["title"], detail["text"], detail["metadata"]) == (title, text, {"a": "b"})


async def test_title_from_text(api: Api) -> None:
    async with api.client() as client:
        for text, title in (("\n First line. \nSecond.", "First line."), ("intro\n## Heading\n", "Heading")):
            assert (await client.post("/v1/documents", json={"text": text})).json()["title"] == title


async def test_pages(api: Api) -> None:
    async with api.client() as client:
        for index in range(5):
            collection = {"collection": "odd"} if index % 2 else {}
            await client.post("/v1/documents", json={"title": str(index), "text": str(index), **collection})
        titles: list[str] = []
        cursor: dict[str, Any] = {}
        while True:
            page = (await client.get("/v1/documents", params={"limit": 2, **cursor})).json()
            titles += [document["title"] for document in page["data"]]
            if not page["has_more"]:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert titles == ["4", "3", "2", "1", "0"]
        odd = (await client.get("/v1/documents", params={"collection": "odd"})).json()["data"]
        assert [document["title"] for document in odd] == ["3", "1"]


async def test_keys_over_http(api: Api) -> None:
    async with api.client(api.admin_key) as client:
        created = await client.post("/v1/keys", json={"tenant": "initech", "label": "l"})
        assert created.status_code == 201
        key = created.json()
        service = (await client.post("/v1/keys", json={"scope": "service", "tenants": ["acme", "initech"]})).json()
        assert len(service["tenant_ids"]) == 2
        listed = (await client.get("/v1/keys")).json()["data"]
        assert {key["id"], service["id"]} <= {row["id"] for row in listed}
        assert all("secret" not in row for row in listed)
        for body in ({"scope": "tenant"}, {"scope": "admin", "tenant": "x"}, {"scope": "service"}, {"scope": "root"}):
            error_of(await client.post("/v1/keys", json=body), 400)
        async with api.client(key["secret"]) as tenant:
            assert (await tenant.get("/v1/models")).status_code == 200
            assert (await client.delete(f"/v1/keys/{key['id']}")).json()["revoked_at"] is not None
            error_of(await tenant.get("/v1/models"), 401)
        error_of(await client.delete("/v1/keys/key_none"), 404)
        # An admin key sees no tenant's data.
        error_of(await client.get("/v1/documents"), 403)


async def test_operations(api: Api) -> None:
    async with api.client("") as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        ready = await client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["parts"]["engine"] == "ok"
        api.engine.status = 500
        ready = await client.get("/readyz")
        assert ready.status_code == 503 and ready.json()["parts"]["engine"] == "unavailable"
        error_of(await client.get("/metrics"), 401)
    async with api.client(api.admin_key) as client:
        text = (await client.get("/metrics")).text
    assert 'imprint_http_requests_total{method="GET",route="/healthz",status="200"} 1.0' in text
    assert "vllm:x 1.0" in text and "imprint_generation_jobs 0.0" in text


async def test_openapi_is_true(api: Api) -> None:
    async with api.client("") as client:
        schema = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 200
    paths = schema["paths"]
    for path, methods in {
        "/v1/documents": {"get", "post"},
        "/v1/documents/{document_id}": {"get", "put", "delete"},
        "/v1/jobs/{job_id}": {"get"},
        "/v1/adapters": {"get"},
        "/v1/adapters/{adapter_id}": {"get"},
        "/v1/chat/completions": {"post"},
        "/v1/completions": {"post"},
        "/v1/models": {"get"},
        "/v1/models/{model}": {"get"},
        "/v1/route": {"post"},
        "/v1/keys": {"get", "post"},
        "/v1/keys/{key_id}": {"delete"},
        "/healthz": {"get"},
        "/readyz": {"get"},
        "/metrics": {"get"},
    }.items():
        assert set(paths[path]) == methods, path
    assert "422" not in str(paths)
    schemas = schema["components"]["schemas"]
    post = schemas["DocumentPost"]["properties"]
    assert post["mode"]["enum"] == ["document", "task"] and post["probes"]["anyOf"][0]["maxItems"] == 32
    for name, states in (("DocumentObject", DocumentState), ("AdapterObject", AdapterState), ("JobObject", JobState)):
        assert schemas[name]["properties"]["status"]["enum"] == list(get_args(states)), name
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert "cache_salt" not in schemas["ChatRequest"]["properties"]
    for reference in _references(schema):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
