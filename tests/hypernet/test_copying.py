"""The weights that training starts from copy unseen random tokens; ordinary random weights do not."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.inject import targets_of
from hypernet.perceiver import HypernetConfig, Hypernetwork
from hypernet.training.base import answer_logits, base_config, copying_row
from hypernet.training.batches import IGNORED, Encoding, collate
from hypernet.training.copying import set_copying_factors, set_copying_weights
from tests.hypernet.helpers import tiny_llama


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of repeated tokens that the model predicts."""
    rng, encoding = Random(1), Encoding(tokenizer)
    batch = collate([copying_row(rng, encoding, len(tokenizer), most=16) for _ in range(40)])
    with torch.no_grad():
        logits, _ = answer_logits(model, batch)
        labels = batch.labels[batch.labels != IGNORED]
    return float((logits.argmax(-1) == labels).float().mean())


def test_copies_before_training(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(base_config(tokenizer), attn_implementation="eager")
    assert accuracy(model, tokenizer) < 0.02
    set_copying_weights(model)
    assert accuracy(model, tokenizer) > 0.3


def test_needs_enough_layers(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="at least 3 layers"):
        set_copying_weights(tiny_llama(tokenizer))


def test_factors_begin_as_embeddings_of_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    """B factors favour the document's own tokens over others, which those of random weights do not."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(base_config(tokenizer), attn_implementation="eager")
    set_copying_weights(model)
    network = Hypernetwork(HypernetConfig(
        features=5 * 192, layers=4, targets=targets_of(model, ("down_proj",)), rank=4, width=256, max_tokens=96))

    def preference() -> float:
        ids = torch.randint(4, len(tokenizer) - 1, (16, 12), generator=torch.Generator().manual_seed(2))
        hidden = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        activations = torch.cat([torch.nn.functional.layer_norm(h, h.shape[-1:]) for h in hidden], dim=-1)
        factors = network(activations, torch.ones(ids.shape, dtype=torch.bool))["down_proj"][1]
        scores = factors.mean((1, 2)) @ model.model.embed_tokens.weight.T
        scores = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)
        return float(scores.gather(1, ids).mean())

    with torch.no_grad():
        before = preference()
        set_copying_factors(network, 192)
        after = preference()
    assert abs(before) < 0.3 and after > 1.0, (before, after)
