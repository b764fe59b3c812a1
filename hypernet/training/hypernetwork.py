"""Trains the nano hypernetwork on the frozen base.

One micro-batch: D documents in groups of k chunks. The frozen base reads each document with its questions once; that
pass gives both the activations that the hypernetwork reads and the teacher's logits. The adapters of a group's chunks
are concatenated along the rank. Losses, all over answer tokens:

- answer: cross-entropy of the adapted base on the questions alone (closed book);
- distill (`DISTILL`): KL from the base that has the document in its prompt, for questions that the document answers;
- negative: closed book, a question about another entity or small talk: cross-entropy with the base's own reply, from
  `NEGATIVES_FROM` of the schedule on;
- interference, from `INTERFERENCE_FROM` on, for `INTERFERENCE_SHARE` of the micro-batches, with another document Y
  in the prompt and X's adapter on: keep, KL to the base without adapter on Y's questions (weight `KEEP`), and mix,
  cross-entropy on X's questions (weight `MIX`). Recall comes first; keep alone would teach the adapter to switch itself
  off whenever a document stands in the prompt.

Chunks: one for the first tenth, then half of the micro-batches concatenate 2 to 4. Facts of a chunk: `fact_count`.
Muon 0.01 on matrices (0.006 with weights to begin with), AdamW 5e-4 on the rest, linear decay over the last four
fifths; with weights to begin with, the schedule starts at `INTERFERENCE_FROM`. In the joint stage
(`hypernet.training.joint`) gold answers stand in for the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hypernet.encoder import load_base, stack_activations
from hypernet.fingerprint import fingerprint_folder
from hypernet.inject import adapted, targets_of
from hypernet.perceiver import Factors, HypernetConfig, Hypernetwork, concatenate_ranks
from hypernet.training import loop
from hypernet.training.base import small_talk
from hypernet.training.batches import IGNORED, Batch, Encoding, collate
from hypernet.training.copying import set_copying_factors
from hypernet.training.corpus.documents import (
    NOT_KNOWN,
    Question,
    SampledDocument,
    Split,
    ask,
    ask_elsewhere,
    ask_unanswerable,
    render,
    sample_document,
    sample_facts,
)
from hypernet.training.optimizer import Optimiser

RANK = 16
CHUNK_TOKENS = 40
"""One to three facts. An adapter of one fact answers much better than one of eight, and the router finds the part."""
TARGETS = ("down_proj",)
DISTILL, KEEP, MIX = 0.5, 0.5, 1.0
NEGATIVES_FROM, INTERFERENCE_FROM, INTERFERENCE_SHARE = 0.15, 0.6, 0.3
DOCUMENTS_A_BATCH, BATCHES_A_STEP = 12, 3


@dataclass(frozen=True)
class Group:
    """Chunks whose adapters are concatenated, and the questions on each."""

    documents: list[SampledDocument]
    questions: list[list[Question]]


def fact_count(rng: Random, progress: float, chunks: int) -> int:
    """Facts of each chunk at this point of the curriculum."""
    if chunks > 1:
        return rng.choice((1, 1, 2) if progress < 0.4 else (1, 2, 3))
    if progress < 0.15:
        return rng.choice((1, 1, 2))
    return rng.choice((1, 1, 2, 3) if progress < 0.4 else (1, 1, 2, 2, 3, 3, 4, 6))


def _questions(document: SampledDocument, rng: Random, limit: int) -> list[Question]:
    facts = rng.sample(document.facts, min(len(document.facts), limit))
    found = [ask(fact, document, rng) for fact in facts]
    while len(found) < min(limit, 2):
        found.append(ask(rng.choice(document.facts), document, rng))
    return found


def sample_group(rng: Random, chunks: int, facts: int) -> Group:
    """A group; with several chunks these are parts of one subject's facts, or different documents."""
    limit = 6 if chunks == 1 else 3
    if chunks > 1 and rng.random() < 0.5:
        every = sample_facts(rng, chunks * facts, Split.TRAIN)
        if len(every) == chunks * facts:
            parts = [every[i * facts:(i + 1) * facts] for i in range(chunks)]
            documents = [render(part, rng) for part in parts]
            return Group(documents, [_questions(document, rng, limit) for document in documents])
    documents = [sample_document(rng, facts) for _ in range(chunks)]
    questions = [_questions(document, rng, limit) for document in documents]
    if chunks == 1 and rng.random() < 0.35:
        absent = ask_unanswerable(documents[0], rng)
        questions[0] += [absent] if absent else []
    return Group(documents, questions)


def _negatives(rng: Random) -> list[Question]:
    if rng.random() < 0.4:
        return [small_talk(rng)]
    return [Question(ask_elsewhere(rng), NOT_KNOWN, answerable=False)]


class Trainer:
    """Holds what every micro-batch needs; `micro_batch` gives its losses."""

    def __init__(self, base: PreTrainedModel, encoding: Encoding, network: Hypernetwork, rng: Random,
                 joint: bool = False) -> None:
        """`joint`: the base learns too, its reading being one more loss, and gold answers take the teacher's place."""
        self.base, self.encoding, self.network, self.rng, self.joint = base, encoding, network, rng, joint

    def _answers(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits `[N, V]` at the answers' places, and all hidden states."""
        output = self.base.model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
                                 use_cache=False, output_hidden_states=True)
        return self.base.lm_head(output.last_hidden_state[batch.labels != IGNORED]).float(), output.hidden_states

    def _adapters(self, reading: Batch, hidden: tuple[Tensor, ...], chunks: int) -> Factors:
        length = int(reading.prefix.sum(1).max())
        activations = stack_activations(tuple(h[:, :length] for h in hidden))
        return concatenate_ranks(self.network(activations, reading.prefix[:, :length]), chunks)

    def micro_batch(self, progress: float) -> loop.StepReport:
        """One micro-batch, as the module's text says."""
        rng = self.rng
        chunks = 1 if progress < 0.1 or rng.random() < 0.5 else rng.choice((2, 3, 4))
        facts = fact_count(rng, progress, chunks)
        groups = [sample_group(rng, chunks, facts) for _ in range(DOCUMENTS_A_BATCH // chunks)]
        rows = [self.encoding.row(self.encoding.document(document.text), asked)
                for group in groups for document, asked in zip(group.documents, group.questions, strict=True)]
        reading = collate(rows)
        with torch.set_grad_enabled(self.joint):
            teacher, hidden = self._answers(reading)
        factors = self._adapters(reading, hidden, chunks)

        negatives = [_negatives(rng) if progress > NEGATIVES_FROM else [] for _ in groups]
        closed = collate([self.encoding.row([], sum(group.questions, []) + extra)
                          for group, extra in zip(groups, negatives, strict=True)])
        with adapted(self.base, factors):
            logits, _ = self._answers(closed)
        labels = closed.labels[closed.labels != IGNORED]
        negative = self._negative_places(closed, groups)
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = losses.sum()
        right = (logits.argmax(-1) == labels)[~negative].float()
        sums = {f"loss_{chunks}x{facts}": (float(losses[~negative].sum().detach()), int((~negative).sum())),
                f"right_{chunks}x{facts}": (float(right.sum()), right.numel()),
                "right": (float(right.sum()), right.numel())}
        if self.joint:
            read = F.cross_entropy(teacher, labels[~negative], reduction="sum")
            loss = loss + read
            sums["reading"] = (float(read.detach()), right.numel())
            sums["reading_right"] = (int((teacher.argmax(-1) == labels[~negative]).sum()), right.numel())
        else:
            answerable = ~self._unanswerable_places(closed, groups, negative)
            kl = F.kl_div(logits[~negative].log_softmax(-1), teacher.log_softmax(-1), log_target=True,
                          reduction="none").sum(-1) * answerable[~negative]
            loss = loss + DISTILL * kl.sum()
            sums["kl"] = (float(kl.sum().detach()), kl.numel())
        if negative.any():
            sums["negative"] = (float(losses[negative].sum().detach()), int(negative.sum()))
        if progress > INTERFERENCE_FROM and rng.random() < INTERFERENCE_SHARE:
            extra_loss, extra_sums = self._interference(groups, factors, chunks)
            loss, sums = loss + extra_loss, sums | extra_sums
        return loop.StepReport(loss, labels.numel(), sums)

    @staticmethod
    def _negative_places(closed: Batch, groups: list[Group]) -> Tensor:
        """Which answer tokens belong to negatives, which stand behind the group's own questions."""
        own = torch.tensor([sum(map(len, group.questions)) for group in groups])[:, None]
        return (closed.segment > own)[closed.labels != IGNORED]

    @staticmethod
    def _unanswerable_places(closed: Batch, groups: list[Group], negative: Tensor) -> Tensor:
        """Which answer tokens belong to questions without an answer in the document."""
        absent = torch.zeros_like(closed.segment, dtype=torch.bool)
        for i, group in enumerate(groups):
            for j, question in enumerate(sum(group.questions, []), start=1):
                if not question.answerable:
                    absent[i] |= closed.segment[i] == j
        return absent[closed.labels != IGNORED] | negative

    def _interference(self, groups: list[Group], factors: Factors, chunks: int) -> tuple[Tensor, dict]:
        """Keep and mix: each group's adapter while the next group's first document stands in the prompt."""
        rows, own = [], []
        for i, group in enumerate(groups):
            other = groups[(i + 1) % len(groups)] if self.rng.random() < 0.85 else group
            theirs = other.questions[0][:3]
            mine = [q for q in sum(group.questions, []) if q.answerable][:3]
            rows.append(self.encoding.row(self.encoding.document(other.documents[0].text), theirs + mine))
            own.append(len(theirs))
        batch = collate(rows)
        with adapted(self.base, factors):
            logits, _ = self._answers(batch)
        labels = batch.labels[batch.labels != IGNORED]
        mine_places = (batch.segment > torch.tensor(own)[:, None])[batch.labels != IGNORED]
        keep = self._keep(batch, logits, labels, ~mine_places)
        mix = F.cross_entropy(logits[mine_places], labels[mine_places], reduction="sum")
        count = int(mine_places.sum())
        right = int((logits.argmax(-1) == labels)[mine_places].sum())
        return KEEP * keep + MIX * mix, {
            "keep": (float(keep.detach()), labels.numel() - count), "mix": (float(mix.detach()), count),
            "mix_right": (right, count)}

    def _keep(self, batch: Batch, logits: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """How far the adapter moves the base's reading of another document; while the base learns, from gold."""
        if self.joint:
            return F.cross_entropy(logits[places], labels[places], reduction="sum")
        with torch.no_grad():
            kept, _ = self._answers(batch)
        return F.kl_div(logits[places].log_softmax(-1), kept[places].log_softmax(-1), log_target=True, reduction="sum")


def hypernetwork_for(base: PreTrainedModel, base_fingerprint: str = "") -> Hypernetwork:
    """A fresh hypernetwork of the shipped shape for `base`, its B factors beginning as embeddings of the document."""
    network = Hypernetwork(HypernetConfig(
        features=(base.config.num_hidden_layers + 1) * base.config.hidden_size, layers=base.config.num_hidden_layers,
        targets=targets_of(base, TARGETS), rank=RANK, chunk_tokens=CHUNK_TOKENS, chunks_per_part=1,
        base_fingerprint=base_fingerprint))
    set_copying_factors(network, base.config.hidden_size)
    return network


def split_parameters(network: Hypernetwork) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices for Muon; positions, latents, scales, biases and norms for AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in network.named_parameters():
        plain = p.ndim < 2 or name in ("positions", "latents") or "scale" in name
        (others if plain else matrices).append(p)
    return matrices, others


def train_hypernetwork(base_folder: Path, folder: Path, minutes: float, seed: int = 1001,
                       start: Path | None = None) -> Hypernetwork:
    """Train from scratch, or go on from the checkpoint in `folder`; `start`: weights to begin with."""
    base, tokenizer = load_base(base_folder)
    torch.manual_seed(0)
    network = hypernetwork_for(base, fingerprint_folder(base_folder))
    if start is not None:
        network.load_state_dict(load_file(start))
    matrices, others = split_parameters(network)
    optimiser = Optimiser(matrices, others, muon_lr=0.01 if start is None else 0.006, adam_lr=5e-4, decay=0.8)
    trainer = Trainer(base, Encoding(tokenizer), network, Random(seed))
    start_progress = 0.0 if start is None else INTERFERENCE_FROM

    def steps(progress: float, step: int) -> Iterator[loop.StepReport]:
        for _ in range(BATCHES_A_STEP):
            yield trainer.micro_batch(start_progress + (1 - start_progress) * progress)

    loop.run(network, optimiser, steps, minutes, folder, "hypernetwork")
    return network
