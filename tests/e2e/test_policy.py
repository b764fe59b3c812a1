"""A routing policy on the real server: checked, put in force, followed by the next request, rolled back."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.conftest import Tenant

pytestmark = pytest.mark.e2e

TITLE = "Staff notice: Orchard House"
TEXT = "The caretaker of Orchard House is Edda Brant. The door code is 4711."
QUESTION = "Who is the caretaker of Orchard House?"
POLICY = """version: 1
rules:
  - name: drafts are for staff
    when: candidate.metadata["stage"] == "draft" and request.headers["x-role"] != "staff"
    forbid: true
"""
YAML = {"Content-Type": "application/yaml"}


def chat(tenant: Tenant, role: str = "guest") -> dict[str, Any]:
    """The whole answer to the question."""
    body = {"model": "imprint", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "explain": True}
    response = tenant.http.post("/v1/chat/completions", json=body, headers={"X-Role": role})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_policy_is_followed_by_the_next_request(tenant: Tenant) -> None:
    document = tenant.post(TITLE, TEXT, metadata={"stage": "draft"})
    before = chat(tenant)
    assert before["imprint"]["adapter_id"] == document["adapter_id"]

    deadline = time.monotonic() + 30  # decisions are recorded off the request path
    while True:
        check = tenant.http.post("/v1/policy/check", content=POLICY, headers=YAML).json()
        if check["compared"] or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert (check["compared"], check["changed"]) == (1, 1), check
    (change,) = check["changes"]
    assert (change["before"]["adapter_id"], change["after"]["reason"]) == (document["adapter_id"], "policy_forbids")
    assert chat(tenant)["imprint"]["adapter_id"] == document["adapter_id"]

    saved = tenant.http.put("/v1/policy", content=POLICY, headers=YAML)
    assert saved.json()["version"] == 1, saved.text
    after = chat(tenant)["imprint"]
    assert (after["adapter_id"], after["reason"]) == (None, "policy_forbids")
    (step,) = after["explain"]["policy"]
    assert (step["rule"], step["documents"]) == ("drafts are for staff", [document["id"]])
    assert chat(tenant, role="staff")["imprint"]["adapter_id"] == document["adapter_id"]
    decision = tenant.http.post("/v1/route", json={"prompt": QUESTION}, headers={"X-Role": "guest"}).json()
    assert decision["reason"] == "policy_forbids"

    assert tenant.http.put("/v1/policy", content="version: 1\nrules: []\n", headers=YAML).json()["version"] == 2
    assert chat(tenant)["imprint"]["adapter_id"] == document["adapter_id"]
    assert tenant.http.post("/v1/policy/rollback", json={}).json()["version"] == 3
    assert chat(tenant)["imprint"]["reason"] == "policy_forbids"


def test_a_mistake_is_refused_with_its_place(tenant: Tenant) -> None:
    response = tenant.http.put("/v1/policy", content=POLICY.replace("candidate", "candidat"), headers=YAML)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "rules.0.when" and "line 4, column 11" in error["message"]
    assert tenant.http.get("/v1/policy").status_code == 404
