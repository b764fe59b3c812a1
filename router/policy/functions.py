"""The functions of the language: total, without side effects, and linear in the length of what they are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from router.policy.facts import Type

_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")


@dataclass(frozen=True, slots=True)
class Function:
    """A function by the types that it takes and gives. A metadata value may stand where text is taken: one that is no
    text counts as the empty text."""

    run: Callable[..., Any]
    takes: tuple[Type, ...]
    gives: Type
    meaning: str


def matches(text: str, pattern: str) -> bool:
    """Whether the whole text fits the pattern, in which `*` stands for any characters, also none."""
    first, *middle = pattern.split("*")
    if not middle:
        return text == pattern
    last = middle.pop()
    end = len(text) - len(last)
    if len(first) > end or not (text.startswith(first) and text.endswith(last)):
        return False
    # The first place is as good as any later one, so nothing is ever tried twice.
    place = len(first)
    for part in middle:
        found = text.find(part, place, end)
        if found < 0:
            return False
        place = found + len(part)
    return True


def number(value: Any, default: float) -> float:
    """The number that a text spells in decimal digits, or that a metadata value is; else the default."""
    if is_number(value):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return default


def length(value: Any) -> int:
    """Characters of a text, entries of a list or an object in metadata; 0 for everything else."""
    return len(value) if isinstance(value, str | list | Mapping) else 0


def is_number(value: Any) -> bool:
    """Whether a metadata value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


FUNCTIONS: Mapping[str, Function] = {
    "lower": Function(str.lower, (Type.TEXT,), Type.TEXT, "The text in lower case."),
    "length": Function(
        length, (Type.VALUE,), Type.NUMBER, "Characters of a text; entries of a metadata list or object; else 0."
    ),
    "contains": Function(
        lambda text, part: part in text,
        (Type.TEXT, Type.TEXT),
        Type.BOOLEAN,
        "Whether the second text is in the first.",
    ),
    "starts_with": Function(
        str.startswith, (Type.TEXT, Type.TEXT), Type.BOOLEAN, "Whether the first text begins with the second."
    ),
    "ends_with": Function(
        str.endswith, (Type.TEXT, Type.TEXT), Type.BOOLEAN, "Whether the first text ends with the second."
    ),
    "matches": Function(
        matches,
        (Type.TEXT, Type.TEXT),
        Type.BOOLEAN,
        "Whether all of the first text fits the second, in which `*` stands for any characters.",
    ),
    "number": Function(
        number,
        (Type.VALUE, Type.NUMBER),
        Type.NUMBER,
        "The number that a text spells, such as `-3.5`, or that a metadata value is; the second where it is none.",
    ),
}
