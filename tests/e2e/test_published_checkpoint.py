"""A Doc-to-LoRA checkpoint in the published format: converted, served, and chatted with over HTTP.

Base and hypernetwork are random, so answers mean nothing. What shows is that the document's adapter is made in the
published way, is loaded by the engine, and changes the answer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import make_tenant
from tests.hypernet.published_helpers import Shape, save_doc_to_lora
from tests.server import Server
from tests.tiny_models import make_base

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

SHAPE = Shape(rank=8, layers=2, hidden=64, widths={"down_proj": (128, 64)})


def test_convert_serve_post_chat(own_server: Server, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", max_length=2048)
    save_doc_to_lora(tmp_path / "published" / "pytorch_model.bin", SHAPE)
    converted = subprocess.run(
        [sys.executable, "-c", "from serve.cli import main; main()", "checkpoint", "convert",
         str(tmp_path / "published"), str(tmp_path / "converted"), "--base", str(base), "--chunk-tokens", "128"],
        capture_output=True, text=True, timeout=300)
    assert converted.returncode == 0, converted.stderr
    checkpoint = converted.stdout.strip()

    # Random weights know nothing of a document, and the gate would say so.
    own_server.start(BASE__MODEL=str(base), GENERATOR__CHECKPOINT=checkpoint, GENERATOR__GATE__ENABLED="false")
    tenant = make_tenant(own_server, "acme")
    short = tenant.post("Lamp", "The lamp costs $4.20.")
    long = tenant.post("Rooms", " ".join(f"Room {number} is blue." for number in range(20)))
    adapters = {document["id"]: tenant.http.get(f"/v1/adapters/{document['adapter_id']}").json()
                for document in (short, long)}
    assert adapters[short["id"]]["rank"] == 16  # one chunk and the bias adapter
    chunks = len(adapters[long["id"]]["manifest"]["chunks"])
    assert chunks > 1 and adapters[long["id"]]["rank"] == 8 * (chunks + 1)
    assert adapters[short["id"]]["target_modules"] == ["down_proj"]

    answers = [tenant.ask("What does the lamp cost?", model) for model in ("base", short["id"], long["id"])]
    assert len(set(answers)) == 3, answers
    assert tenant.ask("What does the lamp cost?", short["id"]) == answers[1]
