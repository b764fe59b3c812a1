"""`POST /v1/embeddings`: the vectors that the router compares questions and documents with, for clients' own use."""

from __future__ import annotations

import asyncio
import base64
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from serve.api.auth import TenantDep
from serve.api.bodies import read_model
from serve.api.errors import ApiError, error_docs
from serve.api.places import hold_place, within
from serve.api.requests import EmbeddingRequest, documented_body
from serve.api.services import Services, ServicesDep

router = APIRouter(prefix="/v1", tags=["embeddings"])

EMBEDDING_MODEL = "imprint-embed"


class EmbeddingObject(BaseModel):
    """One input's vector: numbers, or with `encoding_format` base64 its bytes as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens by the encoder's tokenizer."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """OpenAI's answer: vectors of length 1, in the order of the input."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


@router.post(
    "/embeddings",
    response_model=None,
    openapi_extra=documented_body(EmbeddingRequest),
    responses={
        200: {"model": EmbeddingList},
        **error_docs(400, 401, 403, 404, 413, 415, 429, 503, 504),
    },
)
async def create_embeddings(request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Turn texts into vectors. They go into no cache that another request could notice."""
    limits = services.config.limits
    asked = await read_model(request, limits.max_request_bytes, EmbeddingRequest)
    texts = _checked_texts(services, asked)
    deadline = asyncio.get_running_loop().time() + limits.request_timeout_s
    async with within(deadline, limits), hold_place(services, services.queues.encoder, "encoder", tenant):
        answer = await services.router.embeddings(texts, asked.dimensions)
    _check_answer(asked, answer)
    return Response(await services.call(_render, asked, answer), media_type="application/json")


def _checked_texts(services: Services, asked: EmbeddingRequest) -> list[str]:
    encoder = Path(services.config.router.encoder).name
    if asked.model not in (EMBEDDING_MODEL, encoder):
        message = f"The model '{asked.model}' makes no embeddings; use '{EMBEDDING_MODEL}'."
        raise ApiError(404, message, param="model", code="model_not_found")
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    most = services.config.limits.max_embedding_inputs
    if not 1 <= len(texts) <= most:
        raise ApiError(
            400, f"'input' holds {len(texts)} texts; 1 to {most} are allowed.", param="input", code="invalid_value"
        )
    for index, text in enumerate(texts):
        if not text.strip():
            param = _param(asked, index)
            raise ApiError(400, f"'{param}' is blank: it has no meaning to embed.", param=param, code="invalid_value")
    return texts


def _check_answer(asked: EmbeddingRequest, answer: dict[str, Any]) -> None:
    dimension, limit = answer["dimension"], answer["max_tokens"]
    if asked.dimensions not in (None, dimension):
        raise ApiError(
            400,
            f"'dimensions' is {asked.dimensions}; this encoder's vectors have {dimension}, and cannot be shortened.",
            param="dimensions",
            code="invalid_value",
        )
    for index, tokens in enumerate(answer["tokens"]):
        if limit is not None and tokens > limit:
            param = _param(asked, index)
            raise ApiError(
                400,
                f"'{param}' has {tokens} tokens; this encoder reads at most {limit}. Split the text.",
                param=param,
                code="context_length_exceeded",
            )


def _param(asked: EmbeddingRequest, index: int) -> str:
    return "input" if isinstance(asked.input, str) else f"input.{index}"


def _render(asked: EmbeddingRequest, answer: dict[str, Any]) -> bytes:
    """The answer as JSON. Row by row, so that this thread lets others run in between."""
    tokens = sum(answer["tokens"])
    rows = ", ".join(
        json.dumps({"object": "embedding", "index": index, "embedding": embedding})
        for index, embedding in enumerate(_embeddings(asked, answer))
    )
    rest = {"model": asked.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return f'{{"object": "list", "data": [{rows}], {json.dumps(rest)[1:]}'.encode()


def _embeddings(asked: EmbeddingRequest, answer: dict[str, Any]) -> Iterator[list[float] | str]:
    size = 4 * answer["dimension"]
    raw: bytes = answer["vectors"]
    for start in range(0, len(raw), size):
        row = raw[start : start + size]
        # `array` reads the machine's own byte order, which is little-endian wherever vLLM runs.
        yield base64.b64encode(row).decode() if asked.encoding_format == "base64" else array("f", row).tolist()
