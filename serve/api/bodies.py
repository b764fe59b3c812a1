"""Request bodies, read within a limit and decoded strictly.

The server never holds more of a body than the limit: a body whose Content-Length says too much, or which turns out
to be too long, is read on and thrown away (up to a bound), so that the client gets to read the 413.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from serve.api.errors import ApiError, invalid_fields

DISCARD_BYTES = 256 * 2**20
DISCARD_SECONDS = 30.0

_SURROGATE = re.compile("[\ud800-\udfff]")
Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises ApiError 413 for more, 400 for a bad Content-Length."""
    declared = request.headers.get("content-length")
    if declared is not None and not declared.isdecimal():
        raise ApiError(400, "Content-Length must be a number.", param="Content-Length")
    chunks: list[bytes] = []
    size = int(declared) if declared is not None and int(declared) > limit else 0
    if size > limit:
        await _discard(request.stream())
        raise too_large(limit, size)
    stream = request.stream()
    async for chunk in stream:
        size += len(chunk)
        if size > limit:
            chunks.clear()
            await _discard(stream)
            raise too_large(limit, None)
        chunks.append(chunk)
    return b"".join(chunks)


def too_large(limit: int, size: int | None, param: str = "body") -> ApiError:
    """413 for a body or document over `limit` bytes; `size` is the size found, if it is known."""
    found = "" if size is None else f" of {size} bytes"
    return ApiError(413, f"The {param}{found} is larger than {limit} bytes.", param=param, code="too_large")


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError 400/413/415; for invalid UTF-8 it names the field."""
    content_type = media_type(request)
    if content_type not in ("application/json", ""):
        await read_body(request, limit)
        raise ApiError(415, f"Content-Type must be application/json, not {content_type}.", param="Content-Type")
    return parse_json(await read_body(request, limit))


async def read_model(request: Request, limit: int, model: type[Model]) -> Model:
    """The JSON body as a request model. Raises ApiError, naming the field at fault."""
    return validate(model, await read_json(request, limit))


def validate(model: type[Model], body: dict[str, Any]) -> Model:
    """Check a decoded body against a request model. Raises ApiError 400, naming the field at fault."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise invalid_fields(error, body) from error


def media_type(request: Request) -> str:
    """The body's media type without parameters, in lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(raw: bytes) -> dict[str, Any]:
    """Decode a JSON object strictly, see `parse_json_value`."""
    value = parse_json_value(raw)
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", param="body", code="invalid_json")
    return value


def parse_json_value(raw: bytes) -> Any:
    """Decode JSON strictly: UTF-8 only, no NaN, no lone surrogates, bounded depth. Raises ApiError 400."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        param = _invalid_field(raw)
        raise invalid_utf8(param, error.start) from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply.", param="body", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", param="body", code="invalid_json") from error
    path = _find_surrogate(value) if "\\u" in text else None
    if path is not None:
        raise ApiError(400, f"'{path}' holds half of a surrogate pair.", param=path, code="invalid_utf8")
    return value


def invalid_utf8(param: str, offset: int) -> ApiError:
    """400 for text that is not UTF-8; `offset` counts bytes."""
    return ApiError(400, f"'{param}' is not valid UTF-8 (byte {offset}).", param=param, code="invalid_utf8")


async def parse_multipart(headers: Headers, raw: bytes) -> FormData:
    """Decode a multipart form that was read within its limit. Raises ApiError 400."""

    async def stream() -> AsyncIterator[bytes]:
        yield raw

    try:
        return await MultiPartParser(headers, stream(), max_files=2, max_fields=20, max_part_size=len(raw) + 1).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        message = getattr(error, "message", None) or str(error)
        raise ApiError(400, f"The multipart body cannot be read: {message}.", param="body") from error


async def _discard(stream: AsyncIterator[bytes]) -> None:
    size, deadline = 0, time.monotonic() + DISCARD_SECONDS
    async for chunk in stream:
        size += len(chunk)
        if size > DISCARD_BYTES or time.monotonic() > deadline:
            return


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _invalid_field(raw: bytes) -> str:
    """The field whose text is not UTF-8, or `body` when even that cannot be told."""
    try:
        value = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return "body"
    return _find_surrogate(value) or "body"


def _find_surrogate(value: Any) -> str | None:
    """Dotted path of the first string or key that UTF-8 cannot hold."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                return path or "body"
        elif isinstance(item, list):
            stack.extend((f"{path}.{index}" if path else str(index), part) for index, part in enumerate(item))
        elif isinstance(item, dict):
            for key, part in item.items():
                if _SURROGATE.search(key):
                    return path or "body"
                stack.append((f"{path}.{key}" if path else key, part))
    return None
