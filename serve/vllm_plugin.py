"""What vLLM loads in each of its processes, through the entry point group ``vllm.general_plugins``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve import lora_cpu
from serve.orphans import end_with_parent


class LoraWorkerExtension:
    """Mixed into vLLM's worker, so that the engine can ask what really runs there."""

    model_runner: Any

    def imprint_lora_wrappers(self) -> Sequence[str]:
        """Qualified class names of the LoRA wrappers in this worker."""
        manager = self.model_runner.lora_manager._adapter_manager
        kinds = {type(wrapper) for wrapper in manager.punica_wrapper_mapping.values()}
        return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def register() -> None:
    """Gives vLLM's CPU platform our LoRA wrapper, and ends vLLM's processes with the one that started them.

    May run repeatedly.
    """
    end_with_parent()
    lora_cpu.register()
