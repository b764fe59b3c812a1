"""Initial weights with which a Llama-shaped model copies before it has learnt anything.

Answers are copied from the document, and a model of this size starts to copy arbitrary words only after thousands of
steps: the copy is made by two attention heads in a row (the induction circuit, Olsson et al. 2022, arXiv 2209.11895),
neither of which is of use without the other. Here the circuit is put in place before training, as mimetic
initialisation (Trockman & Kolter 2023, arXiv 2305.09828) does for other structure:

- heads of the first layer attend to the previous token, by their biases alone, and write what they find there into
  directions of their own;
- heads of layer `MATCH_LAYER` compare the current token with those directions, in the slowly rotating pairs of RoPE,
  and so attend to what followed the token's last occurrence;
- from there on values and outputs are transposes of each other: what is attended to is predicted.

Everything remains free to learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hypernet.perceiver import Hypernetwork

HEADS, MATCH_LAYER = 3, 2
EMBEDDING_STD = 0.12
PROJECT_GAIN, FACTOR_GAIN = 0.6, 0.8
POSITION_BIAS, WRITE_GAIN, MATCH_GAIN, COPY_GAIN = 7.0, 0.4, 4.0, 1.0
FAST_PAIRS, SLOW_BELOW = 8, 0.015
"""How many of RoPE's fastest pairs tell the previous position; pairs slower than so many radians a token match."""


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


@torch.no_grad()
def set_copying_weights(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Write the circuit into a fresh model with biases in attention and as many key heads as query heads.

    Raises ValueError where it has fewer than `MATCH_LAYER + 1` layers or no attention bias.
    """
    config = model.config
    if config.num_hidden_layers <= MATCH_LAYER or not config.attention_bias:
        raise ValueError(f"a copying start needs at least {MATCH_LAYER + 1} layers and attention_bias=True")
    generator = torch.Generator().manual_seed(seed)
    model.model.embed_tokens.weight.normal_(0, EMBEDDING_STD, generator=generator)
    layers: list[Any] = [layer.self_attn for layer in model.model.layers]
    previous, match = layers[0], layers[MATCH_LAYER]
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    read, write = _orthogonal(width, generator), _orthogonal(width, generator)
    frequencies = model.model.rotary_emb.inv_freq
    slow = (torch.cat([frequencies, frequencies]) < SLOW_BELOW).nonzero()[:, 0]
    keys = torch.zeros(size // 2, dtype=torch.complex64)
    keys[:FAST_PAIRS] = POSITION_BIAS
    queries = keys * torch.exp(-1j * frequencies)  # in phase with the key one position back
    for head in range(min(HEADS, config.num_attention_heads)):
        own = slice(head * size, (head + 1) * size)
        for linear, bias in ((previous.q_proj, queries), (previous.k_proj, keys)):
            linear.weight[own] *= 0.3
            linear.bias[own] = torch.cat([bias.real, bias.imag])
        previous.v_proj.weight[own] = read[own] * WRITE_GAIN
        previous.o_proj.weight[:, own] = write[own].T * WRITE_GAIN
        for linear, directions in ((match.q_proj, read), (match.k_proj, write)):
            linear.weight[own] *= 0.3
            linear.weight[head * size + slow] = directions[head * size + slow] * MATCH_GAIN
    for attention in layers[MATCH_LAYER:]:
        copied = _orthogonal(width, generator)
        attention.v_proj.weight.copy_(copied * COPY_GAIN)
        attention.o_proj.weight.copy_(copied.T * COPY_GAIN)


@torch.no_grad()
def set_copying_factors(network: Hypernetwork, hidden_size: int, seed: int = 0) -> None:
    """Start a hypernetwork from B factors that are means of the embeddings of the tokens attended to.

    The embedding part of the activations is projected by a matrix with orthonormal columns, the Perceiver's values and
    outputs are transposes of each other, and the heads of B undo the projection; where to attend, and A, are learnt.
    For targets that write to the residual stream (`d_out == hidden_size`); others are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    width = network.config.width
    frame = _orthogonal(width, generator)[:, :hidden_size]
    network.project.weight[:, :hidden_size] = frame * PROJECT_GAIN
    for block in network.perceiver:
        attention: Any = block.attention
        copied = _orthogonal(width, generator)
        attention.v.weight.copy_(copied * FACTOR_GAIN)
        attention.o.weight.copy_(copied.T * FACTOR_GAIN)
    for target in network.config.targets:
        if target.d_out == hidden_size:
            heads: Any = network.heads[target.name]
            heads.b.copy_(frame.expand(network.config.layers, -1, -1))
