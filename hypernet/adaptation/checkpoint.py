"""The result of a training as a folder: `model.safetensors`, and `config.json` with the frame it was trained with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hypernet.perceiver import HypernetConfig, Hypernetwork, Target
from hypernet.published.errors import CheckpointInvalid
from hypernet.published.frames import Frame
from hypernet.published.shapes import check

FORMAT = "perceiver"
VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class AdaptedConfig:
    """What `config.json` says: the base's name, the text around a document, the network, the training's length."""

    base_model: str
    frame: Frame
    network: HypernetConfig
    steps: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"format": FORMAT, "format_version": VERSION, **asdict(self)}


def save_checkpoint(folder: Path, network: Hypernetwork, base_model: str, frame: Frame, steps: int) -> None:
    """Write both files; each takes the place of its predecessor in one step, the configuration last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AdaptedConfig(base_model, frame, network.config, steps)
    partial = folder / f".{WEIGHTS}.partial"
    save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, partial)
    os.replace(partial, folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(json.dumps(config.to_json(), indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def load_checkpoint(folder: Path) -> tuple[Hypernetwork, AdaptedConfig]:
    """The network in float32 and evaluation mode. Raises CheckpointInvalid, naming the file and what is wrong."""
    try:
        values = json.loads((folder / CONFIG).read_text())
        if values["format"] != FORMAT or values["format_version"] != VERSION:
            raise CheckpointInvalid(f"{folder / CONFIG}: has the format '{values['format']}', version "
                                    f"{values['format_version']}; '{FORMAT}', version {VERSION} is needed")
        sizes = dict(values["network"])
        sizes["targets"] = tuple(Target(**target) for target in sizes["targets"])
        config = AdaptedConfig(str(values["base_model"]), Frame(**values["frame"]), HypernetConfig(**sizes),
                               int(values["steps"]))
        network = Hypernetwork(config.network)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalid(f"{folder}: cannot be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointInvalid(f"{folder / CONFIG}: has other fields than this version writes: {error}") from error
    except ValueError as error:
        if isinstance(error, CheckpointInvalid):
            raise
        raise CheckpointInvalid(f"{folder / CONFIG}: cannot be read as JSON: {error}") from error
    check(tensors, network)
    network.load_state_dict(tensors)
    network.requires_grad_(False)
    return network.eval(), config
