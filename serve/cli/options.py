"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_CONFIG = Path("configs/nano.yaml")
DEFAULT_URL = "http://127.0.0.1:8000"

ConfigOption = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="Serve config file that says where the local registry is.")
]
UrlOption = Annotated[
    str, typer.Option("--url", envvar="IMPRINT_URL", metavar="URL", help="Address of the server, without /v1.")
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--key", envvar="IMPRINT_KEY", metavar="KEY", show_envvar=True,
        help="Imprint key. Prefer the variable: other users of the machine can see a command's options.",
    ),
]
TenantOption = Annotated[
    str, typer.Option("--tenant", metavar="NAME", help="Which tenant to act for; needed with a service key only.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
