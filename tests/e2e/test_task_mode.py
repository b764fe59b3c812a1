"""A Text-to-LoRA checkpoint in the published format: converted, served beside nano's document reader, and used over
HTTP with a task description.

Base, network and encoder are random, so answers mean nothing. What shows is that the description's adapter is made by
the network, is loaded by the engine, and changes the answer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import make_tenant
from tests.hypernet.published_helpers import (
    Shape,
    save_doc_to_lora,
    save_text_to_lora,
    text_to_lora_shapes,
    write_encoder,
)
from tests.server import Server
from tests.tiny_models import make_base

pytestmark = [pytest.mark.e2e, pytest.mark.own_server, pytest.mark.timeout(1200)]

DOCUMENTS = Shape(rank=8, layers=2, hidden=64, widths={"down_proj": (128, 64)})
TASKS = text_to_lora_shapes(layers=2, widths={"q_proj": (64, 64), "v_proj": (64, 32)})


def convert(source: Path, destination: Path, base: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from serve.cli import main; main()", "checkpoint", "convert", str(source),
         str(destination), "--base", str(base)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_convert_serve_post_task_chat(own_server: Server, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", max_length=2048)
    save_doc_to_lora(tmp_path / "published" / "pytorch_model.bin", DOCUMENTS)
    documents = convert(tmp_path / "published", tmp_path / "documents", base)
    tasks = convert(save_text_to_lora(tmp_path / "hypermod", TASKS), tmp_path / "tasks", base)

    own_server.start(BASE__MODEL=str(base), GENERATOR__CHECKPOINT=documents, GENERATOR__TASK__CHECKPOINT=tasks,
                     GENERATOR__TASK__ENCODER=str(write_encoder(tmp_path / "encoder")))
    tenant = make_tenant(own_server, "acme")
    made = [tenant.http.post("/v1/documents?wait=60", json={"title": title, "text": text, "mode": "task"})
            for title, text in (("Add", "Add the two numbers."), ("Translate", "Translate the sentence into French."))]
    bodies = [response.json() for response in made]
    # Whether the gate is content with what a random network makes is not at stake here.
    assert all(body["status"] in ("ready", "degraded") for body in bodies), bodies
    adapter = tenant.http.get(f"/v1/adapters/{bodies[0]['adapter_id']}").json()
    assert adapter["rank"] == 4 and sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]

    answers = [tenant.ask("What is 2 + 2?", model) for model in ("base", bodies[0]["id"], bodies[1]["id"])]
    assert len(set(answers)) == 3, answers
    assert tenant.ask("What is 2 + 2?", bodies[0]["id"]) == answers[1]

    long = tenant.http.post("/v1/documents?wait=60", json={"title": "Long", "text": "word " * 500, "mode": "task"})
    assert long.json()["status"] == "failed" and "at most 64 are allowed" in long.text
