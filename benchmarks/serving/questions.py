"""Questions that no server has seen before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random

from hypernet.training.corpus.documents import SampledDocument, ask


def numbered_questions(documents: Sequence[SampledDocument], rng: Random) -> Iterator[str]:
    """Without end: questions on the documents' facts in turn, each with a number before it, so that neither a prefix
    cache nor the router's cache of questions knows it."""
    facts = [(fact, document) for document in documents for fact in document.facts]
    rng.shuffle(facts)
    for number in itertools.count():
        yield f"Case {number}: {ask(*facts[number % len(facts)], rng).text}"
