"""Trains the nano base: a Llama-shaped reader of short reference documents.

Each row holds a document and up to `QUESTIONS` questions on it, a share of them unanswerable; a share of rows has no
document (the answer is then "I do not know.", or small talk). Loss: cross-entropy on the answers, plus `LM_WEIGHT`
times the next-token loss on a quarter of the document's tokens. Fact counts grow from 1-2 to 1-12 by the half.

The weights begin with a copying circuit (`hypernet.training.copying`), and `COPYING_SHARE` of the micro-batches are
random tokens to repeat, which keep it alive while the language is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hypernet.training import loop, relations
from hypernet.training.batches import BUCKET, IGNORED, Batch, Encoding, Row, collate
from hypernet.training.copying import set_copying_weights
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
from hypernet.training.relations import RelationClassifier
from hypernet.training.tokenizer import CONTROL, END, PAD

QUESTIONS = 6
LM_WEIGHT = 0.2
MICRO_TOKENS = 4096
POOL_TOKENS = 32_768
RELATION_LAYER = -2
"""The hidden states that name relations: what the last layer reads."""
COPYING_SHARE = 0.1
"""Which share of the micro-batches are random tokens to repeat."""


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of nano: hidden 192, 4 layers, 6 heads of 32, feed-forward 512, biases in attention, tied embeddings.

    Llama, not Qwen2: for a Qwen2 model transformers replaces the tokenizer's normaliser by Qwen2's own.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, rope_theta=10000.0, attention_bias=True,
        tie_word_embeddings=True, rms_norm_eps=1e-6, use_cache=False, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=tokenizer.convert_tokens_to_ids(PAD))


def fact_count(rng: Random, progress: float) -> int:
    """How many facts a document has at this point of the curriculum."""
    if progress < 0.3:
        return rng.choice((1, 1, 2))
    if progress < 0.5:
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
    if rng.random() < 0.3:
        absent = ask_unanswerable(document, rng) if rng.random() < 0.7 else None
        found.append(absent or Question(ask_elsewhere(rng), NOT_IN_DOCUMENT, answerable=False))
    if rng.random() < 0.05:
        found.append(small_talk(rng))
    return found


def copying_row(rng: Random, encoding: Encoding, vocabulary: int, most: int) -> Row:
    """Up to `most` random tokens, and the same again: copying without language, of arbitrary tokens, rare ones too."""
    tokens = [rng.randrange(len(CONTROL), vocabulary - 1) for _ in range(rng.randint(5, most))]
    return Row([encoding.user, *tokens], [tokens], [len(tokens) - 1])


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
            return encoding.row(prefix, asked, open_turn=False, read=document)
    return encoding.row(prefix, asked, read=document)


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


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits `[N, V]` at the answers' places, and all hidden states, each `[B, T, D]`."""
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
                         use_cache=False, output_hidden_states=True).hidden_states
    return model.lm_head(hidden[-1][batch.labels != IGNORED]).float(), hidden


def reading_loss(model: LlamaForCausalLM, batch: Batch, name: str = "answer", lm_weight: float = LM_WEIGHT,
                 classifier: RelationClassifier | None = None) -> loop.StepReport:
    """The loss of the module's text on one micro-batch; `name` is how the log calls it."""
    logits, hidden = answer_logits(model, batch)
    labels = batch.labels[batch.labels != IGNORED]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    count = labels.numel()
    right = int((logits.argmax(-1) == labels).sum())
    sums = {f"{name}_loss": (float(loss.detach()), count), f"{name}_accuracy": (right, count)}
    if classifier is not None and len(batch.marks):
        named, right, marks = classifier.loss(hidden[RELATION_LAYER], batch.marks)
        loss = loss + relations.WEIGHT * named
        sums["relation_accuracy"] = (right, marks)
    if not lm_weight:
        return loop.StepReport(loss, count, sums)
    inside = batch.prefix[:, :-1] & batch.prefix[:, 1:] & (torch.rand(batch.ids[:, 1:].shape) < 0.25)
    if inside.any():
        lm = F.cross_entropy(model.lm_head(hidden[-1][:, :-1][inside]).float(), batch.ids[:, 1:][inside])
        sums["document_loss"] = (float(lm.detach()), 1)
        loss = loss + lm_weight * lm * count
    return loop.StepReport(loss, count, sums)


class ReadingBatches:
    """Micro-batches of documents and, for `COPYING_SHARE` of them, of tokens to repeat."""

    def __init__(self, encoding: Encoding, rng: Random, vocabulary: int, classifier: RelationClassifier | None) -> None:
        self._encoding, self._rng, self._vocabulary, self._classifier = encoding, rng, vocabulary, classifier
        self._waiting: list[list[Row]] = []

    def next_loss(self, model: LlamaForCausalLM, progress: float) -> loop.StepReport:
        """The loss on the next micro-batch."""
        if self._rng.random() < COPYING_SHARE:
            most = 12 + int(36 * min(1.0, progress * 2))
            rows = [copying_row(self._rng, self._encoding, self._vocabulary, most)
                    for _ in range(MICRO_TOKENS // (2 * most))]
            return reading_loss(model, collate(rows), name="copying", lm_weight=0.0)
        if not self._waiting:
            rows = []
            while sum(map(len, rows)) < POOL_TOKENS:
                rows.append(sample_row(self._rng, self._encoding, progress))
            self._waiting = list(micro_batches(rows))
            self._rng.shuffle(self._waiting)
        return reading_loss(model, collate(self._waiting.pop()), classifier=self._classifier)


def optimiser_for(model: torch.nn.Module, more: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], []),
                  muon_lr: float = 0.005, adam_lr: float = 5e-4, decay: float = 0.6) -> Optimiser:
    """Muon for the matrices, AdamW for the tied embedding, biases and norms, `more` added to each.

    In runs of five minutes half the rates of 0.01 and 1e-3 kept more of the copying start and learnt faster; rates of
    0.02 and 2e-3 stalled. One run each.
    """
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and "embed" not in name and "classifier" not in name else others).append(p)
    return Optimiser(matrices + more[0], others + more[1], muon_lr, adam_lr, decay=decay)


def train_base(tokenizer: PreTrainedTokenizerFast, folder: Path, minutes: float, seed: int = 1) -> LlamaForCausalLM:
    """Train from scratch, or go on from the checkpoint in `folder`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(base_config(tokenizer), attn_implementation="eager")
    encoding, rng = Encoding(tokenizer), Random(seed)
    set_copying_weights(model)
    classifier = RelationClassifier(model.config.hidden_size)
    both = torch.nn.ModuleDict({"base": model, "classifier": classifier})
    optimiser = optimiser_for(both)
    source = ReadingBatches(encoding, rng, len(tokenizer), classifier)

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        yield source.next_loss(model, progress)

    loop.run(both, optimiser, steps, minutes, folder, "base")
    return model
