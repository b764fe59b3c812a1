"""`imprint train`: train a hypernetwork for a base that exists, or nano from scratch."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.cli.output import fail, note, printable

app = typer.Typer(no_args_is_help=True, help="Train a hypernetwork for a base, or nano from scratch.")

_DATA, _NETWORK, _LENGTH, _MACHINE = "Data", "Network", "Length and curriculum", "Machine"


@app.callback(invoke_without_command=True)
def base(
    context: typer.Context,
    base: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_NAME", help="The base: a folder, 'nano', or a name in Hugging Face's cache."),
    ] = None,
    documents: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Text to train on: a file, a .jsonl file with `text` and `title` in each line, or a folder of such. "
            "May be given several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The result. A training found there goes on where it stood.")
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens of a passage, which one adapter is made of.", rich_help_panel=_DATA)
    ] = 256,
    questions: Annotated[int, typer.Option(help="Questions on each passage.", rich_help_panel=_DATA)] = 6,
    question_source: Annotated[
        str,
        typer.Option(
            help="Who writes the questions: base, templates, or auto (templates where the base gives too few).",
            rich_help_panel=_DATA,
        ),
    ] = "auto",
    answer_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most.", rich_help_panel=_DATA)
    ] = 48,
    held_out: Annotated[
        float, typer.Option(help="Share of the documents to evaluate on, never trained on.", rich_help_panel=_DATA)
    ] = 0.1,
    targets: Annotated[
        str, typer.Option(help="Modules that get a LoRA, with commas between.", rich_help_panel=_NETWORK)
    ] = "down_proj",
    rank: Annotated[int, typer.Option(help="Rank of one passage's adapter.", rich_help_panel=_NETWORK)] = 8,
    width: Annotated[int, typer.Option(help="Width of the hypernetwork.", rich_help_panel=_NETWORK)] = 512,
    heads: Annotated[int, typer.Option(help="Attention heads; divides the width.", rich_help_panel=_NETWORK)] = 8,
    steps: Annotated[int, typer.Option(help="Steps in all; raise it to train longer.", rich_help_panel=_LENGTH)] = (
        20_000
    ),
    warmup_steps: Annotated[int, typer.Option(help="Steps to the full rate.", rich_help_panel=_LENGTH)] = 200,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of AdamW.", rich_help_panel=_LENGTH)] = 3e-4,
    batch_chunks: Annotated[
        int, typer.Option(help="Passages in one pass; memory grows with it.", rich_help_panel=_LENGTH)
    ] = 8,
    accumulation: Annotated[int, typer.Option(help="Passes in one step.", rich_help_panel=_LENGTH)] = 2,
    single_share: Annotated[
        float,
        typer.Option(help="Share of the steps with one passage an adapter; then several.", rich_help_panel=_LENGTH),
    ] = 0.8,
    most_chunks: Annotated[
        int, typer.Option(help="Passages joined in one adapter, at most.", rich_help_panel=_LENGTH)
    ] = 4,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps from one evaluation to the next.", rich_help_panel=_LENGTH)
    ] = 500,
    save_every: Annotated[
        int, typer.Option(help="Steps from one saved state to the next.", rich_help_panel=_LENGTH)
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of the start, the split and the order.", rich_help_panel=_LENGTH)] = 0,
    workers: Annotated[
        int, typer.Option(help="Processes on this machine; with GPUs each takes one.", rich_help_panel=_MACHINE)
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_MACHINE)] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="auto (bfloat16 where it is faster), float32 or bfloat16.", rich_help_panel=_MACHINE),
    ] = "auto",
) -> None:
    """Train a hypernetwork for a base: `imprint train --base DIR --documents PATH --out DIR`.

    The base writes questions on the documents and answers them with the document in its prompt; the hypernetwork learns
    to make adapters that answer the same way without it. Ctrl-C saves; the same command goes on. Prints the folder of
    the result, which `generator: {kind: hypernet, checkpoint: DIR}` serves.
    """
    if context.invoked_subcommand is not None:
        return
    missing = [name for name, value in (("--base", base), ("--documents", documents), ("--out", out)) if not value]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)}: needed to train a hypernetwork (or name a command: nano)")
    values: dict[str, Any] = {**context.params, "out": str(out), "documents": tuple(map(str, documents or ())),
                              "targets": tuple(name.strip() for name in targets.split(",") if name.strip())}
    _train(values)


def _train(values: dict[str, Any]) -> None:
    from hypernet.adaptation.launch import train
    from hypernet.adaptation.settings import AdaptationSettings, TrainingInputError
    from hypernet.adaptation.trainer import TrainingDiverged

    try:
        known = {field.name for field in fields(AdaptationSettings)}
        settings = AdaptationSettings(**{key: value for key, value in values.items() if key in known})
        done = train(settings, lambda text: note(printable(text)))
    except TrainingInputError as error:
        fail(printable(str(error)), 2)
    except (TrainingDiverged, RuntimeError, OSError) as error:
        fail(printable(str(error)))
    evaluation = done.evaluation
    if done.steps < done.wanted or evaluation is None:
        note(f"stopped at step {done.steps} of {done.wanted}; the same command goes on")
        raise typer.Exit(130)
    ways = evaluation.log_probability
    note(f"held-out documents, log-probability of a token: {ways.matched:.3f} with the document's adapter, "
         f"{ways.wrong:.3f} with another's, {ways.base:.3f} without, {ways.in_context:.3f} with the document in the "
         f"prompt; {done.folder / 'README.md'} says more")
    typer.echo(str(done.folder))


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
