"""Packed rows: every question is trained as if it stood alone behind the document."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.training.batches import BUCKET, IGNORED, Encoding, Row, collate
from hypernet.training.corpus.documents import ask, sample_document


def rows(encoding: Encoding, seed: int = 1) -> list[Row]:
    """Three rows of different lengths: in a user turn, behind a system message, and closed book."""
    rng = Random(seed)
    found = []
    for kind, facts in (("user", 4), ("system", 2), ("none", 3)):
        document = sample_document(rng, facts)
        asked = [ask(fact, document, rng) for fact in document.facts]
        prefix = {"user": encoding.document, "system": encoding.system, "none": lambda _: []}[kind](document.text)
        found.append(encoding.row(prefix, asked))
    return found


@torch.no_grad()
def test_segments_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    packed = rows(Encoding(tokenizer))
    batch = collate(packed)
    logits = llama(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
    assert torch.isfinite(logits).all()
    for i, row in enumerate(packed):
        at = len(row.prefix)
        for segment in row.segments:
            alone = llama(input_ids=torch.tensor([row.prefix + segment])).logits[0, len(row.prefix):]
            assert torch.allclose(logits[i, at:at + len(segment)], alone, atol=1e-4)
            at += len(segment)


@torch.no_grad()
def test_the_model_does_depend_on_the_document(tokenizer: PreTrainedTokenizerFast, llama: LlamaForCausalLM) -> None:
    """Otherwise the test above would prove nothing."""
    row = rows(Encoding(tokenizer))[0]
    segment = row.segments[0]
    with_document = llama(input_ids=torch.tensor([row.prefix + segment])).logits[0, len(row.prefix):]
    without = llama(input_ids=torch.tensor([segment])).logits[0]
    assert (with_document - without).abs().max() > 0.1


def test_labels_are_the_answers_shifted(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = rows(Encoding(tokenizer), seed=2)
    batch = collate(packed)
    for i, row in enumerate(packed):
        expected = [token for segment, n in zip(row.segments, row.answers, strict=True) for token in segment[-n:]]
        places = (batch.labels[i] != IGNORED).nonzero().flatten()
        assert batch.labels[i, places].tolist() == expected
        assert batch.ids[i, places + 1].tolist() == expected
        assert batch.prefix[i].sum() == len(row.prefix)
        assert (batch.segment[i] == -1).sum() == batch.ids.size(1) - len(row)


@pytest.mark.parametrize("bucket", [BUCKET, 1, 7])
def test_shapes_are_padded_to_the_bucket(tokenizer: PreTrainedTokenizerFast, bucket: int) -> None:
    packed = rows(Encoding(tokenizer))
    batch = collate(packed, bucket=bucket)
    size, length = batch.ids.shape
    assert size == len(packed) and length % bucket == 0
    assert max(map(len, packed)) <= length < max(map(len, packed)) + bucket
    for tensor in (batch.positions, batch.labels, batch.prefix, batch.segment):
        assert tensor.shape == (size, length)
    assert batch.mask.shape == (size, 1, length, length)


def test_positions_go_on_from_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    row = rows(Encoding(tokenizer))[0]
    batch = collate([row])
    at = len(row.prefix)
    assert batch.positions[0, :at].tolist() == list(range(at))
    for segment in row.segments:
        here = batch.positions[0, at:at + len(segment)].tolist()
        assert here == list(range(len(row.prefix), len(row.prefix) + len(segment)))
        at += len(segment)
