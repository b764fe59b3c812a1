"""What a Doc-to-LoRA network reads: activations of the frozen base over a document."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hypernet.encoder import text_decoder
from hypernet.published.folder import EMBEDDINGS, PER_LAYER, Reading
from hypernet.published.nf4 import round_linears


class ActivationReader:
    """The base without its last layers and head. The base stays as it is.

    Weights are shared with it, unless the network was trained on a quantised base: then the layers are copied and
    rounded as they were in training.
    """

    def __init__(self, base: PreTrainedModel, reading: Reading) -> None:
        """`base` is a transformers decoder with a head, in evaluation mode."""
        decoder = text_decoder(base)
        self._kind = reading.activations
        # A second decoder over the same layers: cutting the base's own list would change it for its other users.
        self._decoder = copy.copy(decoder)
        self._decoder._modules = dict(decoder._modules)
        # One layer at least: with none transformers has no hidden states to give.
        layers = nn.ModuleList(list(decoder.layers)[:max(1, reading.layers)])
        if reading.quantized:
            layers = copy.deepcopy(layers)
            round_linears(layers)
        self._decoder.layers = layers

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Activations `[B, T, D]` over right-padded tokens `ids` `[B, T]`; `mask` `[B, T]` is true on tokens.

        With per-layer activations one tensor for the embeddings and one for each layer, the last one normalised as
        the base does it before its head; else a single tensor.
        """
        # The decoder never sees padding behind a token, since its attention looks back only.
        output = self._decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
        if self._kind == PER_LAYER:
            return list(output.hidden_states)
        return [output.hidden_states[0] if self._kind == EMBEDDINGS else output.last_hidden_state]
