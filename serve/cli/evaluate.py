"""`imprint eval`: score what a running server answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.options import DEFAULT_URL, KeyOption, UrlOption
from serve.cli.output import fail, note


def evaluate(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the table and every answer go.")] = (
        Path("benchmarks/results")
    ),
    documents: Annotated[int, typer.Option(min=2, help="Held-out documents for each number of facts.")] = 60,
    hand_written: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines of hand-written documents with questions.")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "",
) -> None:
    """Score a server's answers: base, document in context, adapter, wrong adapter. Needs a tenant's key."""
    if not key:
        fail("no key: put a tenant's key into IMPRINT_KEY (use a tenant made for this: its documents stay)", 2)
    if hand_written is not None and not hand_written.is_file():
        fail(f"there is no file {hand_written}", 2)
    import httpx

    from serve.evaluate import run_evaluation

    try:
        table = run_evaluation(url.rstrip("/").removesuffix("/v1"), key, output, documents, hand_written)
    except httpx.HTTPStatusError as error:
        fail(f"the server refused: {error.response.status_code} {error.response.text}")
    except httpx.TransportError as error:
        fail(f"the connection to {url} broke: {error}")
    typer.echo(table)
    note(f"written to {output}")
