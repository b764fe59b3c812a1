"""`explain`, recorded decisions and `/v1/feedback` over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.api import recording
from serve.api.recording import response_key
from serve.registry.records import RecordedDecision
from tests.serve.api_helpers import Api, error_of, events_of, make_api
from tests.serve.registry_helpers import make_ready, read

CHAT = {"model": "imprint", "messages": [{"role": "user", "content": "When does the pool open?"}]}


def candidate(adapter: str = "adp_1", document: str = "doc_1", confidence: float | None = 0.9) -> dict[str, Any]:
    return {"adapter_id": adapter, "document_id": document, "title": "Pool rules", "score": 0.71, "similarity": 0.7,
            "word_share": 0.72, "rank": 0.7, "part": 0, "parts": 1, "state": "ready", "margin": 0.2,
            "confidence": confidence, "threshold": 0.5}  # fmt: skip


DECISION: dict[str, Any] = {
    "adapter_id": "adp_1", "document_id": "doc_1", "reason": "matched", "score": 0.71, "margin": 0.2,
    "confidence": 0.9, "threshold": 0.5, "candidates": [candidate(), candidate("adp_2", "doc_2", 0.1)],
    "adapters": [{"adapter_id": "adp_1", "document_id": "doc_1", "score": 0.71, "weight": 1.0}],
    "calibration": {"version": 0, "method": "platt"}, "policy": [{"rule": "r", "effect": "kept"}],
    "timings": {"embed_s": 0.01},
}  # fmt: skip
REPLICA = {"adapters": [{"adapter_id": "adp_1", "tier": "slot"}, {"adapter_id": "adp_secret", "tier": "disk"}]}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = make_api(tmp_path)
    api.router.decision = DECISION
    yield api
    api.registry.close()


def tenant(api: Api, name: str = "acme") -> str:
    found = api.registry.get_tenant(name)
    assert found is not None
    return found.id


async def recorded(api: Api, name: str = "acme") -> list[RecordedDecision]:
    await api.services.recorder.flush()
    return api.registry.recent_decisions(tenant(api, name), 100)


@pytest.mark.parametrize("stream", [False, True])
async def test_explain_on_chat(api: Api, stream: bool) -> None:
    api.engine.replicas = [REPLICA, {"adapters": []}]
    async with api.client() as client:
        plain = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream, "explain": True})
    assert answer.headers["x-imprint-confidence"] == "0.9000"
    field = events_of(answer.text)[0]["imprint"] if stream else answer.json()["imprint"]
    found = field.pop("explain")
    assert (events_of(plain.text)[0] if stream else plain.json())["imprint"] == field and field["confidence"] == 0.9
    assert found["candidates"] == DECISION["candidates"] and found["timings"] == DECISION["timings"]
    assert (found["confidence"], found["margin"], found["threshold"]) == (0.9, 0.2, 0.5)
    assert found["calibration"] == DECISION["calibration"] and found["policy"] == DECISION["policy"]
    # Of this tenant's candidates only, whatever else the engine holds.
    assert found["residency"] == [
        {"adapter_id": "adp_1", "replicas": 2, "slot": 1, "cpu": 0, "disk": 0},
        {"adapter_id": "adp_2", "replicas": 2, "slot": 0, "cpu": 0, "disk": 0},
    ]
    assert all("explain" not in passed for _, passed, _ in api.engine.calls)


async def test_explain_on_route_and_without_a_router(api: Api) -> None:
    event = make_ready(api.registry, tenant(api), "Pool rules", external_id="pool")
    async with api.client() as client:
        body = {"prompt": "When?", "explain": True}
        routed = (await client.post("/v1/route", json=body)).json()
        assert routed["explain"]["candidates"] == DECISION["candidates"] and routed["explain"]["residency"] is None
        plain = (await client.post("/v1/route", json={"prompt": "x"})).json()
        assert routed["confidence"] == plain["confidence"] == 0.9 and plain["explain"] is None
        pinned = (await client.post("/v1/route", json={**body, "model": event.adapter_id})).json()
        assert (pinned["reason"], pinned["explain"]["candidates"]) == ("pinned", [])
        error = error_of(await client.post("/v1/route", json={**body, "explain": "yes"}), 400)
        assert error["param"] == "explain"


async def test_decisions_are_recorded_with_what_was_asked(api: Api) -> None:
    async with api.client() as client:
        headers = {"x-app": "kiosk", "x-api-key": "no", "cookie": "no"}
        first = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        await client.post("/v1/completions", json={"model": "imprint", "prompt": "The pool opens at"})
        await client.post("/v1/chat/completions", json={**CHAT, "model": "base"})
        await client.post("/v1/route", json={"prompt": "only asked"})
        api.engine.status = 500
        await client.post("/v1/chat/completions", json=CHAT)
    found = {one.text: one for one in await recorded(api)}
    assert set(found) == {"When does the pool open?", "The pool opens at"} and len(await recorded(api)) == 3
    chats = [one for one in await recorded(api) if one.text == "When does the pool open?"]
    assert {one.reason for one in chats} == {"matched", "base_requested"}
    chat = next(one for one in chats if one.reason == "matched")
    assert chat.response_id == first.headers["x-request-id"] and chat.headers == {"x-app": "kiosk"}
    assert (chat.adapter_id, chat.document_id, chat.confidence) == ("adp_1", "doc_1", 0.9)
    assert [one["adapter_id"] for one in chat.candidates] == ["adp_1", "adp_2"]
    assert await recorded(api, "globex") == []


async def test_recording_is_off_the_request_path(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "FLUSH_S", 0.01)
    monkeypatch.setattr(recording, "MAX_WAITING", 3)
    writes: list[int] = []
    keep = api.registry.record_decisions

    def slow(rows: list[RecordedDecision], kept: int) -> None:
        writes.append(len(rows))
        keep(rows, kept)

    monkeypatch.setattr(api.registry, "record_decisions", slow)
    async with api.client() as client:
        await asyncio.gather(*(client.post("/v1/chat/completions", json=CHAT) for _ in range(3)))
        for _ in range(300):
            if sum(writes) == 3:
                break
            await asyncio.sleep(0.01)
        assert sum(writes) == 3
        monkeypatch.setattr(recording, "FLUSH_S", 60)
        api.services.recorder._task = None
        for _ in range(5):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert "imprint_route_decisions_dropped_total 2.0" in api.services.metrics.text()
        # A registry that fails costs the record, not the answer.
        monkeypatch.setattr(api.registry, "record_decisions", lambda rows, kept: 1 / 0)
        await api.services.recorder.flush()
    assert "imprint_route_decisions_dropped_total 5.0" in api.services.metrics.text()


async def test_nothing_is_recorded_where_that_is_switched_off(tmp_path: Path) -> None:
    api = make_api(tmp_path, router={"recorded_decisions": 0})
    async with api.client() as client:
        await client.post("/v1/chat/completions", json=CHAT)
    assert await recorded(api) == []


def test_response_ids() -> None:
    key = "0123456789abcdef" * 2
    for text in (f"chatcmpl-req_{key}", f"cmpl-req_{key}", f"cmpl-req_{key}-0", f"resp_{key}", f"req_{key}", key,
                 f"req_{key}, 6f3c6ec8-7d8e-4c14-9d52-0a4f0b7b6f2e"):  # fmt: skip
        assert response_key(text) == f"req_{key}"
    for text in ("", "x", ",", f"x, req_{key}", f"req_{key[:-1]}", f"req_{key}z", f"req_{key.upper()}"):
        assert response_key(text) is None


async def test_feedback(api: Api) -> None:
    make_ready(api.registry, tenant(api), "Pool rules", external_id="pool")
    pool = read(api.registry, tenant(api), "pool")
    async with api.client() as client:
        chat = await client.post("/v1/chat/completions", json=CHAT)
        request_id = chat.headers["x-request-id"]
        body = {"response_id": f"chatcmpl-{request_id}", "rating": "down", "answer": "At eight."}
        first = (await client.post("/v1/feedback", json=body)).json()
        assert first == {
            "object": "feedback", "response_id": request_id, "created_at": first["created_at"], "rating": "down",
            "document_id": None, "no_document": False, "answer": "At eight.", "answered_by": "adp_1",
        }  # fmt: skip
        for named in ({"document": "pool"}, {"document": pool.id}, {"adapter": pool.adapter_id}):
            again = await client.post("/v1/feedback", json={"response_id": request_id, **named})
            assert again.json()["document_id"] == pool.id and again.json()["rating"] is None
        listed = (await client.get("/v1/feedback")).json()["data"]
        assert [one["response_id"] for one in listed] == [request_id], "said again, it replaces what was said"
        assert (await client.get("/v1/feedback", params={"after": listed[0]["created_at"]})).json()["data"] == []
    assert 'imprint_feedback_total{kind="document"} 3.0' in api.services.metrics.text()
    async with api.client(api.other_key) as client:
        refused = await client.post("/v1/feedback", json={"response_id": request_id, "rating": "up"})
        assert error_of(refused, 404)["code"] == "response_not_found"
        assert (await client.get("/v1/feedback")).json()["data"] == []


async def test_feedback_that_cannot_be_taken(api: Api) -> None:
    event = make_ready(api.registry, tenant(api), "Pool rules", external_id="pool")
    other = make_ready(api.registry, tenant(api), "Sauna rules")
    make_ready(api.registry, tenant(api, "globex"), "Theirs", external_id="theirs")
    async with api.client() as client:
        request_id = (await client.post("/v1/chat/completions", json=CHAT)).headers["x-request-id"]
        for fields, status, param in (
            ({}, 400, "rating"),
            ({"response_id": "nonsense", "rating": "up"}, 400, "response_id"),
            ({"response_id": 7, "rating": "up"}, 400, "response_id"),
            ({"rating": "sideways"}, 400, "rating"),
            ({"rating": "up", "stars": 5}, 400, "stars"),
            ({"answer": ""}, 400, "answer"),
            ({"document": "pool", "no_document": True}, 400, "no_document"),
            ({"document": "pool", "adapter": other.adapter_id}, 400, "adapter"),
            ({"document": "absent"}, 404, "document"),
            ({"document": "theirs"}, 404, "document"),
            ({"adapter": "adp_absent"}, 404, "adapter"),
            ({"response_id": f"req_{'0' * 32}", "rating": "up"}, 404, "response_id"),
        ):
            answer = await client.post("/v1/feedback", json={"response_id": request_id, **fields})
            assert error_of(answer, status)["param"] == param, fields
        good = {"response_id": request_id, "document": "pool", "adapter": event.adapter_id}
        assert (await client.post("/v1/feedback", json=good)).status_code == 200
        for params in ({"limit": 0}, {"after": "x"}, {"after": -1}):
            error_of(await client.get("/v1/feedback", params=params), 400)
        error_of(await client.get("/v1/feedback/suggestions", params={"least": 1}), 400)
    async with api.client("") as client:
        error_of(await client.post("/v1/feedback", json=good), 401)


async def test_suggestions_are_asked_of_the_router(api: Api) -> None:
    async with api.client() as client:
        answer = await client.get("/v1/feedback/suggestions", params={"least": 2, "limit": 5})
    assert answer.json() == {"object": "list", "questions": 0, "data": []}
    assert api.router.calls[-1] == {"tenant_id": tenant(api), "least": 2, "limit": 5}
