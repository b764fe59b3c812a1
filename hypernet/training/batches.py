"""Packs a document and several questions into one row of tokens.

A row is a prefix (the document, or nothing) followed by segments, one a question with its answer. Each segment sees
the prefix and itself only, and its positions go on from the prefix, so every question is trained exactly as it will be
asked: alone, right after the document. Shapes: B rows, T tokens (a multiple of `BUCKET`, to keep the number of distinct
shapes small).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hypernet.training.corpus.documents import Question, SampledDocument
from hypernet.training.relations import relation_number, value_marks
from hypernet.training.tokenizer import ASSISTANT, END, SYSTEM, USER

BUCKET = 16
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """Token IDs of the prefix and of each segment; `answers[j]` is how many last tokens of segment j are the answer.

    `marks` are (place in the row, relation) pairs: where a value begins, and where an answer is about to.
    """

    prefix: list[int]
    segments: list[list[int]]
    answers: list[int]
    marks: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.segments))


@dataclass(frozen=True)
class Batch:
    """`ids`, `positions`, `labels` `[B, T]` int64 (labels already shifted: the token to predict at this place);
    `mask` `[B, 1, T, T]` float32, 0 where visible; `prefix` `[B, T]` bool, true on the document's tokens;
    `segment` `[B, T]` int64, 0 for the prefix, -1 for padding; `marks` `[M, 3]` int64: row, place, relation."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    prefix: Tensor
    segment: Tensor
    marks: Tensor


class Encoding:
    """Turns texts into the token sequences of nano's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._system, self.user, self.assistant, self.end = (
            int(tokenizer.convert_tokens_to_ids(token)) for token in (SYSTEM, USER, ASSISTANT, END))

    def text(self, text: str) -> list[int]:
        """Plain tokens, no markers."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def document(self, text: str) -> list[int]:
        """The document at the start of a user turn; the question follows in the same turn."""
        return [self.user, *self.text(text.strip() + "\n\n")]

    def system(self, text: str) -> list[int]:
        """The document as the system message."""
        return [self._system, *self.text(text.strip()), self.end]

    def question(self, text: str, open_turn: bool) -> list[int]:
        """A question up to where the answer begins; `open_turn`: the user turn began before it."""
        start = [] if open_turn else [self.user]
        return [*start, *self.text(text), self.end, self.assistant]

    def answer(self, text: str) -> list[int]:
        """The answer and the end of the turn."""
        return [*self.text(text), self.end]

    def row(self, prefix: list[int], questions: Sequence[Question], open_turn: bool | None = None,
            read: SampledDocument | None = None) -> Row:
        """A row of the questions after `prefix`; by default the turn is open where the prefix begins a user turn.

        `read`: the document whose tokens are the prefix from its second token on; its values are marked.
        """
        if open_turn is None:
            open_turn = bool(prefix) and prefix[0] == self.user
        answers = [self.answer(question.answer) for question in questions]
        segments = [self.question(question.text, open_turn) + answer
                    for question, answer in zip(questions, answers, strict=True)]
        marks = [] if read is None else [(1 + place, number) for place, number in value_marks(self._tokenizer, read)]
        end = len(prefix)
        for question, segment, answer in zip(questions, segments, answers, strict=True):
            end += len(segment)
            if question.relation is not None:
                marks.append((end - len(answer) - 1, relation_number(question.relation)))
        return Row(prefix, segments, [len(answer) for answer in answers], marks)


def collate(rows: Sequence[Row], pad: int = 0, bucket: int = BUCKET) -> Batch:
    """Rows padded on the right to a common length."""
    length = -(-max(map(len, rows)) // bucket) * bucket
    size = len(rows)
    ids = torch.full((size, length), pad)
    positions = torch.zeros((size, length), dtype=torch.long)
    labels = torch.full((size, length), IGNORED)
    segment = torch.full((size, length), -1)
    for i, row in enumerate(rows):
        start = len(row.prefix)
        ids[i, :start] = torch.tensor(row.prefix, dtype=torch.long)
        positions[i, :start] = torch.arange(start)
        segment[i, :start] = 0
        at = start
        for j, (tokens, answer) in enumerate(zip(row.segments, row.answers, strict=True), start=1):
            end = at + len(tokens)
            ids[i, at:end] = torch.tensor(tokens)
            positions[i, at:end] = torch.arange(start, start + len(tokens))
            segment[i, at:end] = j
            labels[i, end - answer - 1:end - 1] = torch.tensor(tokens[-answer:])
            at = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    visible = causal & (same | ((segment[:, None, :] == 0) & (segment[:, :, None] >= 0)))
    mask = torch.zeros(size, 1, length, length).masked_fill_(~visible[:, None], -1e9)
    marks = [(i, place, number) for i, row in enumerate(rows) for place, number in row.marks]
    return Batch(ids, positions, labels, mask, segment == 0, segment, torch.tensor(marks, dtype=torch.long).view(-1, 3))
