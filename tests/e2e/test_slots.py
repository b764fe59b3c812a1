"""Operators see where adapters are; adapters come to the engine before they are asked for, and leave at once."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.e2e.conftest import Tenant
from tests.server import Server

TEXT = "The Lindenhof clinic opens at 08:40. Its ward sister is Ida Brandt."
QUESTION = {"messages": [{"role": "user", "content": "When does the Lindenhof clinic open?"}], "max_tokens": 8}


def place_of(server: Server, adapter_id: str) -> dict[str, Any] | None:
    """The adapter's row in the only replica's list."""
    with server.http(server.admin_key) as admin:
        (replica,) = admin.get("/v1/slots").json()["data"]
    return next((row for row in replica["adapters"] if row["adapter_id"] == adapter_id), None)


def test_a_new_adapter_is_there_before_it_is_asked_for(server: Server, tenant: Tenant) -> None:
    adapter_id = tenant.post("Clinic", TEXT)["adapter_id"]
    ends = time.monotonic() + 20
    while (place := place_of(server, adapter_id)) is None:
        assert time.monotonic() < ends, "the adapter was not prefetched"
        time.sleep(0.2)
    assert place["uses"] == 0
    answer = tenant.http.post("/v1/chat/completions", json={"model": adapter_id, **QUESTION})
    assert answer.status_code == 200
    while (place := place_of(server, adapter_id)) is None or place["users"]:  # the engine ends it after the answer
        assert time.monotonic() < ends + 20
    assert (place["tier"], place["uses"]) == ("slot", 1) and place["load_ms"] > 0
    with server.http(server.admin_key) as admin:
        text = admin.get("/metrics").text
    assert 'imprint_adapters_resident{tier="slot"}' in text and "imprint_adapter_loads_total" in text
    assert adapter_id not in text


def test_a_deleted_adapter_answers_nobody_although_vllm_holds_it(server: Server, tenant: Tenant) -> None:
    document = tenant.post("Clinic", TEXT)
    asked = {"model": document["adapter_id"], **QUESTION}
    assert tenant.http.post("/v1/chat/completions", json=asked).status_code == 200
    assert tenant.http.delete(f"/v1/documents/{document['id']}").status_code in (200, 204)
    assert tenant.http.post("/v1/chat/completions", json=asked).status_code == 404
    routed = tenant.http.post("/v1/chat/completions", json={"model": "imprint", **QUESTION})
    assert routed.json()["imprint"]["adapter_id"] is None
    place = place_of(server, document["adapter_id"])
    assert place is not None and place["tier"] == "slot", "it is dropped later"


@pytest.mark.parametrize("key", ["tenant", "none"])
def test_slots_are_for_operators(server: Server, tenant: Tenant, key: str) -> None:
    with server.http(tenant.key if key == "tenant" else "") as client:
        assert client.get("/v1/slots").status_code == (403 if key == "tenant" else 401)
