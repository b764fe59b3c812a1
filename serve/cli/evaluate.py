"""`imprint eval`: score what a server with the shipped weights answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the results go.")] = (
        Path("benchmarks/results/eval.json")
    ),
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents for each number of facts.")] = 100,
) -> None:
    """Score the answers of vLLM with exported adapters: base, document in context, adapter, wrong adapter."""
    from serve.evaluate import run_evaluation

    run_evaluation(output, documents)
