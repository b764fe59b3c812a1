"""The `imprint` command: one module for each group of subcommands."""

from serve.cli.application import app, main

__all__ = ["app", "main"]
