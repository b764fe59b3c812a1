"""One process of a training of several: `python -m tests.hypernet.loop_worker FOLDER MINUTES` (see test_loop.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hypernet.training import loop
from hypernet.training.optimizer import Optimiser


def model_and_optimiser() -> tuple[torch.nn.Linear, Optimiser]:
    """A linear layer of fixed start."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return model, Optimiser([model.weight], [model.bias], muon_lr=0.02, adam_lr=0.01)


def losses(model: torch.nn.Linear, seed: int) -> Iterator[loop.StepReport]:
    """Two micro-batches of a regression, other data for each seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x.flip(1)).square().sum()
        yield loop.StepReport(loss, 8, {"square": (float(loss.detach()), 8)})


def main(folder: Path, minutes: float) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model, optimiser = model_and_optimiser()
    made = 0

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        nonlocal made
        made = step + 1
        yield from losses(model, seed=1000 * rank + step)

    loop.run(model, optimiser, steps, minutes, folder, "shared")
    save_file({"weight": model.weight.detach(), "bias": model.bias.detach(), "steps": torch.tensor(made)},
              folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
