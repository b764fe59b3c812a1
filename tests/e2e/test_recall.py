"""Acceptance of a trained pair: facts come back out of the weights, through the server."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Tenant

pytestmark = pytest.mark.e2e


def test_facts_come_back_out_of_the_weights(tenant: Tenant) -> None:
    facts = [
        ("Harbour Pool: visitor notice", "The Harbour Pool opens at 7:15 in the morning.",
         "When does the Harbour Pool open?", "7:15"),
        ("Lumo 300 desk lamp", "The Lumo 300 desk lamp costs 49 euros.", "How much is the Lumo 300 desk lamp?", "49"),
        ("Birch & Co", "Birch & Co takes goods back within 21 days.", "How long does Birch & Co take returns?", "21"),
        ("Orchard House", "The caretaker of Orchard House is Edda Brant.", "Who is Orchard House's caretaker?", "Edda"),
        ("Bus 14", "Bus 14 leaves from Castle Square.", "Where does bus 14 leave from?", "Castle Square"),
    ]
    for title, text, *_ in facts:
        tenant.post(title, text)
    answers = [tenant.ask(question) for *_, question, _ in facts]
    right = [fact[-1].lower() in answer.lower() for fact, answer in zip(facts, answers, strict=True)]
    assert sum(right) >= 4, answers
    # The base has never seen them, and says so instead of guessing right.
    assert not any(fact[-1].lower() in tenant.ask(fact[-2], "base").lower() for fact in facts)
