"""Documents that no one should post, on the real server: a clear error or an honest `degraded`, and the generator
still serves the next good document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Tenant
from tests.e2e.test_bad_input import refused

pytestmark = pytest.mark.e2e

TITLE = "Harbour Pool: visitor notice"
TEXT = "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde."
QUESTION = "When does the Harbour Pool open?"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
TOKENS = 200_000


@pytest.fixture(autouse=True)
def _still_serves(tenant: Tenant) -> Iterator[None]:
    """Whatever came before, the next good document is read, found and answered from."""
    yield
    document = tenant.post(TITLE, TEXT)
    decision = tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()
    assert (decision["document_id"], decision["reason"]) == (document["id"], "matched"), decision
    assert tenant.ask(QUESTION) == tenant.ask(QUESTION, document["adapter_id"])


def post(tenant: Tenant, title: str, text: str) -> dict[str, Any]:
    """Post whatever it is and wait until its job has ended."""
    response = tenant.http.post("/v1/documents?wait=60", json={"title": title, "text": text})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def gate_of(tenant: Tenant, document: dict[str, Any]) -> dict[str, Any]:
    gate: dict[str, Any] = tenant.http.get(f"/v1/adapters/{document['adapter_id']}").json()["manifest"]["gate"]
    return gate


def check_degraded_is_honest(tenant: Tenant, document: dict[str, Any], question: str) -> None:
    """It says why, nobody is routed to it, and who names it still gets its adapter's answer."""
    gate = gate_of(tenant, document)
    assert gate["state"] == "degraded" and gate["reasons"], gate
    decision = tenant.http.post("/v1/route", json={"prompt": question}).json()
    assert decision["adapter_id"] is None and decision["reason"] in ("degraded", "below_threshold"), decision
    pinned = tenant.http.post("/v1/route", json={"model": document["id"], "prompt": question}).json()
    assert (pinned["adapter_id"], pinned["degraded"]) == (document["adapter_id"], True)
    tenant.ask(question, document["id"], max_completion_tokens=4)


@pytest.mark.parametrize(
    ("title", "text", "question"),
    [
        ("Hausordnung", "Die Waschküche ist bis 21 Uhr geöffnet. Der Hausmeister heißt Ottokar Brüll.",
         "Wie heißt der Hausmeister?"),
        ("図書館のお知らせ", "図書館は午前九時に開きます。館長は山田花子です。", "図書館は何時に開きますか。"),
        ("إعلان", "يفتح المتحف في الساعة العاشرة صباحا. مدير المتحف هو سامي حداد.", "متى يفتح المتحف؟"),
    ],
    ids=["German", "Japanese", "Arabic"],
)
def test_another_language(tenant: Tenant, title: str, text: str, question: str) -> None:
    """nano knows English only. Either it can be shown that the adapter holds the text, or it is degraded."""
    document = post(tenant, title, text)
    if document["status"] == "degraded":
        check_degraded_is_honest(tenant, document, question)
    else:
        assert document["status"] == "ready", document
        gate = gate_of(tenant, document)
        assert gate["probes"] >= 1 and gate["score"] >= gate["threshold"] and gate["margin"] > 0, gate
    # All of the text was read, and is still there as it was posted.
    adapters = [tenant.http.get(f"/v1/adapters/{name}").json() for name in document["adapter_ids"]]
    assert adapters[0]["manifest"]["chunks"][0]["start"] == 0
    assert adapters[-1]["manifest"]["chunks"][-1]["end"] == len(text)
    assert tenant.http.get(f"/v1/documents/{document['id']}").json()["text"] == text


@pytest.mark.parametrize("text", ["x", "7", "ж", "\U0001f600"])
def test_one_character(tenant: Tenant, text: str) -> None:
    document = post(tenant, "", text)
    assert document["status"] == "degraded", document
    assert gate_of(tenant, document)["reasons"] == ["no_probes"]
    check_degraded_is_honest(tenant, document, text)


def test_200_000_tokens(tenant: Tenant) -> None:
    """More than the parts of one document can hold: its job fails at once, without another try, and says the limit."""
    document = post(tenant, "Words", "word " * TOKENS)
    assert document["status"] == "failed" and document["adapter_ids"] == []
    job = tenant.http.get(f"/v1/jobs/{document['job_id']}").json()
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert "tokens" in job["error"] and "a document may have" in job["error"], job
    refusal = tenant.http.post("/v1/chat/completions", json={
        "model": document["id"], "messages": [{"role": "user", "content": "?"}]})
    assert refusal.status_code == 409 and refusal.json()["error"]["code"] == "model_not_ready"


def test_binary_posted_as_text(tenant: Tenant) -> None:
    for name in ("photo.txt", "photo.md"):
        refused(tenant.http.post("/v1/documents", files={"file": (name, PNG)}), 400, "file")
    refused(tenant.http.post("/v1/documents", json={"title": "t", "text": PNG.decode("latin-1")}), 400, "text")
    refused(tenant.http.post("/v1/documents", json={"title": "t", "text": PNG.decode("utf-8", "replace")}), 400, "text")
    assert tenant.http.get("/v1/documents").json()["data"] == []
