"""Why a document was chosen, and what clients say about it: what docs/routing.md promises, on the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

POOL = ("Harbour Pool: visitor notice", "The Harbour Pool opens at 7:15 in the morning. Its lifeguard is Marta Velde.")
LIBRARY = ("Town Library: visitor notice", "The Town Library closes at 18:30. Its librarian is Jon Sand.")
QUESTION = "When does the Harbour Pool open?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
ABSENT = "req_" + "0" * 32


@pytest.fixture
def pool(tenant: Tenant) -> dict[str, Any]:
    """The document that answers the question; there is another one beside it."""
    tenant.post(*LIBRARY, external_id="library")
    return tenant.post(*POOL, external_id="pool")


def chat(tenant: Tenant, question: str = QUESTION, **fields: Any) -> httpx.Response:
    body = {"model": "imprint", "messages": [{"role": "user", "content": question}], "max_tokens": 4, **fields}
    response = tenant.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def check_explanation(found: Mapping[str, Any], pool: Mapping[str, Any]) -> None:
    """All that is promised of an explanation, where the pool's document was chosen of two."""
    first, second = found["candidates"]
    assert (first["adapter_id"], first["document_id"], first["title"]) == (pool["adapter_id"], pool["id"], POOL[0])
    assert second["title"] == LIBRARY[0] and {first["state"], second["state"]} == {"ready"}
    for one in (first, second):
        assert -1 <= one["similarity"] <= 1 and 0 <= one["word_share"] <= 1 and (one["part"], one["parts"]) == (0, 1)
        assert 0 < one["confidence"] < 1 and 0 < one["threshold"] < 1 and -1 <= one["score"] <= 1.5
    assert first["confidence"] >= first["threshold"] and second["confidence"] < second["threshold"]
    lead = first["rank"] - second["rank"]
    assert lead > 0 and (first["margin"], second["margin"]) == (pytest.approx(lead), pytest.approx(-lead))
    for name in ("score", "margin", "confidence", "threshold"):
        assert found[name] == first[name], name
    assert found["calibration"]["version"] == 0 and found["calibration"]["method"] in ("platt", "isotonic")
    assert found["calibration"]["encoder"] == "minilm" and found["policy"] == []
    assert [one["adapter_id"] for one in found["residency"]] == [first["adapter_id"], second["adapter_id"]]
    for place in found["residency"]:
        assert place["replicas"] == 1 and place["slot"] + place["cpu"] + place["disk"] <= 1
    times = dict(found["timings"])
    total = times.pop("total_s")
    assert set(times) == {"sync_s", "embed_s", "search_s", "decide_s"} and min(times.values()) >= 0
    assert 0 < sum(times.values()) <= total < 30


def test_an_explained_answer_agrees_with_its_headers(tenant: Tenant, pool: dict[str, Any]) -> None:
    assert "explain" not in chat(tenant).json()["imprint"]
    response = chat(tenant, explain=True)
    said = response.json()["imprint"]
    check_explanation(said["explain"], pool)
    assert (said["adapter_id"], said["document_id"], said["reason"]) == (pool["adapter_id"], pool["id"], "matched")
    for name in ("score", "margin", "confidence", "threshold"):
        assert said[name] == said["explain"][name], name
    headers = response.headers
    assert headers["x-imprint-adapter"] == pool["adapter_id"] and headers["x-imprint-document"] == pool["id"]
    assert headers["x-imprint-reason"] == "matched"
    assert headers["x-imprint-score"] == f"{said['score']:.4f}"
    assert headers["x-imprint-confidence"] == f"{said['confidence']:.4f}"
    # It has answered just now, so it is where the engine can use it at once.
    place = said["explain"]["residency"][0]
    assert (place["adapter_id"], place["slot"]) == (pool["adapter_id"], 1)
    # A question that nothing answers is explained in the same way.
    left = chat(tenant, "What is the capital of Norway?", explain=True)
    found = left.json()["imprint"]
    assert (found["adapter_id"], found["reason"]) == (None, "below_threshold")
    assert left.headers["x-imprint-adapter"] == "base" and left.headers["x-imprint-reason"] == "below_threshold"
    assert len(found["explain"]["candidates"]) == 2 and found["confidence"] < found["threshold"]
    assert left.headers["x-imprint-confidence"] == f"{found['confidence']:.4f}"


def test_every_way_to_ask_is_explained(tenant: Tenant, pool: dict[str, Any]) -> None:
    for body in ({"messages": MESSAGES}, {"prompt": QUESTION}):
        route = tenant.http.post("/v1/route", json={**body, "explain": True}).json()
        check_explanation(route["explain"], pool)
        assert (route["adapter_id"], route["reason"]) == (pool["adapter_id"], "matched")
        for name in ("candidates", "timings", "score", "margin", "confidence", "threshold"):
            assert route[name] == route["explain"][name], name
    assert tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()["explain"] is None
    stream = tenant.openai.chat.completions.create(
        model="imprint", messages=MESSAGES, max_tokens=4, stream=True, extra_body={"explain": True}
    )
    first, *others = [chunk.model_extra or {} for chunk in stream]
    check_explanation(first["imprint"]["explain"], pool)
    assert others and not any("imprint" in chunk for chunk in others)
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": QUESTION, "max_tokens": 4},
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 4},
    }
    for path, fields in asked.items():
        response = tenant.http.post(path, json={"model": "imprint", "explain": True, **fields})
        check_explanation(response.json()["imprint"]["explain"], pool)
    # A pin needs no search, and says where its adapter is.
    pinned = tenant.http.post("/v1/route", json={"model": pool["id"], "prompt": QUESTION, "explain": True}).json()
    assert (pinned["reason"], pinned["explain"]["candidates"]) == ("pinned", [])
    assert [one["adapter_id"] for one in pinned["explain"]["residency"]] == [pool["adapter_id"]]


def imprint(server: Server, tenant: Tenant, *arguments: str) -> list[str]:
    """The lines that the command prints."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("imprint")), *arguments, "--url", server.url],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        env={**os.environ, "IMPRINT_KEY": tenant.key}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cells(line: str) -> list[str]:
    """What stands in the columns of a table's line."""
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def test_the_command_prints_a_table(server: Server, tenant: Tenant, pool: dict[str, Any]) -> None:
    decision = tenant.http.post("/v1/route", json={"messages": MESSAGES, "explain": True}).json()
    lines = imprint(server, tenant, "route", QUESTION, "--explain")
    confidence = f"confidence {decision['confidence']:.3f}, needed {decision['threshold']:.3f}"
    assert lines[0] == f"{pool['id']}: matched, {confidence}"
    assert max(map(len, lines)) <= 120, "it is read without scrolling"
    assert lines[1].strip() == "Candidates"
    head = next(line for line in lines if "┃" in line)
    assert cells(head) == [
        "document", "score", "cosine", "words", "margin", "confidence", "needed", "state", "where"
    ]  # fmt: skip
    rows = [cells(line) for line in lines if "│" in line]
    for candidate, named, below in zip(decision["candidates"], rows[::2], rows[1::2], strict=True):
        numbers = (candidate[name] for name in
                   ("score", "similarity", "word_share", "margin", "confidence", "threshold"))  # fmt: skip
        assert named[:-1] == [candidate["title"], *(f"{number:.3f}" for number in numbers), "ready"]
        assert named[-1] in ("slot", "cpu", "disk", "store")
        assert below[0] == candidate["document_id"] and not any(below[1:])
    assert "calibration: shipped, platt" in lines
    assert lines[-1].startswith("time: sync ") and lines[-1].endswith(" ms")
    assert imprint(server, tenant, "route", QUESTION) == lines[:1]
    rule = {"name": "no pools", "when": 'contains(candidate.title, "Pool")', "forbid": True}
    assert tenant.http.put("/v1/policy", json={"version": 1, "rules": [rule]}).status_code == 200
    lines = imprint(server, tenant, "route", QUESTION, "--explain")
    assert lines[0].startswith("the base model: below_threshold")
    start = lines.index(next(line for line in lines if line.strip() == "Policy"))
    assert {"rule", "action", "effect", "documents", "count"} == set(cells(lines[start + 2]))
    assert "no pools" in "".join(lines[start:]) and "forbidden" in "".join(lines[start:])


def feedback(tenant: Tenant, response_id: str, **fields: Any) -> httpx.Response:
    return tenant.http.post("/v1/feedback", json={"response_id": response_id, **fields})


def refused(response: httpx.Response, status: int, param: str, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code) and error["message"] and error["type"], error


def test_feedback_on_a_response(
    server: Server, tenant: Tenant, other_tenant: Tenant, pool: dict[str, Any]
) -> None:
    library = tenant.http.get("/v1/documents/library").json()
    answer = chat(tenant)
    said, request_id = answer.json()["id"], answer.headers["x-request-id"]
    # At once, although decisions are written off the request path; by either ID.
    up = feedback(tenant, said, rating="up").json()
    assert (up["rating"], up["answered_by"]) == ("up", pool["adapter_id"])
    # Ray's proxy puts an ID of its own behind the server's; clients show both as one header.
    assert up["response_id"] == f"req_{said.removeprefix('chatcmpl-req_')}" == request_id.partition(",")[0]
    assert (up["document_id"], up["no_document"], up["answer"]) == (None, False, None)
    for named in ({"document": "library"}, {"document": library["id"]}, {"adapter": library["adapter_id"]}):
        corrected = feedback(tenant, request_id, rating="down", **named).json()
        assert (corrected["rating"], corrected["document_id"]) == ("down", library["id"])
    right = feedback(tenant, said, answer="At 7:15.").json()
    assert (right["rating"], right["document_id"], right["answer"]) == (None, None, "At 7:15.")
    assert feedback(tenant, said, no_document=True).json()["no_document"] is True
    (kept,) = tenant.http.get("/v1/feedback").json()["data"]
    assert (kept["no_document"], kept["answer"]) == (True, None), "said again, it replaces what was said"
    for kind in ("up", "document", "no_document", "answer"):
        assert server.metric("imprint_feedback_total", kind=kind) >= 1

    refused(feedback(tenant, ABSENT, rating="up"), 404, "response_id", "response_not_found")
    refused(feedback(tenant, said, document="nowhere"), 404, "document", "document_not_found")
    refused(feedback(tenant, said, adapter="adp_nowhere"), 404, "adapter", "adapter_not_found")
    for response_id in (said, request_id):
        refused(feedback(other_tenant, response_id, rating="down"), 404, "response_id", "response_not_found")
    refused(feedback(other_tenant, said, document=pool["id"]), 404, "document", "document_not_found")
    assert other_tenant.http.get("/v1/feedback").json()["data"] == []
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({}, "rating", "missing_field"),
        ({"rating": "sideways"}, "rating", "invalid_value"),
        ({"document": "pool", "no_document": True}, "no_document", "invalid_value"),
        ({"rating": "up", "stars": 5}, "stars", "unknown_field"),
    ]
    for fields, param, code in wrong:
        refused(feedback(tenant, said, **fields), 400, param, code)
    refused(feedback(tenant, "nonsense", rating="up"), 400, "response_id", "invalid_value")
    # A decision that was only asked for is no answer to judge.
    route = tenant.http.post("/v1/route", json={"messages": MESSAGES})
    refused(feedback(tenant, route.headers["x-request-id"], rating="up"), 404, "response_id", "response_not_found")
    assert len(tenant.http.get("/v1/feedback").json()["data"]) == 1

    # What was said about a document goes with it.
    assert tenant.http.delete("/v1/documents/pool").status_code == 200
    assert tenant.http.get("/v1/feedback").json()["data"] == []
    refused(feedback(tenant, said, rating="up"), 404, "response_id", "response_not_found")


def test_feedback_on_streams_and_other_endpoints(tenant: Tenant, pool: dict[str, Any]) -> None:
    stream = list(
        tenant.openai.chat.completions.create(model="imprint", messages=MESSAGES, max_tokens=4, stream=True)
    )
    completion = tenant.http.post("/v1/completions", json={"model": "imprint", "prompt": QUESTION, "max_tokens": 4})
    response = tenant.openai.responses.create(model="imprint", input=QUESTION, max_output_tokens=16)
    base = chat(tenant, model="base")
    for response_id in (stream[0].id, completion.json()["id"], response.id):
        given = feedback(tenant, response_id, rating="down")
        assert given.status_code == 200, given.text
        assert given.json()["answered_by"] == pool["adapter_id"]
    assert feedback(tenant, base.json()["id"], document="pool").json()["answered_by"] is None
    found = tenant.http.get("/v1/feedback").json()["data"]
    assert [one["rating"] for one in found] == ["down", "down", "down", None]
    page = tenant.http.get("/v1/feedback", params={"after": found[1]["created_at"], "limit": 1}).json()["data"]
    assert page == found[2:3]


def test_questions_that_found_no_document_are_suggested(
    tenant: Tenant, other_tenant: Tenant, pool: dict[str, Any]
) -> None:
    badges = [
        "How do I reset my staff badge?",
        "My staff badge does not open the door, what now?",
        "Where do I get a new staff badge?",
    ]
    chats = ["Tell me a joke about cats.", "What is the weather like?", "Hello, how are you today?"]
    for question in (*badges, badges[0], *chats, "How much is a tin of blue paint?"):
        assert chat(tenant, question, max_tokens=1).json()["imprint"]["reason"] == "below_threshold", question
    assert chat(tenant, max_tokens=1).json()["imprint"]["reason"] == "matched"
    found = tenant.http.get("/v1/feedback/suggestions").json()
    (subject,) = found["data"]
    assert subject["count"] == 4 and subject["question"] in badges and set(subject["examples"]) == set(badges)
    assert subject["first_at"] < subject["last_at"] and found["questions"] == 5, "chat does not count"
    more = tenant.http.get("/v1/feedback/suggestions", params={"least": 5}).json()
    assert more == {"object": "list", "questions": 5, "data": []}
    assert other_tenant.http.get("/v1/feedback/suggestions").json()["data"] == []
    response = tenant.http.get("/v1/feedback/suggestions", params={"least": 1})
    refused(response, 400, "least", "invalid_value")
