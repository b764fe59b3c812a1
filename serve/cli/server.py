"""`imprint serve`: start the server of a config file in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.options import DEFAULT_CONFIG
from serve.cli.output import fail
from serve.config import ConfigError, load_serve_file


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Ray Serve config file.")] = DEFAULT_CONFIG,
) -> None:
    """Start the server and run until Ctrl-C or SIGTERM."""
    try:
        load_serve_file(config)
    except ConfigError as error:
        fail(str(error), 2)
    from serve import launcher

    launcher.run(config)
