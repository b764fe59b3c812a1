"""Upstream's own Doc-to-LoRA code (github.com/SakanaAI/doc-to-lora), from a checkout, as a benchmark's other side.

Its classes are imported and run as they are, on our random weights. Of the checkout only `src` is read. It needs the
package jaxtyping, which goes into a folder beside the project, since nothing else here needs it:

    .venv/bin/python -m pip install --no-deps --target FOLDER jaxtyping wadler-lindig
    PYTHONPATH=FOLDER .venv/bin/python -m benchmarks.generation_speed --shape small-gemma-2 --upstream CHECKOUT

Two things are stood in for, since they are missing off a large GPU machine:

- `datasets`, which its text processing imports and which making an adapter never uses
- flash attention, which its perceiver insists on: PyTorch's scaled-dot-product attention, one call for all layers

Upstream's `internalize` loads the tokenizer anew for every document. That is left out: it gets the tokens.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypernet.lora import Factors
from tests.hypernet.published_helpers import Shape


class Upstream:
    """`ModulatedPretrainedModel` with an unquantised base, one document at a time as its Python interface has it."""

    def __init__(self, checkout: Path, base: Path, shape: Shape, tensors: Mapping[str, Tensor],
                 device: torch.device) -> None:
        """Raises ImportError where the checkout, or a package that it needs, is missing."""
        sys.path.insert(0, str(checkout / "src"))
        if importlib.util.find_spec("datasets") is None:
            _stand_in("datasets", "Dataset", "interleave_datasets", "is_caching_enabled", "load_dataset")
        hypernet: Any = importlib.import_module("ctx_to_lora.modeling.hypernet")
        configs: Any = importlib.import_module("ctx_to_lora.configs")
        loading: Any = importlib.import_module("ctx_to_lora.model_loading")
        perceiver: Any = importlib.import_module("ctx_to_lora.modeling.idefics2")
        flash = importlib.util.find_spec("flash_attn") is not None and device.type == "cuda"
        if not flash:
            perceiver._flash_attention_forward = packed_attention
            perceiver.unpad_input = unpad
            for name in ("Idefics2Perceiver", "Idefics2PerceiverResampler"):
                # Later releases of transformers look for the package before they let a model name it.
                getattr(perceiver, name)._check_and_adjust_attn_implementation = (
                    lambda _self, attention, *_args, **_kwargs: attention)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # Later releases of transformers refuse upstream's `use_cache=None`.
        get_model = functools.partial(loading.get_model, device=str(device), dtype=dtype,
                                      model_kwargs={"use_cache": False})
        hypernet.get_model = lambda *args, **kwargs: get_model(*args, **{**kwargs, "use_flash_attn": flash})
        lora = loading.get_lora_config(str(base), target_modules=list(shape.modules), lora_r=shape.rank)
        model = get_model(str(base), train=False, requires_grad=False, peft_config=lora, use_flash_attn=flash)
        encoder = configs.CtxEncoderArguments(ctx_encoder_model_name_or_path=str(base),
                                              ctx_encoder_type="per_layer_activations")
        config = hypernet.get_hypernet_config(
            model, model.config,
            configs.HypernetArguments(latent_size=shape.latent, per_rank_gen=True, per_layer_processing=True,
                                      num_pre_head_layers=shape.residual_blocks),
            configs.AggregatorArguments(aggregator_type="perceiver", n_latent_queries=shape.latents,
                                        num_blocks=len(shape.blocks), num_self_attn_per_block=0,
                                        shared_weights=False),
            encoder)
        self._device = device
        self._model = hypernet.ModulatedPretrainedModel(model, config, encoder, use_sequence_packing=False).eval()
        self._model.hypernet.load_state_dict(dict(tensors), strict=True)

    @torch.no_grad()
    def factors(self, ids: list[int]) -> Factors:
        """Upstream's `internalize` of one document, given as tokens: A `[1, L, r, d_in]` and B `[1, L, r, d_out]`."""
        self._model._internalize_from_ids(torch.tensor([ids], device=self._device))
        return {name: (one["A"], one["B"]) for name, one in self._model.generated_loras.items()}


def packed_attention(query: Tensor, key: Tensor, value: Tensor, *_args: object, cu_seq_lens_q: Tensor,
                     cu_seq_lens_k: Tensor, is_causal: bool = False, **_kwargs: object) -> Tensor:
    """Attention `[1, sum of Q, H, D]` of packed sequences, of which each attends to its own keys."""
    starts_q, starts_k = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
    query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    count = len(starts_q) - 1
    lengths = {last - first for first, last in zip(starts_k, starts_k[1:], strict=False)}
    if len(lengths) == 1:
        # One document: all of its layers are of one length and go in one call.
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(0, 1)[None]
    found = []
    for i in range(count):
        q = query[starts_q[i]:starts_q[i + 1]].transpose(0, 1)
        k, v = (x[starts_k[i]:starts_k[i + 1]].transpose(0, 1) for x in (key, value))
        found.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(0, 1))
    return torch.cat(found)[None]


def unpad(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """As flash attention's `unpad_input`: states `[B, T, D]` of the tokens in the mask, their places, where each row
    begins, the longest row, and the lengths."""
    lengths = mask.sum(-1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return states.flatten(0, 1)[places], places, starts, int(lengths.max()), lengths


def _stand_in(name: str, *attributes: str) -> None:
    module = ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, None)
    sys.modules[name] = module
