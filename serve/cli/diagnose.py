"""`imprint doctor`: what this machine has, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.options import DEFAULT_CONFIG, JsonOption
from serve.cli.output import print_json

_MARKS = {"ok": "ok     ", "note": "note   ", "warning": "WARNING", "problem": "PROBLEM"}


def doctor(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file to check.")] = DEFAULT_CONFIG,
    as_json: JsonOption = False,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Plan for a GPU with so much memory, in GiB, instead of those here.")
    ] = None,
) -> None:
    """Say what this machine has and whether it can serve; exit status 1 when it cannot."""
    from serve.doctor import examine

    findings = examine(config, gpu_memory_gib)
    if as_json:
        print_json([{"level": item.level, "topic": item.topic, "text": item.text} for item in findings])
    else:
        for item in findings:
            typer.echo(f"{_MARKS[item.level]}  {item.topic:<8}  {item.text}")
    problems = sum(item.level == "problem" for item in findings)
    if not as_json:
        warnings = sum(item.level == "warning" for item in findings)
        typer.echo("")
        if problems:
            typer.echo(f"This machine cannot serve {config}: {problems} problem(s) above.")
        else:
            typer.echo(f"This machine can serve {config}" + (f", with {warnings} warning(s)." if warnings else "."))
    if problems:
        raise typer.Exit(1)
