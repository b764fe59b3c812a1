"""Whether the engine takes the adapters that the configured checkpoints make, from their `config.json` alone.

The generator finds out as well, but only when Ray has started it several times, beside an engine that loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve.config import ConfigError, ImprintConfig


def check_ranks(config: ImprintConfig) -> None:
    """Raise ConfigError, naming both fields, where the smallest adapter has a higher rank than `max_lora_rank`.

    A checkpoint that cannot be read is left to the generator, which says what is wrong with it.
    """
    generator = config.generator
    needed: dict[str, int | None] = {}
    if generator.kind == "distill":
        needed["generator.distill.rank"] = generator.distill.rank
    else:
        needed["generator.checkpoint"] = smallest_rank(config.checkpoint_path())
    if generator.task.checkpoint:
        needed["generator.task.checkpoint"] = smallest_rank(Path(generator.task.checkpoint).expanduser())
    allowed = config.engine.max_lora_rank
    for field, rank in needed.items():
        if rank is not None and rank > allowed:
            raise ConfigError(f"engine.max_lora_rank is {allowed}, but {field} makes adapters of rank {rank}; "
                              f"at least {rank} is needed")


def smallest_rank(checkpoint: Path) -> int | None:
    """The rank of an adapter of one chunk or one task; None where the folder does not say it."""
    try:
        values: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        # nano's own kind has the network's sizes at the top; the others below a name.
        sizes = values.get("sizes") or values.get("network") or values
        rank = int(sizes["rank"])
        # Doc-to-LoRA's bias is one more adapter beside the chunks'.
        return 2 * rank if values.get("format") == "doc-to-lora" and values["use_bias"] else rank
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
