"""vLLM plugin: LoRA on CPU where no row ever sees another row's adapter.

vLLM's CPU wrapper gathers LoRA weights by slot index and marks base-model rows with index -1, which wraps around to the
last slot: in a mixed batch, base rows get the last slot's adapter. This wrapper groups the rows of a batch by slot
instead; rows without an adapter belong to no group and are never touched.

Loaded in every vLLM process through the entry point group ``vllm.general_plugins``. Off CPU it leaves LoRA alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.lora_rows import RowGroups, SlotWeights, add_lora, check_rows, expand
from serve.orphans import end_with_parent

logger = init_logger(f"vllm.{__name__}")

WRAPPER_PATH = "serve.lora_cpu.IsolatedPunicaWrapperCPU"


class IsolatedPunicaWrapperCPU(PunicaWrapperCPU):
    """vLLM's CPU LoRA wrapper with the row grouping of this module in every place that applies an adapter."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._no_rows = RowGroups.of(torch.empty(0, dtype=torch.long))
        self._token_groups = self._no_rows
        self._sampler_groups = self._no_rows
        self._packed: dict[int, tuple[torch.Tensor, torch.Tensor, tuple[int, int], SlotWeights]] = {}

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Takes over the slot of each row of the coming batches."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self._token_groups = RowGroups.of(self.token_lora_indices)
        self._sampler_groups = RowGroups.of(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds each row's own LoRA to ``y`` [rows, sum(output_slices)] in place, slice by slice (q, k, v; gate, up)."""
        if not add_inputs:
            y.zero_()
        groups = self._token_groups
        if not groups.groups:
            return
        check_rows(groups, x)
        offset = 0
        for stacked_a, stacked_b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            add_lora(y[:, offset : offset + width], x, self._weights(stacked_a, stacked_b), groups, scale)
            offset += width

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds each request's own LoRA of the output head to the logits ``y`` [rows, vocabulary] in place."""
        groups = self._sampler_groups
        if not groups.groups:
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if groups.slots.numel() != x.shape[0]:
            # Prompt log-probabilities: vLLM does not say whose rows these are, and raising would end the engine.
            logger.warning_once("Prompt log-probabilities leave out the LoRA of the output head.")
            return
        weights = self._weights(lora_a_stacked, lora_b_stacked)
        # The base may pad its vocabulary differently from the adapter.
        add_lora(y[:, : lora_b_stacked.shape[-2]], x, weights, groups, scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Adds ``x`` [rows, max rank] through each row's own B to the embeddings ``y`` [rows, width] in place.

        vLLM looks base rows up in slot 0's embedding A, so ``x`` of those rows is not to be used.
        """
        if not add_inputs:
            y.zero_()
        groups = self._token_groups
        if groups.groups:
            check_rows(groups, x)
            expand(y, x, lora_b_stacked, groups)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Writes each row's x @ A.T * scale into ``y[i]`` [rows, max rank]; zero for base rows."""
        x = x.view(-1, x.shape[-1])
        groups = self._token_groups
        for index, stacked_a in enumerate(lora_a_stacked):
            out = y[index].view(-1, y[index].shape[-1])
            out.zero_()
            if not groups.groups:
                continue
            check_rows(groups, x)
            a_all = stacked_a.flatten(0, -3)
            for slot, rows, _ in groups.groups:
                a = a_all[slot]
                out[rows, : a.shape[0]] = (scale * (x[rows].to(a.dtype) @ a.T)).to(out.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Adds each row's ``x[i]`` @ B.T to its slice of ``y`` [rows, width] in place; nothing for base rows."""
        y = y.view(-1, y.shape[-1])
        groups = self._token_groups
        offset = offset_start
        for index, (stacked_b, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            part = y[:, offset : offset + width]
            if not add_inputs:
                part.zero_()
            if groups.groups:
                check_rows(groups, x[index])
                expand(part, x[index], stacked_b, groups)
            offset += width

    def _weights(self, stacked_a: torch.Tensor, stacked_b: torch.Tensor) -> SlotWeights:
        """The packed slots of a module, packed anew only after vLLM wrote into them."""
        if stacked_a.is_inference() or stacked_b.is_inference():
            # Such tensors do not count writes, so nothing tells a stale copy.
            return SlotWeights.pack(stacked_a, stacked_b)
        version = (stacked_a._version, stacked_b._version)
        known = self._packed.get(id(stacked_a))
        if known is None or known[0] is not stacked_a or known[1] is not stacked_b or known[2] != version:
            known = (stacked_a, stacked_b, version, SlotWeights.pack(stacked_a, stacked_b))
            self._packed[id(stacked_a)] = known
        return known[3]


class LoraWorkerExtension:
    """Mixed into vLLM's worker, so that the engine can ask what really runs there."""

    model_runner: Any

    def imprint_lora_wrappers(self) -> Sequence[str]:
        """Qualified class names of the LoRA wrappers in this worker."""
        manager = self.model_runner.lora_manager._adapter_manager
        kinds = {type(wrapper) for wrapper in manager.punica_wrapper_mapping.values()}
        return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def register() -> None:
    """Makes vLLM's CPU platform use the wrapper above, and vLLM's processes end with the one that started them.

    Called by vLLM in each of its processes; may run repeatedly.
    """
    from vllm.platforms import current_platform

    end_with_parent()
    if current_platform.is_cpu():
        platform = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda cls: WRAPPER_PATH)
