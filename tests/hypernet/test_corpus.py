"""The corpus: enough of it, well formed, and its splits kept apart."""

from __future__ import annotations

from random import Random

import pytest

from hypernet.training.corpus.documents import (
    MAX_FACTS,
    SampledDocument,
    Split,
    all_domains,
    ask,
    ask_elsewhere,
    ask_unanswerable,
    sample_document,
    sample_facts,
)
from hypernet.training.corpus.schema import HELD_OUT_PHRASINGS, Domain
from hypernet.training.corpus.small_talk import GENERAL_QUESTIONS, SMALL_TALK

RELATIONS = [(domain, relation) for domain in all_domains() for relation in domain.relations]


def name_of(domain: Domain) -> str:
    return domain.name


def sample(split: Split, count: int = 600, seed: int = 3) -> list[SampledDocument]:
    rng = Random(f"{seed}-{split}")
    return [sample_document(rng, rng.randint(1, MAX_FACTS), split) for _ in range(count)]


def test_size_of_the_corpus() -> None:
    assert len(all_domains()) >= 12
    assert len(RELATIONS) >= 100
    assert len({domain.name for domain in all_domains()}) == len(all_domains())


@pytest.mark.parametrize("domain", all_domains(), ids=name_of)
def test_domain_is_well_formed(domain: Domain) -> None:
    assert domain.titles and domain.group_titles and domain.distractors and domain.column
    assert not any("{" in title for title in domain.group_titles)
    for template in (*domain.titles, *domain.distractors):
        assert "{" not in template.replace("{e}", "")
    for field in ("name", "label"):
        names = [getattr(relation, field) for relation in domain.relations]
        assert len(set(names)) == len(names), f"{field} occurs twice: a table would lose a value"


def check_templates(templates: tuple[str, ...], *needed: str) -> None:
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert all(template.count(mark) == 1 for mark in needed), template
        rest = template
        for mark in needed:
            rest = rest.replace(mark, "")
        assert "{" not in rest and "}" not in rest, template


@pytest.mark.parametrize("domain", all_domains(), ids=name_of)
def test_relations_are_well_formed(domain: Domain) -> None:
    rng = Random(5)
    for relation in domain.relations:
        assert len(relation.statements) - HELD_OUT_PHRASINGS >= 8, relation.name
        assert len(relation.questions) - HELD_OUT_PHRASINGS >= 8, relation.name
        check_templates(relation.statements, "{e}", "{v}")
        check_templates(relation.questions, "{e}")
        check_templates(relation.inverse, "{v}")
        for text in (*(relation.value(rng) for _ in range(20)), domain.entity(rng)):
            assert text and text == text.strip() and not set(text) & set("|\n{}"), relation.name


def test_training_never_meets_held_out_names_and_values() -> None:
    trained, held_out = sample(Split.TRAIN), sample(Split.HELD_OUT)
    for field, most_open in (("entity", 0.03), ("value", 0.1)):
        seen = {getattr(fact, field) for document in trained for fact in document.facts}
        fresh = [getattr(fact, field) for document in held_out for fact in document.facts]
        # Independent of the sampler's own code: a text of the held-out set may recur in training only where its short
        # choice list has no held-out entry.
        assert sum(text in seen for text in fresh) / len(fresh) < most_open, field


def test_held_out_phrasings_are_disjoint() -> None:
    for _, relation in RELATIONS:
        assert not set(relation.questions[-HELD_OUT_PHRASINGS:]) & set(relation.questions[:-HELD_OUT_PHRASINGS])
        assert not set(relation.statements[-HELD_OUT_PHRASINGS:]) & set(relation.statements[:-HELD_OUT_PHRASINGS])
    for field in ("questions", "statements"):
        unseen = {template for _, relation in RELATIONS for template in getattr(relation, field)[-HELD_OUT_PHRASINGS:]}
        trained = {template for _, relation in RELATIONS for template in getattr(relation, field)[:-HELD_OUT_PHRASINGS]}
        # A few everyday phrasings belong to several relations.
        assert len(unseen & trained) / len(unseen) < 0.05


@pytest.mark.parametrize("split", list(Split))
def test_questions_use_the_phrasings_of_their_split(split: Split) -> None:
    rng = Random(13)
    for _ in range(150):
        document = sample_document(rng, 3, split)
        fact = rng.choice(document.facts)
        asked = ask(fact, document, rng, split)
        if asked.answer != fact.value:
            continue  # from the value to the entity
        names = (fact.entity, *fact.domain.nouns)
        options = fact.relation.questions
        allowed = options[-HELD_OUT_PHRASINGS:] if split is Split.UNSEEN_PHRASING else options[:-HELD_OUT_PHRASINGS]
        filled = {template.replace("{e}", name).lower() for template in allowed for name in names}
        assert asked.text.lower() in filled


@pytest.mark.parametrize("split", list(Split))
def test_every_fact_stands_in_the_document(split: Split) -> None:
    for document in sample(split, 300):
        text = document.text.lower()
        for fact in document.facts:
            assert fact.value.lower() in text
            assert fact.entity.lower() in text
        assert "{e}" not in document.text and "{v}" not in document.text and "\0" not in document.text


@pytest.mark.parametrize("split", list(Split))
def test_answers_of_questions_stand_in_the_document(split: Split) -> None:
    rng = Random(17)
    for document in sample(split, 200, seed=4):
        for fact in document.facts:
            question = ask(fact, document, rng, split)
            assert question.answerable and question.answer.lower() in document.text.lower()
            assert "{" not in question.text
        absent = ask_unanswerable(document, rng, split)
        assert absent is None or not absent.answerable


def test_tables_lists_and_prose_all_occur() -> None:
    documents = sample(Split.TRAIN, 400)
    tables = [d for d in documents if "|---|" in d.text]
    lists = [d for d in documents if d not in tables and any(x.startswith(("- ", "* ")) for x in d.text.split("\n"))]
    prose = [d for d in documents if d not in tables + lists and ". " in d.text]
    assert len(tables) >= 15 and len(lists) >= 40 and len(prose) >= 150
    assert any(len({fact.entity for fact in d.facts}) > 1 for d in tables)
    assert any(d.text.startswith("# ") for d in documents)


def test_facts_are_distinct_and_as_many_as_asked() -> None:
    rng = Random(23)
    for count in range(1, MAX_FACTS + 1):
        for _ in range(20):
            facts = sample_facts(rng, count, Split.TRAIN)
            assert 1 <= len(facts) <= count
            assert len({(fact.entity, fact.relation.name) for fact in facts}) == len(facts)
            assert len({fact.domain.name for fact in facts}) == 1
    assert all(len(sample_facts(rng, 1, Split.TRAIN)) == 1 for _ in range(50))


def test_sampling_is_repeatable() -> None:
    assert [d.text for d in sample(Split.TRAIN, 30)] == [d.text for d in sample(Split.TRAIN, 30)]


def test_an_unanswerable_question_is_on_no_stated_relation() -> None:
    rng = Random(29)
    for document in sample(Split.TRAIN, 200):
        absent = ask_unanswerable(document, rng)
        if absent is None:
            continue
        stated = {template.replace("{e}", fact.entity).lower() for fact in document.facts
                  for template in fact.relation.questions}
        assert absent.text.lower() not in stated


def test_small_talk_and_questions_elsewhere() -> None:
    rng = Random(31)
    assert len(SMALL_TALK) >= 10 and len(GENERAL_QUESTIONS) >= 100
    ways = [way for options, _ in SMALL_TALK for way in options]
    assert len(set(ways)) == len(ways), "one text with two replies"
    assert all(reply.strip() for _, reply in SMALL_TALK)
    assert all("{" not in ask_elsewhere(rng) for _ in range(50))
