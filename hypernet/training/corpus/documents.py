"""Samples documents with facts, and questions on them.

`sample_document` picks a domain, entities and facts, and renders them as prose, a list, "label: value" lines or a
Markdown table, with titles, pronouns and distractors. `split` keeps training and evaluation apart: names and values
whose CRC-32 falls into one residue class, and the last phrasings of each relation, never occur in training.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import zlib
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from random import Random

from hypernet.training.corpus import domains as domain_modules
from hypernet.training.corpus.schema import HELD_OUT_PHRASINGS, Domain, Relation, Sampler
from hypernet.training.corpus.values import pseudo_word

NOT_IN_DOCUMENT = "The document does not say."
NOT_KNOWN = "I do not know."
MAX_FACTS = 12
_RESIDUES = 10
STRANGE_SHARE = 0.35
"""Which share of the values without digits is made of arbitrary words in training."""


class Split(StrEnum):
    """Which names, values and phrasings may occur."""

    TRAIN = "train"
    HELD_OUT = "held_out"
    """Names and values never trained on, phrasings of training."""
    UNSEEN_PHRASING = "unseen_phrasing"
    """Names, values and phrasings never trained on."""


@dataclass(frozen=True)
class Fact:
    """One fact: the relation holds between the entity and the value."""

    domain: Domain
    entity: str
    relation: Relation
    value: str


@dataclass(frozen=True)
class Question:
    """A question and its whole expected answer; `answerable` is false where the document does not state it."""

    text: str
    answer: str
    answerable: bool = True
    relation: Relation | None = None
    """What the question asks for, where it is one of the corpus' relations."""


@dataclass(frozen=True)
class SampledDocument:
    """A document as a tenant would post it, with the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


@cache
def all_domains() -> tuple[Domain, ...]:
    """Every domain of the corpus, in a fixed order."""
    found: list[Domain] = []
    for module in sorted(pkgutil.iter_modules(domain_modules.__path__), key=lambda m: m.name):
        found.extend(importlib.import_module(f"{domain_modules.__name__}.{module.name}").DOMAINS)
    return tuple(found)


def _weight(domain: Domain) -> float:
    return min(len(domain.relations), 14)


@cache
def _weights() -> tuple[float, ...]:
    return tuple(_weight(domain) for domain in all_domains())


def _held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % _RESIDUES == 0


def _draw(sampler: Sampler, rng: Random, split: Split, taken: set[str]) -> str:
    """A string of the split that is not taken; small choice lists may run out, then any string is taken."""
    text = sampler(rng)
    for _ in range(40):
        if text not in taken and _held_out(text) == (split is not Split.TRAIN):
            return text
        text = sampler(rng)
    return text


@cache
def _vocabulary() -> tuple[str, ...]:
    """Every lower-case word of at least three letters in the corpus' own sentences, in alphabetical order."""
    texts = (text for domain in all_domains() for relation in domain.relations for text in relation.statements)
    return tuple(sorted({word for text in texts for word in re.findall(r"(?<![{\w'])[a-z]{3,}(?![}\w'])", text)}))


def _strange(value: str, rng: Random) -> str:
    """The value with other words in the places of its own, in the same shape: "pea soup" to "platform never"."""
    def other(match: re.Match[str]) -> str:
        word = rng.choice(_vocabulary()) if rng.random() < 0.6 else pseudo_word(rng, rng.randint(1, 3)).lower()
        return word.capitalize() if match[0][0].isupper() else word
    return re.sub(r"[A-Za-z]{3,}", other, value)


def _value(relation: Relation, rng: Random, split: Split, taken: set[str]) -> str:
    """A value of the relation; in training often a strange one, so that values are copied and not recognised."""
    value = _draw(relation.value, rng, split, taken)
    if split is Split.TRAIN and rng.random() < STRANGE_SHARE and not any(mark.isdigit() for mark in value):
        strange = _strange(value, rng)
        if strange not in taken and not _held_out(strange):
            return strange
    return value


def _phrasings(options: tuple[str, ...], split: Split) -> tuple[str, ...]:
    if split is Split.UNSEEN_PHRASING:
        return options[-HELD_OUT_PHRASINGS:]
    return options[:-HELD_OUT_PHRASINGS]


def sample_facts(rng: Random, count: int, split: Split) -> tuple[Fact, ...]:
    """`count` facts about one to several entities of one domain, no (entity, relation) pair twice."""
    domain = rng.choices(all_domains(), _weights())[0]
    limit = len(domain.relations)
    entity_count = 1 if rng.random() < 0.5 else rng.randint(1, max(1, min(count, 6)))
    entity_count = max(entity_count, -(-count // limit))
    names: set[str] = set()
    entities: list[str] = []
    for _ in range(entity_count):
        entities.append(_draw(domain.entity, rng, split, names))
        names.add(entities[-1])
    pairs: set[tuple[str, str]] = set()
    facts: list[Fact] = []
    shared = rng.sample(domain.relations, min(limit, max(1, -(-count // entity_count))))
    grid = [(entity, relation) for entity in entities for relation in shared]
    if entity_count == 1 or rng.random() < 0.4:
        rng.shuffle(grid)
        grid = [(e, r) for e in entities for r in rng.sample(domain.relations, limit)] if rng.random() < 0.5 else grid
        rng.shuffle(grid)
    taken: dict[str, set[str]] = {}
    for entity, relation in grid:
        if len(facts) == count:
            break
        if (entity, relation.name) in pairs:
            continue
        pairs.add((entity, relation.name))
        value = _value(relation, rng, split, taken.setdefault(relation.name, set()))
        taken[relation.name].add(value)
        facts.append(Fact(domain, entity, relation, value))
    if rng.random() < 0.7:
        facts.sort(key=lambda fact: entities.index(fact.entity))
    return tuple(facts)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _refer(template: str, entity: str, domain: Domain, rng: Random) -> str:
    """The template with a pronoun or a noun phrase instead of the entity's name."""
    subject, other, possessive = domain.pronouns
    if domain.nouns and rng.random() < 0.5:
        return _capitalise(template.replace("{e}", rng.choice(domain.nouns)))
    if "{e}'s" in template:
        return _capitalise(template.replace("{e}'s", possessive))
    position = template.index("{e}")
    return _capitalise(template.replace("{e}", subject if position == 0 else other))


def _sentence(fact: Fact, known: bool, rng: Random, split: Split) -> str:
    template = rng.choice(_phrasings(fact.relation.statements, split))
    if known and rng.random() < 0.55:
        filled = _refer(template.replace("{v}", "\0"), fact.entity, fact.domain, rng).replace("\0", fact.value)
    else:
        filled = template.replace("{e}", fact.entity).replace("{v}", fact.value)
    return _capitalise(filled)


def _prose(facts: tuple[Fact, ...], titled: str | None, rng: Random, split: Split) -> str:
    sentences: list[str] = []
    previous = titled
    for fact in facts:
        if rng.random() < 0.12:
            filler = rng.choice(fact.domain.distractors)
            sentences.append(_capitalise(filler.replace("{e}", fact.entity)))
        sentences.append(_sentence(fact, previous == fact.entity, rng, split))
        previous = fact.entity
    if rng.random() < 0.2:
        sentences.append(_capitalise(rng.choice(facts[-1].domain.distractors).replace("{e}", facts[-1].entity)))
    separator = "\n\n" if len(sentences) > 4 and rng.random() < 0.3 else " "
    if separator == " ":
        return " ".join(sentences)
    cut = rng.randint(2, len(sentences) - 2)
    return " ".join(sentences[:cut]) + separator + " ".join(sentences[cut:])


def _lines(facts: tuple[Fact, ...], titled: str | None, rng: Random, split: Split) -> str:
    bullet = rng.choice(("- ", "* ", "", "- "))
    labelled = rng.random() < 0.6
    lines: list[str] = []
    previous = titled
    for fact in facts:
        if labelled:
            if previous != fact.entity:
                lines.append(rng.choice((f"{fact.entity}:", f"**{fact.entity}**", f"## {fact.entity}", fact.entity)))
            lines.append(f"{bullet}{fact.relation.label}: {fact.value}")
        else:
            lines.append(bullet + _sentence(fact, previous == fact.entity, rng, split))
        previous = fact.entity
    return "\n".join(lines)


def _table(facts: tuple[Fact, ...], titled: str | None) -> str:
    """A Markdown table: label and value for one entity, else a row for each entity."""
    entities = list(dict.fromkeys(fact.entity for fact in facts))
    if len(entities) == 1:
        head = "" if titled == entities[0] else f"{entities[0]}\n"
        return head + "\n".join(["| | |", "|---|---|"] + [f"| {f.relation.label} | {f.value} |" for f in facts])
    relations = list(dict.fromkeys(fact.relation.label for fact in facts))
    cells = {(fact.entity, fact.relation.label): fact.value for fact in facts}
    rows = [f"| {facts[0].domain.column} | " + " | ".join(relations) + " |", "|" + "---|" * (len(relations) + 1)]
    rows += [f"| {entity} | " + " | ".join(cells.get((entity, label), "-") for label in relations) + " |"
             for entity in entities]
    return "\n".join(rows)


def sample_document(rng: Random, count: int, split: Split = Split.TRAIN) -> SampledDocument:
    """A document of `count` facts (1 to 12) in the phrasings, names and values of `split`."""
    return render(sample_facts(rng, count, split), rng, split)


def render(facts: tuple[Fact, ...], rng: Random, split: Split = Split.TRAIN) -> SampledDocument:
    """The facts as a document: a title at times, then prose, lines or a table."""
    domain = facts[0].domain
    entities = {fact.entity for fact in facts}
    title, titled = "", None
    if rng.random() < 0.6:
        if len(entities) == 1:
            template = rng.choice(domain.titles)
            title = template.replace("{e}", facts[0].entity)
            titled = facts[0].entity if "{e}" in template else None
        else:
            title = rng.choice(domain.group_titles)
        title = rng.choice((f"# {title}", title, title)) + "\n" * rng.choice((1, 2, 2))
    form = rng.random()
    if form < 0.68 or (split is Split.UNSEEN_PHRASING):
        body = _prose(facts, titled, rng, split)
    elif form < 0.9:
        body = _lines(facts, titled, rng, split)
    else:
        body = _table(facts, titled)
    return SampledDocument(title + body, facts)


def ask(fact: Fact, document: SampledDocument, rng: Random, split: Split = Split.TRAIN) -> Question:
    """A question on `fact`; at times from the value to the entity where the value tells the entity."""
    if fact.relation.inverse and rng.random() < 0.15:
        rivals = [f for f in document.facts if f.relation is fact.relation and f.value == fact.value]
        if len(rivals) == 1:
            options = _phrasings(fact.relation.inverse, split) or fact.relation.inverse
            return Question(rng.choice(options).replace("{v}", fact.value), fact.entity)
    text = rng.choice(_phrasings(fact.relation.questions, split))
    alone = all(other.entity == fact.entity for other in document.facts)
    if alone and fact.domain.nouns and rng.random() < 0.12:
        text = text.replace("{e}", rng.choice(fact.domain.nouns))
    return Question(_capitalise(text.replace("{e}", fact.entity)), fact.value, relation=fact.relation)


def ask_unanswerable(document: SampledDocument, rng: Random, split: Split = Split.TRAIN) -> Question | None:
    """A question on an entity of the document by a relation that the document does not state for it."""
    fact = rng.choice(document.facts)
    stated = {f.relation.name for f in document.facts if f.entity == fact.entity}
    absent = [relation for relation in fact.domain.relations if relation.name not in stated]
    if not absent:
        return None
    relation = rng.choice(absent)
    text = rng.choice(_phrasings(relation.questions, split)).replace("{e}", fact.entity)
    return Question(_capitalise(text), NOT_IN_DOCUMENT, answerable=False, relation=relation)


def ask_elsewhere(rng: Random, split: Split = Split.TRAIN) -> str:
    """A question on an entity that no given document speaks of."""
    fact = sample_facts(rng, 1, split)[0]
    return _capitalise(rng.choice(_phrasings(fact.relation.questions, split)).replace("{e}", fact.entity))
