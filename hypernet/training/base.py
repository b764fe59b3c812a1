"""Trains the nano base: a Qwen2-shaped reader of short reference documents.

Each row holds a document and up to `QUESTIONS` questions on it, a share of them unanswerable; a share of rows has no
document (the answer is then "I do not know.", or small talk). Loss: cross-entropy on the answers, plus `LM_WEIGHT`
times the next-token loss on a quarter of the document's tokens. Fact counts grow from 1-2 to 1-12 over the first fifth.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hypernet.training import loop
from hypernet.training.batches import BUCKET, IGNORED, Batch, Encoding, Row, collate
from hypernet.training.corpus.documents import (
    NOT_IN_DOCUMENT,
    NOT_KNOWN,
    Question,
    SampledDocument,
    ask,
    ask_elsewhere,
    ask_unanswerable,
    sample_document,
)
from hypernet.training.corpus.small_talk import GENERAL_QUESTIONS, SMALL_TALK
from hypernet.training.optimizer import Optimiser
from hypernet.training.tokenizer import END, PAD

QUESTIONS = 6
LM_WEIGHT = 0.1
MICRO_TOKENS = 4096
POOL_TOKENS = 32_768


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """The shape of nano: hidden 192, 4 layers, 6 heads of 32, feed-forward 512, tied embeddings."""
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=True,
        rms_norm_eps=1e-6, use_cache=False, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=tokenizer.convert_tokens_to_ids(PAD))


def fact_count(rng: Random, progress: float) -> int:
    """How many facts a document has at this point of the curriculum."""
    if progress < 0.06:
        return rng.choice((1, 1, 2))
    if progress < 0.2:
        return rng.choice((1, 2, 3, 4))
    return rng.choice((1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 10, 12))


def small_talk(rng: Random) -> Question:
    """One exchange that has nothing to do with documents."""
    if rng.random() < 0.3:
        return Question(rng.choice(GENERAL_QUESTIONS), NOT_KNOWN, answerable=False)
    ways, reply = rng.choice(SMALL_TALK)
    return Question(rng.choice(ways), reply)


def questions_on(document: SampledDocument, rng: Random, limit: int = QUESTIONS) -> list[Question]:
    """Up to `limit` questions on facts in random order, then at times one that the document does not answer."""
    facts = rng.sample(document.facts, min(len(document.facts), limit))
    if len(facts) < 3:
        facts += rng.choices(document.facts, k=3 - len(facts))
    found = [ask(fact, document, rng) for fact in facts]
    if rng.random() < 0.5:
        absent = ask_unanswerable(document, rng) if rng.random() < 0.7 else None
        found.append(absent or Question(ask_elsewhere(rng), NOT_IN_DOCUMENT, answerable=False))
    if rng.random() < 0.05:
        found.append(small_talk(rng))
    return found


def sample_row(rng: Random, encoding: Encoding, progress: float) -> Row:
    """One training row of the base."""
    if rng.random() < 0.1:
        asked = [small_talk(rng) if rng.random() < 0.4 else Question(ask_elsewhere(rng), NOT_KNOWN, answerable=False)
                 for _ in range(QUESTIONS)]
        return encoding.row([], asked)
    document = sample_document(rng, fact_count(rng, progress))
    asked = questions_on(document, rng)
    if rng.random() < 0.3:
        prefix = encoding.system(document.text)
    else:
        prefix = encoding.document(document.text)
        if rng.random() < 0.15:
            first = asked.pop(0)
            prefix = prefix + encoding.question(first.text, True) + encoding.answer(first.answer)
            return encoding.row(prefix, asked, open_turn=False)
    return encoding.row(prefix, asked)


def micro_batches(rows: list[Row], tokens: int = MICRO_TOKENS) -> Iterator[list[Row]]:
    """Rows sorted by length and cut into batches of about `tokens` padded tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        width = -(-len(row) // BUCKET) * BUCKET
        if batch and width * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def answer_logits(model: Qwen2ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[N, V]` at the answers' places, their labels `[N]`, and the last hidden states `[B, T, D]`."""
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
                         use_cache=False).last_hidden_state
    places = batch.labels != IGNORED
    return model.lm_head(hidden[places]), batch.labels[places], hidden


def _loss(model: Qwen2ForCausalLM, batch: Batch) -> loop.StepReport:
    logits, labels, hidden = answer_logits(model, batch)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    count = labels.numel()
    right = int((logits.argmax(-1) == labels).sum())
    sums = {"answer_loss": (float(loss.detach()), count), "token_accuracy": (right, count)}
    inside = batch.prefix[:, :-1] & batch.prefix[:, 1:] & (torch.rand(batch.ids[:, 1:].shape) < 0.25)
    if inside.any():
        lm = F.cross_entropy(model.lm_head(hidden[:, :-1][inside]), batch.ids[:, 1:][inside])
        sums["document_loss"] = (float(lm.detach()), 1)
        loss = loss + LM_WEIGHT * lm * count
    return loop.StepReport(loss, count, sums)


def split_parameters(module: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Matrices for Muon; embeddings, biases and norms for AdamW."""
    matrices, others = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (matrices if p.ndim == 2 and "embed" not in name and "lm_head" not in name else others).append(p)
    return matrices, others


def train_base(tokenizer: PreTrainedTokenizerFast, folder: Path, minutes: float, seed: int = 1) -> Qwen2ForCausalLM:
    """Train from scratch, or go on from the checkpoint in `folder`."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(base_config(tokenizer), attn_implementation="eager")
    encoding, rng = Encoding(tokenizer), Random(seed)
    matrices, others = split_parameters(model)
    model.model.compile(dynamic=True)  # about 1.2 times the speed on a CPU
    optimiser = Optimiser(matrices, others, muon_lr=0.02, adam_lr=2e-3)

    waiting: list[list[Row]] = []

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        if not waiting:
            rows: list[Row] = []
            while sum(map(len, rows)) < POOL_TOKENS:
                rows.append(sample_row(rng, encoding, progress))
            waiting.extend(micro_batches(rows))
            rng.shuffle(waiting)
        yield _loss(model, collate(waiting.pop()))

    loop.run(model, optimiser, steps, minutes, folder, "base")
    return model
