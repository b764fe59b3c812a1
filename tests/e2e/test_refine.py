"""Instant, then better, over HTTP: adapters go live at once, gradient steps improve them, and the better ones take
their place.

The checkpoint is the shipped one with weaker adapters, so that there is something left to gain, however good it is.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hypernet.nano import hypernet_dir
from hypernet.perceiver import Hypernetwork
from tests.e2e.conftest import Tenant, make_tenant
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

STRENGTH = 0.2
DOCUMENTS = {
    "Orchard House": ("The caretaker of Orchard House is Edda Brant. The door code is 4711.",
                      "Who is the caretaker of Orchard House?"),
    "Night ferry": ("The night ferry to Ostmark leaves at 22:40. Bicycles cost 6 euros.",
                    "When does the night ferry to Ostmark leave?"),
    "Harbour Pool: visitor notice": ("The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta "
                                     "Velde.", "When does the Harbour Pool open?"),
}


def weaker(folder: Path) -> Path:
    """The shipped hypernetwork with updates of a fraction of their size."""
    network = Hypernetwork.load(hypernet_dir())
    with torch.no_grad():
        for head in network.heads.values():
            head.scale_b.mul_(STRENGTH)
    network.save(folder)
    return folder


def adapters_of(tenant: Tenant, document: dict[str, Any]) -> list[dict[str, Any]]:
    return [tenant.http.get(f"/v1/adapters/{adapter_id}").json() for adapter_id in document["adapter_ids"]]


def test_refined_adapters_take_the_place_of_the_first_ones(own_server: Server, tmp_path: Path) -> None:
    server = own_server
    server.start(GENERATOR__CHECKPOINT=str(weaker(tmp_path / "weaker")), GENERATOR__REFINE__ENABLED="true",
                 GENERATOR__REFINE__AFTER_S="0", GENERATOR__REFINE__BUDGET_S="30")
    tenant = make_tenant(server, "acme")
    posted = {}
    for title, (text, _) in DOCUMENTS.items():
        # Instant: the job ends with the hypernetwork's adapter, whatever the gate says of so weak a one.
        response = tenant.http.post("/v1/documents?wait=60", json={"title": title, "text": text})
        assert response.status_code == 200 and response.json()["job"]["status"] == "succeeded", response.text
        posted[title] = response.json()

    deadline = time.monotonic() + 180
    while server.metric("imprint_refine_jobs", state="succeeded") < len(DOCUMENTS):
        assert time.monotonic() < deadline, server.output()
        time.sleep(0.5)

    better = 0
    for title, (_, question) in DOCUMENTS.items():
        now = tenant.http.get(f"/v1/documents/{posted[title]['id']}").json()
        assert now["job_id"] == posted[title]["job_id"], "a refinement is no job of the document"
        if now["adapter_ids"] == posted[title]["adapter_ids"]:
            continue
        (before,), (after,) = adapters_of(tenant, posted[title]), adapters_of(tenant, now)
        assert after["manifest"]["refined"]["from"] == before["id"] and after["manifest"]["refined"]["steps"] > 0
        assert now["status"] == after["status"] == "ready"
        gates = before["manifest"]["gate"], after["manifest"]["gate"]
        assert gates[0]["state"] == "degraded" or gates[1]["score"] > gates[0]["score"], gates
        decision = tenant.http.post("/v1/route", json={"prompt": question}).json()
        assert (decision["adapter_id"], decision["reason"]) == (after["id"], "matched"), decision
        # The engine takes the new adapter, and the old one stays there for who names it.
        assert tenant.ask(question) == tenant.ask(question, after["id"])
        tenant.ask(question, before["id"], max_completion_tokens=4)
        better += 1
    assert better >= 2, f"{better} of {len(DOCUMENTS)} became better"
