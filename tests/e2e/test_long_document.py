"""Thirty pages of real documentation posted as one document: its parts are selected at query time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from tests import reference_pages
from tests.e2e.conftest import Tenant
from tests.reference_pages import QUESTIONS, TITLE, place

pytestmark = pytest.mark.e2e

POOL_TITLE = "Harbour Pool: visitor notice"
POOL = "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."
GENERATION_TIMEOUT_S = 600
CHATS = 5


def post(tenant: Tenant, title: str, text: str) -> dict[str, Any]:
    """Post and wait until the gate has spoken. The small shipped models may not pass it on such text: then every part
    is still made, stays pinnable by name, and is still what the router would choose."""
    response = tenant.http.post("/v1/documents", json={"title": title, "text": text})
    assert response.status_code == 202, response.text
    document: dict[str, Any] = response.json()
    deadline = time.monotonic() + GENERATION_TIMEOUT_S
    while document["status"] == "processing" and time.monotonic() < deadline:
        document = tenant.http.get(f"/v1/documents/{document['id']}", params={"wait": 30}).json()
    assert document["status"] in ("ready", "degraded"), document
    return document


class Adapters:
    """Adapters as the API tells them, each asked for once. Those of before a refinement can still be read."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, adapter_id: str) -> dict[str, Any]:
        if adapter_id not in self._known:
            response = self._tenant.http.get(f"/v1/adapters/{adapter_id}")
            assert response.status_code == 200, response.text
            self._known[adapter_id] = response.json()
        return self._known[adapter_id]

    def covers(self, adapter_id: str, at: int) -> bool:
        """Whether the adapter was made of the place `at` of the text, in characters."""
        return any(start <= at < end for start, end in spans_of(self(adapter_id)))


def spans_of(adapter: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(chunk["start"], chunk["end"]) for chunk in adapter["manifest"]["chunks"]]


def test_parts_of_thirty_pages_are_selected_at_query_time(tenant: Tenant) -> None:
    text = reference_pages.text()
    assert len(reference_pages.PAGES) == 30 and len(text) > 90_000 and len(QUESTIONS) >= 20
    tenant.post(POOL_TITLE, POOL)
    document = post(tenant, TITLE, text)
    adapters = Adapters(tenant)

    # Nothing is cut: the manifests cover all of the text, in order.
    parts = [adapters(adapter_id) for adapter_id in document["adapter_ids"]]
    assert len(parts) > 10
    assert [(part["part"], part["parts"]) for part in parts] == [(i, len(parts)) for i in range(len(parts))]
    end = 0
    for start, next_end in [*(span for part in parts for span in spans_of(part)), (len(text), len(text))]:
        assert start >= end and not text[end:start].strip(), (end, start)
        end = next_end

    # Free choice finds the document and the part; a degraded part makes the base answer, and says so.
    found = 0
    for question in QUESTIONS:
        decision = tenant.http.post("/v1/route", json={"prompt": question.text}).json()
        best = decision["candidates"][0]
        assert best["document_id"] == document["id"], decision
        assert [candidate["document_id"] for candidate in decision["candidates"]].count(document["id"]) == 1
        if best["state"] == "ready":
            assert (decision["reason"], decision["adapter_id"]) == ("matched", best["adapter_id"])
        else:
            assert (decision["reason"], decision["adapter_id"]) == ("degraded", None)
        found += adapters.covers(best["adapter_id"], place(question, text))
    assert found >= 0.8 * len(QUESTIONS), f"{found} of {len(QUESTIONS)}"

    # With the document named, the part answers whatever the gate said.
    found = 0
    for question in QUESTIONS:
        decision = tenant.http.post("/v1/route", json={"model": document["id"], "prompt": question.text}).json()
        assert (decision["reason"], decision["document_id"]) == ("pinned", document["id"])
        assert decision["degraded"] == (adapters(decision["adapter_id"])["status"] == "degraded")
        found += adapters.covers(decision["adapter_id"], place(question, text))
    assert found >= 0.8 * len(QUESTIONS), f"{found} of {len(QUESTIONS)}"

    # The answer is that adapter's, and says which part it came from.
    selected = set()
    for question in QUESTIONS[:CHATS]:
        messages = [{"role": "user", "content": question.text}]
        body = {"model": document["id"], "messages": messages, "temperature": 0, "max_tokens": 16}
        response = tenant.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        field = response.json()["imprint"]
        adapter = adapters(field["adapter_id"])
        assert (field["part"], field["parts"]) == (adapter["part"], len(parts))
        assert response.headers["x-imprint-part"] == str(field["part"])
        assert response.headers["x-imprint-adapter"] == field["adapter_id"]
        again = tenant.http.post("/v1/chat/completions", json={**body, "model": field["adapter_id"]}).json()
        assert response.json()["choices"][0]["message"]["content"] == again["choices"][0]["message"]["content"]
        selected.add(field["part"])
    assert len(selected) > 1

    # The other document is still found among them.
    decision = tenant.http.post("/v1/route", json={"prompt": "When does the Harbour Pool open?"}).json()
    assert decision["candidates"][0]["title"] == POOL_TITLE and decision["reason"] == "matched"
