"""What a domain of the training corpus is made of.

A domain module in `hypernet/training/corpus/domains/` defines one or more `Domain` objects and lists them in
`DOMAINS`. Everything is plain data: templates with `{e}` (the entity) and `{v}` (the value), and samplers of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

Sampler = Callable[[Random], str]

HELD_OUT_PHRASINGS = 2
"""The last so many statements and questions of each relation are never trained on; they measure unseen phrasing."""


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    `statements` hold `{e}` and `{v}`; `questions` hold `{e}` and are answered by exactly the value; `inverse`
    questions hold `{v}` and are answered by exactly the entity's name. `label` names the value in lists and tables.
    """

    name: str
    label: str
    value: Sampler
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    inverse: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A kind of document and the entities it speaks of.

    `pronouns` is (subject, object, possessive), used for `{e}` after its first mention; `nouns` are definite noun
    phrases for the same purpose ("the device"). `titles` may hold `{e}`; `group_titles` head documents about
    several entities and must not. `distractors` carry no fact that a question asks for and may hold `{e}`.
    """

    name: str
    entity: Sampler
    relations: tuple[Relation, ...]
    titles: tuple[str, ...]
    group_titles: tuple[str, ...]
    distractors: tuple[str, ...]
    nouns: tuple[str, ...] = ()
    pronouns: tuple[str, str, str] = ("it", "it", "its")
    column: str = field(default="Name")
    """Heading of the entity column where several entities stand in a table."""
