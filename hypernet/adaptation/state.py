"""Where a training stands, as a file, and its curves, cut back to that point when it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from hypernet.adaptation.settings import TrainingInputError


class State:
    """`state.pt`: network, optimiser, random numbers, position in the data, steps made."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.pt"

    def save(self, network: torch.nn.Module, optimiser: torch.optim.Optimizer, position: dict[str, int], step: int,
             corpus: str) -> None:
        """Write it whole or not at all, so that a kill leaves the previous one."""
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "position": position,
                        "random": torch.get_rng_state(), "step": step, "corpus": corpus}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def load(self, network: torch.nn.Module, optimiser: torch.optim.Optimizer,
             corpus: str) -> tuple[int, dict[str, int] | None]:
        """Restore; the steps made and the position, or 0 and None where nothing was saved.

        Raises TrainingInputError where the documents are others than those of the saved training.
        """
        if not self.path.exists():
            return 0, None
        saved: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
        if saved["corpus"] != corpus:
            raise TrainingInputError(f"documents: are others than those that the training in {self.path.parent.parent} "
                                     "began with; give the same ones, or another out folder")
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["random"])
        return int(saved["step"]), dict(saved["position"])


class Curve:
    """A file of JSON objects, one a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().split("\n")[:-1]]

    def keep_until(self, step: int) -> None:
        """Drop what was written after the state that the training goes on from."""
        kept = [line for line in self.read() if line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)

    def add(self, line: dict[str, Any]) -> None:
        """Append one object."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
