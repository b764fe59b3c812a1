"""Another base and hypernetwork under a server's documents: after the restart all are made anew and answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import make_tenant
from tests.server import Server
from tests.tiny_pair import make_pair

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

# The tiny pair is random, so no gate would let its adapters pass.
UNGATED = {"GENERATOR__GATE__ENABLED": "false", "GENERATOR__REFINE__ENABLED": "false"}
QUESTION = "Who is the caretaker of Orchard House?"


def test_a_swapped_pair_regenerates_live_documents(own_server: Server, tmp_path: Path) -> None:
    server = own_server
    server.start(**UNGATED)
    tenant = make_tenant(server, "acme")
    posted = [tenant.post(f"House {number}", f"The caretaker of House {number} is Edda Brant.") for number in range(4)]
    server.stop()

    base, checkpoint = make_pair(tmp_path / "pair", seed=3)
    server.start(BASE__MODEL=str(base), GENERATOR__CHECKPOINT=str(checkpoint), **UNGATED)
    deadline = time.monotonic() + 120
    while True:
        now: dict[str, Any] = {document["id"]: document for document in tenant.http.get("/v1/documents").json()["data"]}
        assert set(now) == {document["id"] for document in posted}
        if all(document["status"] == "ready" for document in now.values()):
            break
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    for document in posted:
        fresh = now[document["id"]]["adapter_id"]
        assert fresh != document["adapter_id"]
        adapter = tenant.http.get(f"/v1/adapters/{fresh}").json()
        old = tenant.http.get(f"/v1/adapters/{document['adapter_id']}").json()
        assert adapter["base_fingerprint"] != old["base_fingerprint"] and old["status"] == "stale"
        # The engine takes it; what a random model says means nothing.
        tenant.ask(QUESTION, document["id"], max_completion_tokens=4)
