"""kill -9 of everything between 202 and ready, and restarts."""

from __future__ import annotations

import time

import pytest

from tests.e2e.conftest import make_tenant
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

TEXT = "The caretaker of Orchard House is Edda Brant."
QUESTION = "Who is the caretaker of Orchard House?"


def test_killed_between_accepted_and_ready(own_server: Server) -> None:
    server = own_server
    server.start(GENERATOR__HOLD_AT="generated")
    tenant = make_tenant(server, "acme")
    response = tenant.http.post("/v1/documents", json={"title": "Orchard House", "text": TEXT})
    assert response.status_code == 202
    posted = response.json()
    deadline = time.monotonic() + 60
    while tenant.http.get(f"/v1/jobs/{posted['job_id']}").json()["stage"] != "generated":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = tenant.http.get(f"/v1/documents/{posted['id']}?wait=1").json()
    assert before["status"] == "processing" and before["adapter_id"] is None
    assert tenant.http.get("/v1/adapters").json()["data"] == []
    server.kill()

    server.start()
    after = tenant.http.get(f"/v1/documents/{posted['id']}?wait=60").json()
    assert after["status"] == "ready", after
    assert after["job"]["attempts"] == 2
    assert len(tenant.http.get("/v1/adapters").json()["data"]) == 1
    others = [tenant.post(f"House {number}", f"House {number} has {number + 3} rooms.") for number in range(3)]
    adapters = [after["adapter_id"], *(other["adapter_id"] for other in others)]
    answers = [tenant.ask(QUESTION, adapter) for adapter in adapters]
    routed = tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()
    assert routed["adapter_id"] == after["adapter_id"]
    server.kill()

    server.start()
    assert [tenant.ask(QUESTION, adapter) for adapter in adapters] == answers
    assert tenant.http.post("/v1/route", json={"prompt": QUESTION}).json()["adapter_id"] == after["adapter_id"]
    # The first admin key was printed once, and is still good.
    assert server.output().count("First admin key") == 1
    server.create_key("globex")
    # Checks that SIGTERM ends it in order and leaves nothing behind.
    server.stop()
