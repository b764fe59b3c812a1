"""`/v1/slots`, and answers of the base in place of an adapter that cannot be had; engine and router are scripted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serve.api_helpers import error_of, events_of, make_api

CHAT = {"model": "imprint", "messages": [{"role": "user", "content": "How much?"}]}
DECISION = {
    "adapter_id": "adp_1",
    "document_id": "doc_1",
    "reason": "matched",
    "score": 0.8,
    "margin": 0.1,
    "threshold": 0.4,
    "part": 1,
    "parts": 3,
    "degraded": True,
}
REPLICA = {
    "replica": "node:1",
    "slots": 2,
    "max_cpu_loras": 4,
    "in_slots": 1,
    "in_cpu": 1,
    "on_disk": 1,
    "cache_bytes": 10,
    "waiting": 0,
    "evictions": {"slot": 0, "cpu": 0, "disk": 0},
    "adapters": [
        {
            "adapter_id": "adp_1",
            "tier": "slot",
            "since": 1.0,
            "last_used": 2.0,
            "users": 1,
            "uses": 2,
            "hits": 1,
            "load_ms": 2.5,
            "bytes": 10,
        }
    ],
}


async def test_slots_of_all_replicas_for_operators_only(tmp_path: Path) -> None:
    api = make_api(tmp_path)
    async with api.client(api.admin_key) as client:
        assert error_of(await client.get("/v1/slots"), 503)["code"] == "engine_unavailable"
        api.engine.replicas = [REPLICA, {**REPLICA, "replica": "node:2", "adapters": []}]
        answer = await client.get("/v1/slots")
    assert answer.status_code == 200 and answer.json() == {"object": "list", "data": api.engine.replicas}
    async with api.client() as client:
        assert error_of(await client.get("/v1/slots"), 403)["code"] == "admin_key_required"
    async with api.client("") as client:
        error_of(await client.get("/v1/slots"), 401)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_base_in_place_of_an_adapter_shows(tmp_path: Path, stream: bool) -> None:
    api = make_api(tmp_path)
    api.router.decision, api.engine.unavailable = DECISION, True
    async with api.client() as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.headers["x-imprint-adapter"] == "base"
    assert answer.headers["x-imprint-reason"] == "adapter_unavailable"
    assert "x-imprint-part" not in answer.headers
    field = events_of(answer.text)[0]["imprint"] if stream else answer.json()["imprint"]
    assert field == {
        "adapter_id": None,
        "document_id": "doc_1",
        "reason": "adapter_unavailable",
        "score": 0.8,
        "margin": 0.1,
        "threshold": 0.4,
    }


@pytest.mark.parametrize(
    ("reason", "setting", "wanted"),
    [("matched", "base", "base"), ("matched", "refuse", "refuse"), ("pinned", "base", "refuse")],
)
async def test_who_may_answer_for_a_missing_adapter(tmp_path: Path, reason: str, setting: Any, wanted: str) -> None:
    api = make_api(tmp_path, engine={"on_missing_adapter": setting})
    api.router.decision = {**DECISION, "reason": reason}
    async with api.client() as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    ((_, _, context),) = api.engine.calls
    assert context.on_missing_adapter == wanted
