"""The training loop: budgets, checkpoints that go on, several processes that agree."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hypernet.training import loop
from tests.hypernet.loop_worker import losses, model_and_optimiser

ROOT = Path(__file__).parents[2]


class Killed(RuntimeError):
    """Stands for the end of the process in the middle of a training."""


def train(folder: Path, minutes: float, kill_at: int | None = None,
          seen: list[tuple[float, int]] | None = None) -> tuple[torch.nn.Linear, list[tuple[float, int]]]:
    """A training; the model, and the (progress, step) that it was asked for, which go into `seen` too."""
    model, optimiser = model_and_optimiser()
    seen = [] if seen is None else seen

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        if step == kill_at:
            raise Killed
        seen.append((progress, step))
        time.sleep(0.01)
        yield from losses(model, step)

    loop.run(model, optimiser, steps, minutes, folder, "tiny", save_every_s=0.0)
    return model, seen


def test_training_uses_its_budget_and_learns(tmp_path: Path) -> None:
    begun = time.monotonic()
    model, seen = train(tmp_path, minutes=1.0 / 60)
    assert time.monotonic() - begun > 0.9
    assert [step for _, step in seen] == list(range(len(seen))) and len(seen) > 3
    progress = [share for share, _ in seen]
    assert progress[0] == 0.0 and progress == sorted(progress) and progress[-1] < 1
    with torch.no_grad():
        before, after = (sum(float(report.loss) for report in losses(which, 0))
                         for which in (model_and_optimiser()[0], model))
    assert after < before
    lines = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20 * (i + 1) for i in range(len(seen) // 20)]
    assert all(line["square"] > 0 and line["norm"] > 0 for line in lines)


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    """The budget is too large to be used up here, however slow the machine."""
    with pytest.raises(Killed):
        train(tmp_path, minutes=1.0, kill_at=12)
    model, optimiser = model_and_optimiser()
    seconds, step = loop.Checkpoint(tmp_path / "tiny.pt").load(model, optimiser)
    assert step == 12 and 0.1 < seconds < 60
    assert not torch.equal(model.weight, model_and_optimiser()[0].weight)
    seen: list[tuple[float, int]] = []
    with pytest.raises(Killed):
        train(tmp_path, minutes=1.0, kill_at=15, seen=seen)
    assert [step for _, step in seen] == [12, 13, 14]
    assert seen[0][0] == pytest.approx(seconds / 60, abs=1e-6) and seen[1][0] > seen[0][0]
    more, step = loop.Checkpoint(tmp_path / "tiny.pt").load(model, optimiser)
    assert step == 15 and more > seconds
    assert not (tmp_path / "tiny.partial").exists()


def test_a_finished_training_makes_no_step_and_keeps_its_result(tmp_path: Path) -> None:
    model, _ = train(tmp_path, minutes=0.3 / 60)
    again, seen = train(tmp_path, minutes=0.3 / 60)
    assert seen == [] and torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)


def test_a_checkpoint_restores_all(tmp_path: Path) -> None:
    checkpoint = loop.Checkpoint(tmp_path / "x.pt")
    model, optimiser = model_and_optimiser()
    assert checkpoint.load(model, optimiser) == (0.0, 0)
    for report in losses(model, 1):
        report.loss.backward()
    optimiser.step(0.5)
    checkpoint.save(model, optimiser, 12.5, 7)
    other, fresh = model_and_optimiser()
    assert checkpoint.load(other, fresh) == (12.5, 7)
    assert torch.equal(other.weight, model.weight)
    buffers = [part.parts[0].state_dict()["state"][0]["momentum_buffer"] for part in (optimiser, fresh)]
    assert torch.equal(*buffers) and buffers[0].abs().max() > 0


def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    children = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                    "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "tests.hypernet.loop_worker", str(tmp_path), str(1.0 / 60)]
        children.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert int(first["steps"]) == int(second["steps"]) >= 2
    assert torch.equal(first["weight"], second["weight"]) and torch.equal(first["bias"], second["bias"])
    assert not torch.equal(first["weight"], model_and_optimiser()[0].weight)
    saved = torch.load(tmp_path / "shared.pt", weights_only=True)
    assert saved["step"] == int(first["steps"]) and torch.equal(saved["module"]["weight"], first["weight"])
