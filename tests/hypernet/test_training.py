"""One step of each training stage on tiny models: losses, and who learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.perceiver import Hypernetwork
from hypernet.training import base as reading
from hypernet.training.batches import BUCKET, Encoding
from hypernet.training.hypernetwork import INTERFERENCE_FROM, Trainer, sample_group, split_parameters
from hypernet.training.relations import RelationClassifier
from tests.hypernet.helpers import tiny_llama, tiny_network


def wide_network(model: LlamaForCausalLM, base: Path) -> Hypernetwork:
    """A hypernetwork that takes the corpus' longest chunks."""
    return Hypernetwork(replace(tiny_network(model, base).config, max_tokens=1024))


def gradients(module: torch.nn.Module) -> list[bool]:
    """Which parameters got one. The reader's blocks look at nothing but themselves, so one norm of theirs idles."""
    idle = ("reader.0.norm_context.weight", "reader.1.norm_context.weight")
    return [p.grad is not None and bool(torch.isfinite(p.grad).all())
            for name, p in module.named_parameters() if name not in idle]


def test_base_reads_documents_and_copies(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tokenizer, seed=5)
    classifier = RelationClassifier(model.config.hidden_size)
    source = reading.ReadingBatches(Encoding(tokenizer), Random(1), len(tokenizer), classifier)
    names = set()
    for _ in range(60):
        report = source.next_loss(model, 0.0)
        assert torch.isfinite(report.loss) and report.count > 0
        names |= set(report.sums)
        if {"copying_loss", "answer_loss"} <= names:
            break
    report.loss.backward()
    assert all(gradients(model))
    assert {"answer_loss", "copying_loss", "document_loss", "relation_accuracy"} <= names


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 1.0])
def test_rows_of_the_base(tokenizer: PreTrainedTokenizerFast, progress: float) -> None:
    encoding, rng = Encoding(tokenizer), Random(2)
    rows = [reading.sample_row(rng, encoding, progress) for _ in range(60)]
    assert any(not row.prefix for row in rows) and any(row.prefix for row in rows)
    for row in rows:
        assert row.segments and all(0 < n < len(s) for s, n in zip(row.segments, row.answers, strict=True))
        assert all(segment[-1] == encoding.end for segment in row.segments)
    batches = list(reading.micro_batches(rows, tokens=1000))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    for batch in batches:
        width = -(-max(map(len, batch)) // BUCKET) * BUCKET
        assert len(batch) == 1 or width * len(batch) <= 1000


def test_every_trained_parameter_of_the_base_has_an_optimiser(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tokenizer)
    optimiser = reading.optimiser_for(model)
    assert {id(p) for p in optimiser.parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(optimiser.parameters) == len({id(p) for p in optimiser.parameters})


@pytest.mark.parametrize("chunks", [1, 3])
def test_groups(chunks: int) -> None:
    rng = Random(3)
    for _ in range(30):
        group = sample_group(rng, chunks, facts=2)
        assert len(group.documents) == len(group.questions) == chunks
        for document, questions in zip(group.documents, group.questions, strict=True):
            assert questions
            assert all(q.answer.lower() in document.text.lower() for q in questions if q.answerable)


@pytest.mark.parametrize(("progress", "joint"), [(0.05, False), (0.95, False), (0.95, True)])
def test_hypernetwork_learns_and_the_frozen_base_does_not(
        tokenizer: PreTrainedTokenizerFast, pair: tuple[Path, Path], progress: float, joint: bool) -> None:
    model = tiny_llama(tokenizer, seed=6).requires_grad_(joint)
    network = wide_network(model, pair[0])
    trainer = Trainer(model, Encoding(tokenizer), network, Random(4), joint=joint)
    names: set[str] = set()
    wanted = {"negative", "keep", "mix"} if progress > INTERFERENCE_FROM else {"right"}
    for _ in range(40):
        if wanted <= names:
            break
        report = trainer.micro_batch(progress)
        assert torch.isfinite(report.loss) and report.count > 0
        report.loss.backward()
        names |= set(report.sums)
    assert all(gradients(network)) and all(has == joint for has in gradients(model))
    assert ("reading" in names) == joint and ("kl" in names) != joint
    assert wanted <= names
    assert progress > INTERFERENCE_FROM or not {"negative", "keep", "mix"} & names


def test_matrices_and_the_rest_are_told_apart(pair: tuple[Path, Path], llama: LlamaForCausalLM) -> None:
    network = tiny_network(llama, pair[0])
    matrices, others = split_parameters(network)
    assert len(matrices) + len(others) == len(list(network.parameters()))
    assert all(p.ndim >= 2 for p in matrices) and any(p is network.latents for p in others)
