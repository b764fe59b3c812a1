"""Documents as a few vectors."""

from __future__ import annotations

import numpy as np
import pytest

from router.centroids import MAX_PASSAGES, document_centroids, passages
from router.embed import MiniLmEncoder

TITLE = "Corvo Mini data sheet"
TEXT = "It weighs 3 kg. It costs 40 euros. The battery lasts 9 hours. It is made in Turin. Order code: B120"


def test_at_most_k_normalised_rows(encoder: MiniLmEncoder) -> None:
    for k in (1, 2, 4):
        matrix = document_centroids(encoder, TITLE, [TEXT], k)
        assert matrix.shape == (k, encoder.dimension) and matrix.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-4)
    assert np.array_equal(document_centroids(encoder, TITLE, [TEXT], 3), document_centroids(encoder, TITLE, [TEXT], 3))


def test_a_short_document_keeps_every_passage(encoder: MiniLmEncoder) -> None:
    matrix = document_centroids(encoder, "", ["The lamp is red."], 8)
    assert np.array_equal(matrix, encoder.embed(["The lamp is red."]))


def test_several_centroids_fit_single_facts_better_than_one(encoder: MiniLmEncoder) -> None:
    questions = encoder.embed(["What does the Corvo Mini weigh?", "Where is the Corvo Mini made?"])
    one = (questions @ document_centroids(encoder, TITLE, [TEXT], 1).T).max(axis=1)
    several = (questions @ document_centroids(encoder, TITLE, [TEXT], 8).T).max(axis=1)
    assert (several > one + 0.03).all()


def test_sentences_are_embedded_behind_the_title() -> None:
    found = passages(TITLE, ["It is red.\n- Price: 3", "", "It is red."])
    assert found == [
        TITLE,
        f"{TITLE}\nIt is red.\n- Price: 3",
        f"{TITLE}\nIt is red.",
        f"{TITLE}: It is red.",
        f"{TITLE}: Price: 3",
    ]


def test_long_documents_are_sampled_to_the_end() -> None:
    found = passages("T", [" ".join(f"Fact number {i} holds." for i in range(5000))])
    assert len(found) == MAX_PASSAGES
    assert found[-1] == "T: Fact number 4999 holds."


def test_equal_sentences_do_not_break_clustering(encoder: MiniLmEncoder) -> None:
    matrix = document_centroids(encoder, "", ["It is red. IT IS RED. it is red. It Is Red."], 4)
    assert 1 <= len(matrix) <= 4 and np.isfinite(matrix).all()


def test_questions_have_centroids_of_their_own(encoder: MiniLmEncoder) -> None:
    cost, weight = "What does the Corvo Mini cost?", "How heavy is the Corvo Mini?"
    questions = [cost, " ", weight, cost]
    alone = document_centroids(encoder, TITLE, [TEXT], 2)
    both = document_centroids(encoder, TITLE, [TEXT], 2, questions=questions, question_k=3)
    assert np.array_equal(both[:2], alone)
    np.testing.assert_allclose(both[2:], encoder.embed([cost, weight]), atol=1e-5)
    assert document_centroids(encoder, TITLE, [TEXT], 2, questions=questions, question_k=1).shape[0] == 3
    assert np.array_equal(document_centroids(encoder, TITLE, [TEXT], 2, questions=questions), alone)


def test_bad_input(encoder: MiniLmEncoder) -> None:
    with pytest.raises(ValueError, match="without text"):
        document_centroids(encoder, " ", ["", "\n"], 4)
    with pytest.raises(ValueError, match="at least 1"):
        document_centroids(encoder, "T", ["text"], 0)
    with pytest.raises(ValueError, match="at least 0"):
        document_centroids(encoder, "T", ["text"], 1, question_k=-1)


def test_passages_of_a_part() -> None:
    assert passages("Corvo", ["It is red."], part=True) == ["Corvo\nIt is red.", "Corvo: It is red."]
    assert passages("The corvo is old.", ["It is red."], part=True) == ["It is red."]
