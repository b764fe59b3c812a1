"""The training loop that base and hypernetwork share: time budget, gradient accumulation, checkpoints, curves.

The budget is in minutes of wall time, since that is what a machine without an accelerator has; the schedule follows
the share of it that is used up. With several processes each sees its own data and gradients are summed (gloo).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from hypernet.training.optimizer import Optimiser
from hypernet.training.precision import mixed_precision


@dataclass
class StepReport:
    """What one micro-batch gives: the loss as a sum over `count` items, and named sums for the log."""

    loss: Tensor
    count: int
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _sum_gradients(parameters: list[Tensor], count: float, progress: float) -> tuple[float, float]:
    """Sum over processes of gradients and counts; rank 0's progress for all."""
    if not dist.is_initialized():
        return count, progress
    mine = progress if _rank() == 0 else 0.0
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None] + [torch.tensor([count, mine])])
    dist.all_reduce(flat)
    at = 0
    for p in parameters:
        p.grad = flat[at:at + p.numel()].view_as(p)
        at += p.numel()
    return float(flat[-2]), float(flat[-1])


class Checkpoint:
    """Where a training stands: parameters, optimisers, seconds used, steps made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, module: torch.nn.Module, optimiser: Optimiser, seconds: float, step: int) -> None:
        """Write atomically, so that a kill leaves the previous checkpoint whole."""
        partial = self.path.with_suffix(".partial")
        torch.save({"module": module.state_dict(), "optimiser": optimiser.state_dict(), "seconds": seconds,
                    "step": step}, partial)
        partial.replace(self.path)

    def load(self, module: torch.nn.Module, optimiser: Optimiser) -> tuple[float, int]:
        """Restore; seconds and steps so far, zeros where there is no checkpoint."""
        if not self.path.exists():
            return 0.0, 0
        saved = torch.load(self.path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        return float(saved["seconds"]), int(saved["step"])


def run(module: torch.nn.Module, optimiser: Optimiser, micro_batches: Callable[[float, int], Iterable[StepReport]],
        minutes: float, folder: Path, name: str, save_every_s: float = 180.0) -> None:
    """Train `module` until `minutes` are used; `micro_batches(progress, step)` yields one step's losses."""
    checkpoint = Checkpoint(folder / f"{name}.pt")
    used, step = checkpoint.load(module, optimiser)
    begun, saved = time.monotonic() - used, time.monotonic()
    logged: dict[str, list[float]] = {}
    curve = folder / f"{name}.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, disable=_rank() != 0, refresh_per_second=1) as bar:
        task = bar.add_task(f"training {name}", total=minutes * 60, loss="")
        progress = used / (minutes * 60)
        while progress < 1.0:
            total, loss = 0, 0.0
            reports = iter(micro_batches(progress, step))
            while True:
                with mixed_precision():
                    report = next(reports, None)
                if report is None:
                    break
                report.loss.backward()
                loss += float(report.loss.detach())
                total += report.count
                for key, (value, items) in report.sums.items():
                    entry = logged.setdefault(key, [0.0, 0.0])
                    entry[0] += value
                    entry[1] += items
            here = (time.monotonic() - begun) / (minutes * 60)
            count, progress = _sum_gradients(optimiser.parameters, float(total), here)
            for p in optimiser.parameters:
                if p.grad is not None:
                    p.grad /= max(count, 1.0)
            norm = optimiser.step(min(progress, 1.0))
            step += 1
            if _rank() == 0:
                seconds = time.monotonic() - begun
                bar.update(task, completed=seconds, loss=f"step {step} loss {loss / max(total, 1):.3f}")
                if step % 20 == 0:
                    entry_line = {"step": step, "seconds": round(seconds), "norm": round(norm, 3)} | {
                        key: round(value / max(number, 1e-9), 4) for key, (value, number) in logged.items()}
                    with curve.open("a") as file:
                        file.write(json.dumps(entry_line) + "\n")
                    logged.clear()
                if time.monotonic() - saved > save_every_s or progress >= 1.0:
                    checkpoint.save(module, optimiser, seconds, step)
                    saved = time.monotonic()
