"""What the processes of one training share: gradients, counts and the wish to stop. One process needs none of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=2)  # writing questions can keep one worker busy long after another


@dataclass(frozen=True)
class Place:
    """This process among the workers: its number, its number on this machine, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment() -> Place:
        """From the variables that torchrun sets too; a single process where they are missing."""
        rank = int(os.environ.get("RANK", 0))
        return Place(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def joined(place: Place, device: torch.device) -> Iterator[None]:
    """Within the context the workers can exchange tensors: NCCL between GPUs, else gloo."""
    if place.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=place.rank, world_size=place.world,
                            timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Return when every worker is here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(parameters: Sequence[Tensor], figures: list[float]) -> list[float]:
    """Sum gradients and figures over the workers; gradients in place, the figures' sums are returned."""
    if not dist.is_initialized():
        return figures
    device = parameters[0].device
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    shared = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return shared.tolist()


class StopWish:
    """Whether SIGINT or SIGTERM came, or the parent process has ended; a step is finished first, so that what is saved
    is whole."""

    def __init__(self) -> None:
        self._heard = False
        self._parent = os.getppid()

    @property
    def asked(self) -> bool:
        """Whether to stop. A worker whose launcher was killed stops too."""
        return self._heard or os.getppid() != self._parent

    @contextmanager
    def listening(self) -> Iterator[StopWish]:
        """Catch both signals within the context; a second one acts as usual. Elsewhere than in the main thread no
        signal is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def hear(_number: int, _frame: FrameType | None) -> None:
            self._heard = True
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, hear)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
