"""The frozen base model as a reader: document tokens in, activations of every layer out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


def load_base(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base model, frozen, float32, in evaluation mode, and its tokenizer.

    Attention is "eager": for short chunks on a CPU it is faster than the fused kernels.
    Raises OSError where the folder holds no model.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.requires_grad_(False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def stack_activations(hidden_states: tuple[Tensor, ...]) -> Tensor:
    """`[B, T, (L + 1) * D]`: embeddings and each layer's output, each with zero mean and unit variance."""
    parts = [torch.nn.functional.layer_norm(h, h.shape[-1:]) for h in hidden_states]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Activations `[B, T, (L + 1) * D]` over right-padded tokens `ids` `[B, T]`; `mask` `[B, T]` is true on tokens."""
    output = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
    return stack_activations(output.hidden_states)
