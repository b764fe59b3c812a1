"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import typer


def note(message: str) -> None:
    """Tell the user something that is no result."""
    typer.echo(message, err=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with a message and an exit status."""
    typer.echo(f"imprint: {message}", err=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    """Print one JSON value, readable by people too."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns with two spaces between them. Nothing is cut, so that IDs can be copied and piped."""
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str, keep: str = "") -> str:
    """The text without control characters, which could drive the user's terminal; those in `keep` stay."""
    return "".join(char for char in text if char in keep or not (ord(char) < 32 or 127 <= ord(char) < 160))


def when(timestamp: float | None) -> str:
    """Seconds since the epoch as local date and time; a dash for None."""
    return "-" if timestamp is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))
