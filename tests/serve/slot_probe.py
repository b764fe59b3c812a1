"""Lets a test look into vLLM's worker."""

from __future__ import annotations

from serve.vllm_plugin import LoraWorkerExtension


class SlotProbe(LoraWorkerExtension):
    """The engine's own extension, and what the worker really holds."""

    def slot_numbers(self) -> tuple[list[int], list[int]]:
        """The numbers of the adapters in slots, and of all in memory."""
        manager = self.model_runner.lora_manager._adapter_manager
        return [number for number in manager.lora_index_to_id if number is not None], list(manager.list_adapters())
