"""Typed, opaque IDs that are never used twice.

An ID is a kind, an underscore and 26 characters of lower-case Crockford base 32: 56 bits of microseconds since the
epoch and 72 random bits. IDs made later sort later (up to clock steps), which keeps index inserts and pages in order;
nothing may depend on it beyond that.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Literal, get_args

IdKind = Literal["ten", "key", "doc", "col", "job", "adp"]
ID_KINDS: tuple[str, ...] = get_args(IdKind)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PATTERN = re.compile(rf"(?:{'|'.join(ID_KINDS)})_[{_ALPHABET}]{{26}}")


def new_id(kind: IdKind) -> str:
    """A new ID such as `doc_01k9…`."""
    number = (time.time_ns() // 1000) << 72 | secrets.randbits(72)
    return f"{kind}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))


def id_kind(text: str) -> str | None:
    """The kind ("doc", "adp", …) of a well-formed ID, else None."""
    return text[:3] if _PATTERN.fullmatch(text) else None


def looks_typed(text: str) -> bool:
    """True when a name starts like an ID, well-formed or not; clients' own names must not."""
    return text[:3] in ID_KINDS and text[3:4] == "_"
