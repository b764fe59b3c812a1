"""Which text of a request is compared with the centroids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 1200
"""About what the encoder reads. Of a longer text start and end are kept: instructions and questions stand there."""
_MAX_FOLLOW_UP_WORDS = 14
_MAX_EARLIER_TURNS = 2

_REFERENCE = re.compile(
    r"\b(it|its|they|them|their|theirs|he|him|his|she|her|hers|this|that|these|those|there|then|the same|the other"
    r"|former|latter)\b",
    re.IGNORECASE,
)
_CONTINUATION = re.compile(
    r"^\W*(and|or|but|also|what about|how about|what else|anything else|ok(ay)?,? and)\b", re.IGNORECASE
)
# A capital letter or digit after the first word: the message names something itself.
_NAME = re.compile(r"(?<=\s)[\"'(]?[A-Z0-9]\w|\b(?=\w*\d)(?=\w*[A-Za-z])\w+\b")


def query_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last user message; behind earlier user turns where it is a follow-up such as "and its price?".

    Messages are OpenAI's: `content` is a text, or parts of which those of type `text` count. Empty when there is no
    user message with text.
    """
    turns = [text for message in messages if message.get("role") == "user" if (text := _text(message.get("content")))]
    if not turns:
        return ""
    used = [turns[-1]]
    for earlier in reversed(turns[:-1]):
        if not is_follow_up(used[-1]) or len(used) > _MAX_EARLIER_TURNS:
            break
        used.append(earlier)
    return shorten("\n".join(reversed(used)))


def is_follow_up(text: str) -> bool:
    """Whether a message needs earlier ones to say what it is about: short, refers back, names nothing itself."""
    if len(text.split()) > _MAX_FOLLOW_UP_WORDS or _NAME.search(text):
        return False
    return bool(_CONTINUATION.search(text) or _REFERENCE.search(text))


def shorten(text: str) -> str:
    """At most MAX_CHARACTERS of a text: its start and its end."""
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half].rstrip()}\n{text[-half:].lstrip()}"


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, Sequence):
        return ""
    parts = (part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text")
    return "\n".join(part for part in parts if isinstance(part, str)).strip()
