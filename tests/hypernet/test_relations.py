"""Which tokens are marked with which relation, and that the classifier can learn from them."""

from __future__ import annotations

from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from hypernet.training.batches import Encoding, collate
from hypernet.training.corpus.documents import ask, ask_unanswerable, sample_document
from hypernet.training.relations import RelationClassifier, relation_count, relation_number


def first_token(tokenizer: PreTrainedTokenizerFast, value: str) -> int:
    """The token of the value's first character behind a space, which may or may not be a token of its own."""
    encoded = tokenizer(f"x {value}", add_special_tokens=False)
    return encoded["input_ids"][encoded.char_to_token(2)]


def test_a_mark_stands_where_the_value_begins_and_where_the_answer_is_about_to(
        tokenizer: PreTrainedTokenizerFast) -> None:
    rng, encoding = Random(11), Encoding(tokenizer)
    marked = 0
    for _ in range(60):
        document = sample_document(rng, 3)
        absent = ask_unanswerable(document, rng)
        asked = [ask(fact, document, rng) for fact in document.facts] + ([absent] if absent else [])
        row = encoding.row(encoding.document(document.text), asked, read=document)
        tokens = row.prefix + sum(row.segments, [])
        values = {(relation_number(fact.relation), fact.value) for fact in document.facts}
        of_questions = [place for place, _ in row.marks if place >= len(row.prefix)]
        assert len(of_questions) == sum(question.relation is not None for question in asked)
        assert all(tokens[place] == encoding.assistant for place in of_questions)
        for place, number in row.marks:
            assert 0 <= number < relation_count()
            if place < len(row.prefix):
                assert tokens[place] in {first_token(tokenizer, value) for n, value in values if n == number}
                marked += 1
    assert marked > 60


def test_the_classifier_learns_a_relation_from_its_places() -> None:
    torch.manual_seed(0)
    classifier = RelationClassifier(16)
    hidden = torch.randn(2, 8, 16)
    marks = torch.tensor([[0, 1, 5], [1, 7, 9]])
    optimiser = torch.optim.Adam(classifier.parameters(), lr=0.05)
    before, _, count = classifier.loss(hidden, marks)
    assert count == 2
    for _ in range(60):
        loss, right, _ = classifier.loss(hidden, marks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert right == 2 and float(loss.detach()) < 0.1 < float(before.detach())


def test_rows_without_marks_make_an_empty_tensor(tokenizer: PreTrainedTokenizerFast) -> None:
    encoding = Encoding(tokenizer)
    document = sample_document(Random(1), 1)
    batch = collate([encoding.row(encoding.document(document.text), [])])
    assert tuple(batch.marks.shape) == (0, 3) and batch.marks.dtype == torch.int64
