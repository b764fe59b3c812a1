"""Puts the command groups together. Heavy imports (torch, Ray, vLLM) stay inside the commands that need them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from serve.cli import chat, checkpoint, diagnose, documents, evaluate, keys, policy, route, server, train

app = typer.Typer(
    name="imprint",
    help="Post a document, chat with its facts out of the weights.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables would print keys.
    pretty_exceptions_show_locals=False,
)
app.command("serve")(server.serve)
app.add_typer(keys.app, name="key")
app.add_typer(documents.app, name="document")
app.command("chat")(chat.chat)
app.command("route")(route.route)
app.add_typer(policy.app, name="policy")
app.add_typer(train.app, name="train")
app.add_typer(checkpoint.app, name="checkpoint")
app.command("eval")(evaluate.evaluate)
app.command("doctor")(diagnose.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("imprint"))
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Post a document, chat with its facts out of the weights."""


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="imprint")
