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
        ("Mill Street, flat 3", "The rent of flat 3 in Mill Street is 455 euros a month.",
         "How much is the rent of flat 3?", "455"),
        ("Town Library", "The Town Library closes at 18:30.", "When does the Town Library close?", "18:30"),
        ("Night ferry", "The night ferry to Ostmark leaves at 22:40.", "When does the night ferry leave?", "22:40"),
        ("Cafe Linde", "The owner of Cafe Linde is Maria Keller.", "Who owns Cafe Linde?", "Maria Keller"),
        ("Hotel Seeblick", "A night at Hotel Seeblick costs 120 euros.",
         "How much is a night at Hotel Seeblick?", "120"),
        ("Market hall", "The market hall was built in 1887.", "When was the market hall built?", "1887"),
        ("Tennis club", "The Tennis Club meets in Room 12.", "Where does the Tennis Club meet?", "Room 12"),
        ("Bakery Horn", "Bakery Horn sells rye bread on Fridays.",
         "What does Bakery Horn sell on Fridays?", "rye bread"),
    ]
    for title, text, *_ in facts:
        # One that the gate stops is one that is not answered, and counts below.
        tenant.post(title, text, states=("ready", "degraded"))
    answers = [tenant.ask(question) for *_, question, _ in facts]
    right = [fact[-1].lower() in answer.lower() for fact, answer in zip(facts, answers, strict=True)]
    # Enough facts for the share to say something of any shipped pair, not of one.
    assert sum(right) >= len(facts) * 2 / 3, answers
    # The base has never seen them, and says so instead of guessing right.
    assert not any(fact[-1].lower() in tenant.ask(fact[-2], "base").lower() for fact in facts)
