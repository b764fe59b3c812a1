"""Checks of values that come from clients, and cursors of pages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serve.ids import id_kind, looks_typed
from serve.registry.errors import InvalidInput

MAX_PAGE = 1000
RESERVED_NAMES = frozenset({"imprint", "base"})
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
