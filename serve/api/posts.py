"""A posted document: JSON or a multipart form with a .txt or .md file, checked and normalised."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Any, get_args

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr
from starlette.datastructures import UploadFile

from serve.api.bodies import (
    invalid_utf8,
    media_type,
    parse_json,
    parse_json_value,
    parse_multipart,
    read_body,
    too_large,
    validate,
)
from serve.api.errors import ApiError
from serve.config import LimitsConfig
from serve.registry.checks import MAX_PROBES, PROBE_LENGTH
from serve.registry.records import DocumentMode

FILE_SUFFIXES = (".txt", ".md", ".markdown")
TITLE_LENGTH = 300

# Control characters but white space (tab, line ends, form feed), and what stands for bytes that were no text.
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
UNREADABLE_SHARE = 0.02  # logs with coloured lines, say, hold a few

Scalar = Annotated[StrictStr, Field(max_length=1024)] | StrictBool | StrictInt | FiniteFloat | None
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]


class ProbePost(BaseModel):
    """A question about the document, for the quality gate. Without an answer, the base model's own is the reference."""

    model_config = ConfigDict(extra="forbid")

    question: StrictStr = Field(min_length=1, max_length=PROBE_LENGTH)
    answer: StrictStr | None = Field(None, min_length=1, max_length=PROBE_LENGTH)


class DocumentPost(BaseModel):
    """What a client posts. Without a title, the first Markdown heading or else the first line becomes it."""

    model_config = ConfigDict(extra="forbid")

    text: StrictStr
    title: StrictStr = Field("", max_length=TITLE_LENGTH)
    external_id: StrictStr | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Your own ID. It may hold slashes, but no '.' or '..' between them and no control characters, and "
        "it must not end in '/versions'.",
    )
    collection: StrictStr | None = Field(None, min_length=1, max_length=100)
    metadata: dict[MetadataKey, Scalar] | None = Field(None, max_length=64)
    mode: DocumentMode = Field("document", description="task: the text describes a task instead of holding facts.")
    probes: list[ProbePost] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PROBES,
        description="Questions that the quality gate asks of the adapter, in place of ones that it makes itself.",
    )


MULTIPART_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A .txt or .md file in UTF-8."},
        "title": {"type": "string", "maxLength": TITLE_LENGTH},
        "external_id": {"type": "string", "minLength": 1, "maxLength": 200},
        "collection": {"type": "string", "minLength": 1, "maxLength": 100},
        "metadata": {"type": "string", "description": "A JSON object of scalars."},
        "mode": {"type": "string", "enum": list(get_args(DocumentMode))},
        "probes": {"type": "string", "description": "A JSON array of objects with 'question' and, if known, 'answer'."},
    },
}


async def read_post(request: Request, limits: LimitsConfig) -> DocumentPost:
    """The request's document. Raises ApiError 400, 413 or 415, naming the field at fault."""
    content_type = media_type(request)
    text_field = "text"
    if content_type in ("application/json", ""):
        raw = await read_body(request, limits.max_request_bytes)
        body = parse_json(raw)
    elif content_type == "multipart/form-data":
        # A form carries its text unescaped; what is allowed beyond the text is for the form's own parts.
        raw = await read_body(request, limits.max_document_bytes + 65_536)
        body = await _form_fields(request, raw)
        text_field = "file"
    else:
        await read_body(request, limits.max_request_bytes)
        message = f"Content-Type must be application/json or multipart/form-data, not {content_type}."
        raise ApiError(415, message, param="Content-Type")
    return _checked(validate(DocumentPost, body), limits, text_field)


def _checked(post: DocumentPost, limits: LimitsConfig, text_field: str) -> DocumentPost:
    """`text_field` is what the client calls the text."""
    named = {text_field: post.text, "title": post.title, "external_id": post.external_id, "collection": post.collection}
    for number, probe in enumerate(post.probes or ()):
        for part, value in (("question", probe.question), ("answer", probe.answer)):
            named[f"probes.{number}.{part}"] = value
            if value is not None and not value.strip():
                name = f"probes.{number}.{part}"
                raise ApiError(400, f"'{name}' is empty.", param=name, code="invalid_value")
    for name, value in named.items():
        if value and "\x00" in value:
            raise ApiError(400, f"'{name}' holds a NUL character.", param=name, code="invalid_value")
    if "\x00" in json.dumps(post.metadata, ensure_ascii=False).replace("\\u0000", "\x00"):
        raise ApiError(400, "'metadata' holds a NUL character.", param="metadata", code="invalid_value")
    if post.external_id is not None:
        _check_fits_url(post.external_id)
    text = post.text.removeprefix("\ufeff")
    if not text.replace("\ufeff", "").strip():
        raise ApiError(400, f"'{text_field}' is empty.", param=text_field, code="empty_text")
    size = len(text.encode())
    if size > limits.max_document_bytes:
        raise too_large(limits.max_document_bytes, size, text_field)
    _check_readable(text_field, text)
    title = " ".join(post.title.split()) or _title_of(text)
    return post.model_copy(update={"text": text, "title": title})


def _check_readable(name: str, text: str) -> None:
    """Raise ApiError 400 for what looks like the bytes of some other kind of file."""
    found = sum(1 for _ in _UNREADABLE.finditer(text))
    if found > UNREADABLE_SHARE * len(text):
        message = (
            f"'{name}' is not readable text: {found} of its {len(text)} characters are control characters or stand for "
            f"bytes that could not be decoded; at most {UNREADABLE_SHARE:.0%} may be."
        )
        raise ApiError(400, message, param=name, code="not_text")


def _check_fits_url(external_id: str) -> None:
    """Raise ApiError 400 for an ID that could not be fetched by its URL. Slashes can."""
    if not {".", ".."}.isdisjoint(external_id.split("/")):
        message = "'external_id' must not be or hold '.' or '..' between slashes: clients leave these out of a URL."
    elif any(unicodedata.category(character) == "Cc" for character in external_id):
        message = "'external_id' must not hold control characters such as line ends."
    elif external_id.endswith("/versions"):
        message = "'external_id' must not end in '/versions': this is where a document's versions are listed."
    else:
        return
    raise ApiError(400, message, param="external_id", code="invalid_value")


def _title_of(text: str) -> str:
    """The first Markdown heading, else the first line that is not blank, cut to the length of a title."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heading = next((line.lstrip("#").strip() for line in lines[:20] if line.startswith("#") and line.strip("# ")), None)
    return " ".join((heading or lines[0]).split())[:TITLE_LENGTH]


async def _form_fields(request: Request, raw: bytes) -> dict[str, Any]:
    form = await parse_multipart(request.headers, raw)
    fields: dict[str, Any] = {}
    file_name = ""
    try:
        for name, value in form.multi_items():
            if name in fields or (name == "file" and "text" in fields):
                raise ApiError(400, f"The form names '{name}' twice.", param=name, code="invalid_value")
            if isinstance(value, UploadFile):
                if name != "file":
                    raise ApiError(400, f"Unknown form file: '{name}'; send it as 'file'.", param=name,
                                   code="unknown_field")
                file_name = PurePosixPath((value.filename or "").replace("\\", "/")).name
                if not file_name.lower().endswith(FILE_SUFFIXES):
                    allowed = ", ".join(FILE_SUFFIXES)
                    raise ApiError(415, f"The file's name must end in one of {allowed}.", param="file")
                fields["text"] = _decode("file", await value.read())
            elif name in ("file", "text"):
                raise ApiError(400, "Send the document as a form file named 'file'.", param=name, code="invalid_value")
            else:
                fields[name] = _FORM_JSON[name](value) if name in _FORM_JSON else value
    finally:
        await form.close()
    if "text" not in fields:
        raise ApiError(400, "Missing form field: 'file'.", param="file", code="missing_field")
    if not fields.get("title") and not fields["text"].lstrip("\ufeff \n").startswith("#"):
        fields["title"] = PurePosixPath(file_name).stem[:TITLE_LENGTH]
    return fields


def _metadata(value: str) -> dict[str, Any]:
    try:
        return parse_json(value.encode())
    except ApiError as error:
        message = f"'metadata' must be a JSON object. {error.message}"
        raise ApiError(400, message, param="metadata", code=error.code) from error


def _probes(value: str) -> list[Any]:
    message = "'probes' must be a JSON array of objects."
    try:
        probes = parse_json_value(value.encode())
    except ApiError as error:
        raise ApiError(400, f"{message} {error.message}", param="probes", code=error.code) from error
    if not isinstance(probes, list):
        raise ApiError(400, message, param="probes", code="invalid_value")
    return probes


_FORM_JSON: dict[str, Callable[[str], Any]] = {"metadata": _metadata, "probes": _probes}


def _decode(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid_utf8(name, error.start) from error
