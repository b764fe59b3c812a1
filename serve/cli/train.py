"""`imprint train`: train a base model and its hypernetwork."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from serve.cli.output import note

app = typer.Typer(no_args_is_help=True, help="Train models.")


@app.callback()
def group() -> None:
    """Train models."""


@app.command("nano")
def nano(
    work: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoints, logs and results; resumed if it exists.")] = (
        Path("runs/nano")
    ),
    base_minutes: Annotated[float, typer.Option(min=0, help="Time for the base alone.")] = 60.0,
    joint_minutes: Annotated[float, typer.Option(min=0, help="Time for base and hypernetwork together.")] = 100.0,
    hypernet_minutes: Annotated[float, typer.Option(min=0, help="Time for the hypernetwork, base frozen.")] = 20.0,
    processes: Annotated[int, typer.Option(min=0, help="Worker processes; 0: as many as this process has CPUs.")] = 0,
) -> None:
    """Train nano from scratch, on documents that a generator makes. Takes hours; stop and start it as you like."""
    from hypernet.training.nano import train_nano

    note(f"training nano in {work}")
    train_nano(work, base_minutes, joint_minutes, hypernet_minutes, processes or len(os.sched_getaffinity(0)))
