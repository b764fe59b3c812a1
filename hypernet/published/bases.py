"""Whether a base is the one that a converted checkpoint was made for."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hypernet.inject import targets_of
from hypernet.perceiver import Target
from hypernet.published.folder import DocToLoraConfig, TextToLoraConfig
from hypernet.published.frames import short_name
from hypernet.reader import CheckpointMismatch

logger = logging.getLogger(__name__)


def check_base(config: DocToLoraConfig | TextToLoraConfig, base: Path, base_fingerprint: str) -> None:
    """Compare fingerprints where the checkpoint has one, else names where the folder tells one; and sizes always.

    Raises CheckpointMismatch with what the checkpoint is for and what the base is.
    """
    name = hub_name(base)
    if config.base_fingerprint:
        if config.base_fingerprint != base_fingerprint:
            raise CheckpointMismatch(
                f"the checkpoint is for {config.base_model} with fingerprint {config.base_fingerprint[:12]}, the base "
                f"in {base} is {base_fingerprint[:12]}")
    elif name and short_name(name) != short_name(config.base_model):
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model}, the base is {name}")
    elif not name:
        logger.warning("the checkpoint is for %s; whether %s is that base can be told by its sizes only",
                       config.base_model, base)
    layers, width, targets = _sizes(config, base)
    sizes = config.sizes
    # A network that reads no activations knows the base's widths by its targets only.
    features = config.sizes.features if isinstance(config, DocToLoraConfig) else width
    if (layers, width, targets) != (sizes.layers, features, sizes.targets):
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model} "
                                 f"({_described(sizes.layers, features, sizes.targets)}), the base in {name or base} "
                                 f"has {_described(layers, width, targets)}")


def hub_name(folder: Path) -> str:
    """The name of a model that lies in Hugging Face's cache ("google/gemma-2-2b-it"); empty for any other folder."""
    for part in reversed(folder.parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return ""


def _sizes(config: DocToLoraConfig | TextToLoraConfig, base: Path) -> tuple[int, int, tuple[Target, ...]]:
    shape = AutoConfig.from_pretrained(base)
    # Without weights: a wrong base is to be refused before gigabytes are read.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    text = shape.get_text_config(decoder=True)
    try:
        targets = targets_of(model, tuple(target.name for target in config.sizes.targets))
        return text.num_hidden_layers, text.hidden_size, targets
    except AttributeError as error:
        raise CheckpointMismatch(f"the checkpoint is for {config.base_model}; the base in {base} is a "
                                 f"{type(model).__name__}, which has other parts: {error}") from error


def _described(layers: int, width: int, targets: tuple[Target, ...]) -> str:
    return f"{layers} layers of width {width}, " + ", ".join(
        f"{target.name} {target.d_in} to {target.d_out}" for target in targets)
