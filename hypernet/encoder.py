"""The frozen base model as a reader: document tokens in, activations of every layer out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from hypernet.inject import layers_path


def load_base(folder: Path | str, device: torch.device | None = None,
              dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base model, frozen, in evaluation mode, on the CPU unless `device` says otherwise, and its tokenizer.

    Attention is "eager": for short chunks on a CPU it is faster than the fused kernels, and those of torch leave out
    the soft cap of Gemma 2. Raises OSError where the folder holds no model.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.requires_grad_(False)
    return model.to(device or torch.device("cpu")).eval(), AutoTokenizer.from_pretrained(folder)


def text_decoder(model: PreTrainedModel) -> Any:
    """The part of a model with a head that has `layers`: of a multimodal one its text decoder."""
    decoder: Any = model.get_submodule(layers_path(model).rpartition(".")[0])
    return decoder


def stack_activations(hidden_states: tuple[Tensor, ...]) -> Tensor:
    """`[B, T, (L + 1) * D]`: embeddings and each layer's output, each with zero mean and unit variance."""
    parts = [torch.nn.functional.layer_norm(h, h.shape[-1:]) for h in hidden_states]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Activations `[B, T, (L + 1) * D]` over right-padded tokens `ids` `[B, T]`; `mask` `[B, T]` is true on tokens."""
    output = text_decoder(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
    return stack_activations(output.hidden_states)
