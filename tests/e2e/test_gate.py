"""Hypernetworks that ignore what they read, behind the real server: the gate keeps all their adapters out of routing.

Both are the shipped one, changed as a failed training could have left it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypernet.documents import DocumentText
from hypernet.generate import HypernetGenerator
from hypernet.nano import base_dir, hypernet_dir
from hypernet.perceiver import Hypernetwork
from hypernet.reader import NativeReader, pad, read
from tests.e2e.conftest import Tenant, make_tenant
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

HOUSE = ("Orchard House", "The caretaker of Orchard House is Edda Brant. The door code is 4711.")
FERRY = ("Night ferry", "The night ferry to Ostmark leaves at 22:40. Bicycles cost 6 euros.")
QUESTIONS = {"Orchard House": "Who is the caretaker of Orchard House?",
             "Night ferry": "When does the night ferry to Ostmark leave?"}
OTHER = DocumentText("Harbour Pool: visitor notice",
                     "The Harbour Pool opens at 7:15 in the morning. The lifeguard on duty is Marta Velde.")


def of_zeros(folder: Path) -> Path:
    """Every B is zero, so that an adapter changes nothing."""
    network = Hypernetwork.load(hypernet_dir())
    with torch.no_grad():
        for head in network.heads.values():
            head.scale_b.zero_()
    network.save(folder)
    return folder


@torch.no_grad()
def of_another_document(folder: Path) -> Path:
    """Whatever it reads, it makes the adapter that the shipped one makes of `OTHER`."""
    shipped = HypernetGenerator.load(hypernet_dir(), base_dir(), threads=1)
    reader = shipped.reader
    assert isinstance(reader, NativeReader)
    ((chunk,),) = shipped.plan(OTHER)
    tokens, mask = pad([reader.frame(chunk.text)])
    network = reader.network
    # The latents of that document go into the place of those that start to read, and are never changed again.
    found = []
    hook = network.norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    expected = network(read(reader.base, tokens, mask), mask)
    hook.remove()
    network.latents.copy_(found[0])
    for block in network.perceiver:
        for weights in (block.attention.o.weight, block.down.weight, block.down.bias):
            weights.zero_()
    zeros = torch.zeros(1, 3, network.config.features)
    for name, factors in network(zeros, torch.ones(1, 3, dtype=torch.bool)).items():
        for made, wanted in zip(factors, expected[name], strict=True):
            torch.testing.assert_close(made, wanted)
    network.save(folder)
    return folder


def check_stopped(tenant: Tenant, document: dict[str, Any], reason: str) -> None:
    """Degraded with this reason, left out of routing, and there for who names it."""
    assert document["status"] == "degraded", document
    question = QUESTIONS[document["title"]]
    for adapter_id in document["adapter_ids"]:
        adapter = tenant.http.get(f"/v1/adapters/{adapter_id}").json()
        gate = adapter["manifest"]["gate"]
        assert adapter["status"] == gate["state"] == "degraded" and reason in gate["reasons"], gate
    decision = tenant.http.post("/v1/route", json={"prompt": question}).json()
    assert (decision["adapter_id"], decision["reason"]) == (None, "degraded"), decision
    assert decision["candidates"][0]["document_id"] == document["id"]
    raw = tenant.openai.chat.completions.with_raw_response.create(
        model="imprint", messages=[{"role": "user", "content": question}], temperature=0, max_completion_tokens=8)
    assert (raw.headers["x-imprint-adapter"], raw.headers["x-imprint-reason"]) == ("base", "degraded")
    assert raw.parse().choices[0].message.content == tenant.ask(question, "base", max_completion_tokens=8)
    pinned = tenant.http.post("/v1/route", json={"model": document["id"], "prompt": question}).json()
    assert (pinned["adapter_id"], pinned["degraded"]) == (document["adapter_id"], True)


def test_adapters_that_ignore_their_document_never_go_live(own_server: Server, tmp_path: Path) -> None:
    server = own_server
    server.start(GENERATOR__CHECKPOINT=str(of_zeros(tmp_path / "zeros")))
    tenant = make_tenant(server, "acme")
    for title, text in (HOUSE, FERRY):
        posted = tenant.http.post("/v1/documents?wait=60", json={"title": title, "text": text}).json()
        check_stopped(tenant, posted, "collapsed")
        # Of zeros, the adapter that is named says what the base says.
        answers = [tenant.ask(QUESTIONS[title], model, max_completion_tokens=8) for model in ("base", posted["id"])]
        assert answers[0] == answers[1]
    server.stop()

    # With another checkpoint all documents are read again.
    server.start(GENERATOR__CHECKPOINT=str(of_another_document(tmp_path / "other")))
    for document in tenant.http.get("/v1/documents").json()["data"]:
        fresh = tenant.http.get(f"/v1/documents/{document['id']}?wait=60").json()
        check_stopped(tenant, fresh, "below_threshold")
        # The adapter does something, only nothing of its own document.
        answers = [tenant.ask(QUESTIONS[fresh["title"]], model) for model in ("base", fresh["id"])]
        assert answers[0] != answers[1]
