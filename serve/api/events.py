"""Server-sent events of the generating endpoints: our fields put into them, and an error as the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serve.api.errors import ApiError

# Those that carry the whole response object. Within an event's data line ends are escaped, so none is taken for these.
_RESPONSE_EVENT = re.compile(
    r"^(event: response\.(?:created|in_progress|completed|incomplete|failed)\ndata: )(.+)$", re.MULTILINE
)


def mark_first_event(text: str, first: bool, marks: Mapping[str, Any]) -> str:
    """Put the fields `marks` into the first event of a chat or completion stream, if that is not an error.

    `text` holds whole events; `first` says that they are the stream's first ones.
    """
    event, separator, rest = text.partition("\n\n")
    if not first or not event.startswith("data: {"):
        return text
    chunk = json.loads(event.removeprefix("data: "))
    if "error" in chunk:
        return text
    return f"data: {_dump(chunk | marks)}{separator}{rest}"


def mark_responses(text: str, first: bool, marks: Mapping[str, Any]) -> str:
    """Put the fields `marks` into every response object among the events `text` of a `/v1/responses` stream."""

    def mark(found: re.Match[str]) -> str:
        event = json.loads(found.group(2))
        event["response"] |= marks
        return found.group(1) + _dump(event)

    return _RESPONSE_EVENT.sub(mark, text)


def error_event(error: ApiError) -> str:
    """The end of a stream that failed, as OpenAI's clients understand it in all streams."""
    return f"data: {bytes(error.response().body).decode()}\n\ndata: [DONE]\n\n"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
