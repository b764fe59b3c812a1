"""The request fields that clients may send to the generation and routing endpoints.

These models are an allow-list. vLLM's own request classes also take cache salts, priorities, request IDs, transfer
parameters, embeddings, token IDs of other requests and chat templates from anyone; here an unknown field is a 400 that
names it. What is allowed is passed to vLLM as it came, so values are checked there; types are checked here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.json_schema import models_json_schema

REF_TEMPLATE = "#/components/schemas/{model}"
_documented: dict[str, type[BaseModel]] = {}

Int = Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)]
Collection = Annotated[StrictStr, Field(min_length=1, max_length=200)]


class StreamOptions(BaseModel):
    """OpenAI's stream options."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class Sampling(BaseModel):
    """Fields that chat and text completions share."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(
        min_length=1,
        max_length=512,
        description="`imprint` (the router decides), `base`, the ID of a document, adapter or collection, or an alias.",
    )
    collection: Collection | None = Field(
        None, description="With model `imprint`: route among this collection's documents only (name or ID)."
    )
    frequency_penalty: FiniteFloat | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    max_tokens: Int | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    presence_penalty: FiniteFloat | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    user: StrictStr | None = None
    top_k: Int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: StrictBool | None = None


class Message(BaseModel):
    """One chat message. Only an assistant's may lack content, when it calls tools or refuses."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[dict[str, Any]] | None = None
    name: StrictStr | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: StrictStr | None = None
    function_call: dict[str, Any] | None = None
    refusal: StrictStr | None = None
    # Clients send answers back as they got them, with these set to null.
    reasoning: StrictStr | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        silent = self.role == "assistant" and (self.tool_calls or self.function_call or self.refusal)
        if self.content is None and not silent:
            raise ValueError(f"a message of role '{self.role}' needs 'content'")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions. With model `imprint` the prompt must be one text, since one adapter answers it."""

    prompt: StrictStr | list[StrictStr] | list[Int] | list[list[Int]]
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    suffix: StrictStr | None = None
    response_format: dict[str, Any] | None = None


class RouteQuery(BaseModel):
    """POST /v1/route: what a chat or text completion with these fields would be answered by."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field("imprint", min_length=1, max_length=512)
    messages: list[Message] | None = Field(None, min_length=1)
    prompt: StrictStr | None = None
    collection: Collection | None = None


class KeyPost(BaseModel):
    """POST /v1/keys. A tenant key takes `tenant`, a service key `tenants`; tenants that do not exist are made."""

    model_config = ConfigDict(extra="forbid")

    scope: Literal["tenant", "service", "admin"] = "tenant"
    tenant: StrictStr | None = Field(None, min_length=1, max_length=200)
    tenants: list[StrictStr] = Field(default_factory=list, max_length=100)
    label: StrictStr = Field("", max_length=200)


SERVER_FIELDS = frozenset({"collection"})  # ours; never passed to vLLM


def documented_body(model: type[BaseModel], multipart: dict[str, Any] | None = None) -> dict[str, Any]:
    """A route's `openapi_extra` for a body that the route reads itself (within a limit, strictly)."""
    _documented[model.__name__] = model
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": REF_TEMPLATE.format(model=model.__name__)}}}
    if multipart is not None:
        content["multipart/form-data"] = {"schema": multipart}
    return {"requestBody": {"required": True, "content": content}}


def body_schemas() -> dict[str, Any]:
    """JSON schemas of all bodies named in `documented_body`, for the OpenAPI document's components."""
    models = [(model, "validation") for model in _documented.values()]
    return models_json_schema(models, ref_template=REF_TEMPLATE)[1].get("$defs", {})  # type: ignore[arg-type]
