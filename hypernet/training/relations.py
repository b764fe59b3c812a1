"""Which relation a question asks for and a value stands in, as one more thing to learn.

The answers alone teach slowly which of a document's values a question means: the corpus has hundreds of relations, each
worded in a dozen ways. So a linear classifier reads the same layer where a value begins in the document and where an
answer is about to begin, and both must name the relation: two places that attention has to match get alike (a
supervised contrast as in Khosla et al. 2020, arXiv 2004.11362, with the classifier's rows as class centres). The
classifier is thrown away after training.
"""

from __future__ import annotations

import re
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hypernet.training.corpus.documents import SampledDocument, all_domains
from hypernet.training.corpus.schema import Relation

WEIGHT = 0.3
GAIN = 8.0
"""Logits are so many times the linear layer's output: at the base's low rate of learning it would stay behind."""
LEAD = 12
"""A value that begins within so many characters of its line or sentence tells no relation yet."""


@cache
def _numbers() -> dict[int, int]:
    # Domains may share relations. By identity: hashing one would go through all its wordings.
    relations = dict.fromkeys(id(relation) for domain in all_domains() for relation in domain.relations)
    return {relation: number for number, relation in enumerate(relations)}


def relation_number(relation: Relation) -> int:
    """The relation's class."""
    return _numbers()[id(relation)]


def relation_count() -> int:
    """How many classes there are."""
    return len(_numbers())


def value_marks(tokenizer: PreTrainedTokenizerFast, document: SampledDocument) -> list[tuple[int, int]]:
    """(token, relation) of each value that occurs once and has its sentence's beginning before it.

    Tokens count from 0 in the document's text as `Encoding.document` encodes it, without the marker before it.
    """
    text = document.text.strip()
    starts: dict[int, int] = {}
    for fact in document.facts:
        found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(fact.value)}(?!\w)", text)]
        if len(found) == 1:
            before = text[:found[0]]
            if len(before) - max(before.rfind(mark) + len(mark) for mark in (". ", "\n")) >= LEAD:
                starts[found[0]] = relation_number(fact.relation)
    encoded = tokenizer(text, add_special_tokens=False)
    marks = []
    for start, number in starts.items():
        token = encoded.char_to_token(start)
        if token is not None:
            marks.append((token, number))
    return marks


class RelationClassifier(nn.Module):
    """Names the relation from a layer's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, relation_count())
        nn.init.zeros_(self.linear.weight)

    def loss(self, hidden: Tensor, marks: Tensor) -> tuple[Tensor, int, int]:
        """Summed cross-entropy over `marks` `[M, 3]` of `hidden` `[B, T, D]`, how many are right, and M."""
        states = F.layer_norm(hidden[marks[:, 0], marks[:, 1]], hidden.shape[-1:])
        logits = GAIN * self.linear(states).float()
        right = int((logits.argmax(-1) == marks[:, 2]).sum())
        return F.cross_entropy(logits, marks[:, 2], reduction="sum"), right, len(marks)
