"""Isolation, versions, idempotency, deletion and disconnects on the real server."""

from __future__ import annotations

import threading
import time

import openai
import pytest

from tests.e2e.conftest import Tenant
from tests.server import Server

pytestmark = pytest.mark.e2e

TITLE = "Staff notice: Orchard House"
TEXT = "The caretaker of Orchard House is {name}. The door code is {code}."
QUESTION = "Who is the caretaker of Orchard House?"


def test_tenants_do_not_reach_each_other(tenant: Tenant, other_tenant: Tenant) -> None:
    mine = tenant.post(TITLE, TEXT.format(name="Edda Brant", code=4711), external_id="house", collection="c")
    theirs = other_tenant.post(TITLE, TEXT.format(name="Olaf Pries", code=9032), external_id="house")
    assert mine["id"] != theirs["id"] and mine["adapter_id"] != theirs["adapter_id"]
    for name in (mine["id"], mine["adapter_id"], mine["collection_id"]):
        with pytest.raises(openai.NotFoundError):
            other_tenant.ask(QUESTION, name)
    for path in (f"documents/{mine['id']}", f"adapters/{mine['adapter_id']}", f"jobs/{mine['job_id']}"):
        assert other_tenant.http.get(f"/v1/{path}").status_code == 404
    assert other_tenant.http.delete(f"/v1/documents/{mine['id']}").status_code == 404
    for who, document in ((tenant, mine), (other_tenant, theirs)):
        decision = who.http.post("/v1/route", json={"prompt": QUESTION}).json()
        assert decision["adapter_id"] == document["adapter_id"]
        assert [candidate["document_id"] for candidate in decision["candidates"]] == [document["id"]]


def test_mixed_requests_answer_as_alone(tenant: Tenant, other_tenant: Tenant) -> None:
    mine = tenant.post(TITLE, TEXT.format(name="Edda Brant", code=4711))
    theirs = other_tenant.post(TITLE, TEXT.format(name="Olaf Pries", code=9032))
    jobs = [(tenant, mine["id"]), (other_tenant, theirs["id"]), (tenant, "base"), (other_tenant, "base")]
    alone = [who.ask(QUESTION, model) for who, model in jobs]
    answers: list[str] = [""] * (4 * len(jobs))

    def ask(index: int) -> None:
        who, model = jobs[index % len(jobs)]
        answers[index] = who.ask(QUESTION, model)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone * 4


def test_new_version(tenant: Tenant) -> None:
    first = tenant.post(TITLE, TEXT.format(name="Edda Brant", code=4711))
    response = tenant.http.put(
        f"/v1/documents/{first['id']}?wait=60", json={"title": TITLE, "text": TEXT.format(name="Ivo Kern", code=1200)}
    )
    assert response.status_code == 200
    second = response.json()
    assert second["id"] == first["id"] and second["current_version"] == 2
    assert second["adapter_id"] != first["adapter_id"]
    # The next request sees it, without any pause.
    decision = tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()
    assert decision["adapter_id"] == second["adapter_id"]
    assert tenant.ask(QUESTION) == tenant.ask(QUESTION, second["adapter_id"])
    # The old version stays usable by its adapter's name.
    tenant.ask(QUESTION, first["adapter_id"])
    same = tenant.post(TITLE, TEXT.format(name="Ivo Kern", code=1200))
    assert same["id"] == first["id"] and not same["created"]


def test_known_external_id_makes_a_version(tenant: Tenant) -> None:
    # What the gate thinks of so little text is not at stake here.
    first, second = (tenant.post(TITLE, f"The code is {number}.", external_id="e", states=("ready", "degraded"))
                     for number in (1, 2))
    assert second["id"] == first["id"] and second["version"] == 2


def test_idempotency_key(tenant: Tenant) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"title": TITLE, "text": "The code is 1."}
    answers = [tenant.http.post("/v1/documents", json=body, headers=headers).json() for _ in range(3)]
    assert len({answer["job_id"] for answer in answers}) == 1
    conflict = tenant.http.post("/v1/documents", json={"text": "Another."}, headers=headers)
    assert conflict.status_code == 409 and conflict.json()["error"]["param"] == "Idempotency-Key"


def test_delete_is_seen_by_the_next_request(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT.format(name="Edda Brant", code=4711))
    assert tenant.ask(QUESTION)
    assert tenant.http.delete(f"/v1/documents/{document['id']}").status_code == 200
    decision = tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()
    assert decision["adapter_id"] is None and decision["reason"] == "no_candidates"
    with pytest.raises(openai.NotFoundError):
        tenant.ask(QUESTION, document["adapter_id"])
    assert tenant.http.get(f"/v1/documents/{document['id']}").status_code == 404


def test_many_documents_at_once_more_than_slots(tenant: Tenant) -> None:
    texts = [f"The rent of flat {number} in Mill Street is {300 + number} euros a month." for number in range(24)]
    posted = [
        tenant.http.post("/v1/documents", json={"title": f"Mill Street, flat {number}", "text": text}).json()
        for number, text in enumerate(texts)
    ]
    deadline = time.monotonic() + 120
    for document in posted:
        left = max(0.0, min(60.0, deadline - time.monotonic()))
        ready = tenant.http.get(f"/v1/documents/{document['id']}", params={"wait": left}).json()
        assert ready["status"] == "ready", ready
    errors: list[BaseException] = []

    def ask(document_id: str) -> None:
        try:
            tenant.ask("What is the rent?", document_id, max_completion_tokens=8)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(document["id"],)) for document in posted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_disconnect_ends_generation(server: Server, tenant: Tenant) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "count"}],
        "max_tokens": 1900,
        "ignore_eos": True,
    }
    with tenant.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    await_idle(server)
    # Without a stream the client leaves while nothing has been sent yet.
    with server.http(tenant.key) as client, pytest.raises(openai.APITimeoutError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=tenant.key, max_retries=0, http_client=client).with_options(
            timeout=0.3
        ).chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "count"}],
            max_tokens=1900,
            extra_body={"ignore_eos": True},
        )
    await_idle(server)


def await_idle(server: Server) -> None:
    """Wait, less long than the answer would take, until the engine runs nothing."""
    started = time.monotonic()
    while server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() - started < 2, "still generating for a client that has left"
        time.sleep(0.05)
