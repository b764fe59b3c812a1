"""`imprint checkpoint`: bring published hypernetworks into a form that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.output import fail, note, printable

app = typer.Typer(no_args_is_help=True, help="Convert published hypernetworks.")


@app.callback()
def group() -> None:
    """Convert published hypernetworks."""


@app.command("convert")
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Doc-to-LoRA pytorch_model.bin, Text-to-LoRA hypermod.pt, or the folder of one."
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; it must be new or empty.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the base it is for; any other base is refused from then on."),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            min=16, metavar="N", help="Doc-to-LoRA: tokens of a document to read at once; 2048 if not given. For "
            "checkpoints that were trained on chunks, the length of those."
        ),
    ] = None,
) -> None:
    """Convert a Doc-to-LoRA or Text-to-LoRA checkpoint to safetensors and JSON, without running code from it.

    Prints the folder, which `generator: {kind: hypernet, checkpoint: DST}` serves if it is Doc-to-LoRA.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from hypernet.published.convert import convert as convert_checkpoint
    from hypernet.published.errors import CheckpointInvalid

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, total=1, completed=1)
                # A bar of unknown length moves; only bytes and the end are counted.
                tasks[stage] = progress.add_task(stage, total=None)
            if done:
                progress.update(tasks[stage], total=total, completed=done)

        try:
            config = convert_checkpoint(source, destination, base, chunk_tokens, report)
        except (CheckpointInvalid, OSError) as error:
            progress.stop()
            fail(printable(str(error)))
    sizes = config.sizes
    note(printable(
        f"{config.to_json()['format']} for {config.base_model}: {sizes.layers} layers, "
        f"{', '.join(target.name for target in sizes.targets)}, rank {sizes.rank}; "
        f"SHA-256 of the source {config.source.sha256}"
    ))
    typer.echo(str(destination))
