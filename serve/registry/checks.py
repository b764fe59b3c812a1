"""Checks of values that come from clients, and cursors of pages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from serve.ids import id_kind, looks_typed
from serve.registry.errors import InvalidInput
from serve.registry.records import DocumentMode, Probe

MAX_PAGE = 1000
MAX_PROBES = 32
PROBE_LENGTH = 500
RESERVED_NAMES = frozenset({"imprint", "base", "imprint-embed"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_text(what: str, text: str, longest: int | None = None) -> str:
    """Refuse what a database cannot store: NUL, lone surrogates, and more than `longest` characters."""
    if "\x00" in text:
        raise InvalidInput(f"The {what} contains a NUL character.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"The {what} is not valid Unicode text.") from error
    if longest is not None and len(text) > longest:
        raise InvalidInput(f"The {what} is longer than {longest} characters.")
    return text


def check_label(what: str, text: str, longest: int) -> str:
    """`check_text` for names that people choose: not blank, and not like one of our IDs."""
    check_text(what, text, longest)
    if not text.strip():
        raise InvalidInput(f"The {what} is empty.")
    if looks_typed(text):
        raise InvalidInput(f"The {what} must not begin like an ID ({text[:4]}…).")
    return text


def check_name(what: str, name: str) -> str:
    """Refuse names of tenants and aliases that are not 1 to 64 letters, digits, dots, dashes and underscores."""
    if not _NAME.fullmatch(name) or looks_typed(name) or name.lower() in RESERVED_NAMES:
        raise InvalidInput(
            f"{name[:80]!r} cannot be the name of {what}: it takes 1 to 64 letters, digits, '.', '-' and '_', begins "
            f"with a letter or digit, does not look like an ID, and is not one of {', '.join(sorted(RESERVED_NAMES))}."
        )
    return name


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of JSON-able metadata, which must be free of NaN, infinities and NUL."""
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"The metadata is not a JSON object: {error}.") from error
    if "\\u0000" in text:
        raise InvalidInput("The metadata contains a NUL character.")
    copy: dict[str, Any] = json.loads(text)
    return copy


def check_mode(mode: str) -> DocumentMode:
    """The mode, when it is one."""
    if mode not in get_args(DocumentMode):
        raise InvalidInput(f"The mode must be one of {', '.join(get_args(DocumentMode))}, not {mode[:80]!r}.")
    return mode  # type: ignore[return-value]


def check_probes(probes: Sequence[Mapping[str, str | None]]) -> tuple[Probe, ...]:
    """Plain copies of at most MAX_PROBES questions with or without answer, each of at most PROBE_LENGTH characters."""
    if len(probes) > MAX_PROBES:
        raise InvalidInput(f"There are {len(probes)} probes; {MAX_PROBES} are allowed.")
    copies: list[Probe] = []
    for number, probe in enumerate(probes):
        question, answer = probe.get("question"), probe.get("answer")
        if question is None or not probe.keys() <= {"question", "answer"}:
            raise InvalidInput(f"Probe {number} must have a question, may have an answer, and nothing else.")
        for what, value in (("question", question), ("answer", answer)):
            if value is not None:
                check_text(f"{what} of probe {number}", value, PROBE_LENGTH)
                if not value.strip():
                    raise InvalidInput(f"The {what} of probe {number} is empty.")
        copies.append({"question": question, "answer": answer})
    return tuple(copies)


def check_limit(limit: int) -> int:
    """A page's size, at most MAX_PAGE."""
    if limit < 1:
        raise InvalidInput("The limit must be at least 1.")
    return min(limit, MAX_PAGE)


def check_cursor(cursor: str | None, kind: str) -> str | None:
    """A cursor is the last ID of the page before."""
    if cursor is not None and id_kind(cursor) != kind:
        raise InvalidInput("The cursor is not one that a list has given.")
    return cursor
