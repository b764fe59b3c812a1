"""The request fields that clients may send to the generation and routing endpoints.

These models are an allow-list. vLLM's own request classes also take cache salts, priorities, request IDs, transfer
parameters, embeddings, token IDs of other requests and chat templates from anyone; here an unknown field is a 400 that
names it. What is allowed is passed to vLLM as it came, so values are checked there; types are checked here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from serve.api.tiers import ServiceTier

REF_TEMPLATE = "#/components/schemas/{model}"
_documented: dict[str, type[BaseModel]] = {}

Int = Annotated[StrictInt, Field(ge=-(2**31), lt=2**31)]
Collection = Annotated[StrictStr, Field(min_length=1, max_length=200)]
MAX_WEIGHT = 10.0


def _or_a_name(schema: dict[str, Any]) -> None:
    weighted = dict(schema)
    schema.clear()
    schema |= {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 512}, weighted]}


class WeightedAdapter(BaseModel):
    """An adapter to compose and how often its update counts. A text alone is an ID or alias with weight 1."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_or_a_name)

    id: StrictStr = Field(
        min_length=1,
        max_length=512,
        description="The ID of an adapter or of a document, of which the best part counts, or an alias of one.",
    )
    weight: Annotated[float, Field(strict=True, ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"id": value}
        if not isinstance(value, dict):
            raise ValueError("must be an ID, an alias, or an object with 'id' and 'weight'")
        return value

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if self.weight == 0:
            raise ValueError("'weight' must not be 0; leave out an adapter that is not to count")
        return self


Adapters = Annotated[
    list[WeightedAdapter],
    Field(
        min_length=1,
        max_length=64,
        description="With model `imprint`: these answer together, by the weighted sum of their updates, and the router "
        "decides nothing. How many: `router.max_composed` of the server.",
    ),
]
Compose = Annotated[
    StrictInt,
    Field(
        ge=1,
        le=64,
        description="With model `imprint` or a collection: up to so many documents that fit the question answer "
        "together, each with weight 1. At most `router.max_composed` of the server.",
    ),
]


Explain = Annotated[
    StrictBool | None,
    Field(
        description="Say why: candidates with raw and calibrated scores, margins, thresholds, the policy's steps, "
        "where the adapters are, and timings."
    ),
]


def _no_token_ids(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError("send text; token IDs of another tokenizer mean nothing to this encoder")
    return value


class StreamOptions(BaseModel):
    """OpenAI's stream options."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class Generating(BaseModel):
    """Fields that all requests share which are answered by the model."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(
        min_length=1,
        max_length=512,
        description="`imprint` (the router decides), `base`, the ID of a document, adapter or collection, or an alias.",
    )
    collection: Collection | None = Field(
        None, description="With model `imprint`: route among this collection's documents only (name or ID)."
    )
    adapters: Adapters | None = None
    compose: Compose = 1
    explain: Explain = None
    frequency_penalty: FiniteFloat | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    presence_penalty: FiniteFloat | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stream: StrictBool | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    user: StrictStr | None = None
    service_tier: ServiceTier | None = Field(
        None,
        description="`flex` waits behind the tenant's other requests; `priority` goes before them where the operator "
        "allows it to the tenant. The answer says what the request was served as.",
    )
    top_k: Int | None = None
    min_p: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None


class Sampling(Generating):
    """Fields that chat and text completions share."""

    max_tokens: Int | None = None
    min_tokens: Int | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    stream_options: StreamOptions | None = None


class ContentPart(BaseModel):
    """A part of a message. What is no text is not compared with documents, and answered by multimodal bases only; its
    other fields are OpenAI's."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "refusal", "image_url", "input_audio", "audio_url", "video_url"]
    text: StrictStr | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type 'text' needs 'text'")
        return self


class Message(BaseModel):
    """One chat message. Only an assistant's may lack content, when it calls tools or refuses."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Annotated[StrictStr, Tag("text")] | Annotated[list[ContentPart], Tag("parts")],
            # So that an error names the part at fault instead of saying that a text would do.
            Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
        ]
        | None
    ) = None
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


class InputItem(BaseModel):
    """One item of `input`: a message, a call of a function, its result, or reasoning that was answered earlier. Its
    other fields are OpenAI's."""

    model_config = ConfigDict(extra="allow")

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: StrictStr | list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.type == "message" and (self.role is None or self.content is None):
            raise ValueError("a message needs 'role' and 'content'")
        return self


class FunctionTool(BaseModel):
    """A function of the client's that the model may call; its other fields are OpenAI's."""

    model_config = ConfigDict(extra="allow")

    type: StrictStr
    name: StrictStr | None = None

    @field_validator("type")
    @classmethod
    def _is_function(cls, value: str) -> str:
        if value != "function":
            raise ValueError(f"there is no built-in tool '{value}'; tools must be of type 'function'")
        return value


class ResponsesRequest(Generating):
    """POST /v1/responses. Nothing is stored: a client sends earlier turns again, in `input`."""

    input: Annotated[
        Annotated[StrictStr, Tag("text")] | Annotated[list[InputItem], Tag("items")],
        # So that an error names the item at fault instead of saying that a text would do.
        Discriminator(lambda value: "items" if isinstance(value, list) else "text"),
    ]
    instructions: StrictStr | None = None
    max_output_tokens: Int | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    text: dict[str, Any] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, StrictStr] | None = Field(None, max_length=16)
    store: StrictBool | None = None
    background: StrictBool | None = None
    previous_response_id: StrictStr | None = None
    conversation: StrictStr | dict[str, Any] | None = None

    @field_validator("input")
    @classmethod
    def _says_something(cls, value: str | list[InputItem]) -> str | list[InputItem]:
        if not value:
            raise ValueError("it must not be empty")
        return value

    @field_validator("store", "background")
    @classmethod
    def _is_off(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("answers are not stored; leave it out or send false")
        return value

    @field_validator("previous_response_id", "conversation")
    @classmethod
    def _is_absent(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("answers are not stored; send the earlier turns in 'input' instead")
        return value


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(min_length=1, max_length=512, description="`imprint-embed`, the router's encoder.")
    input: Annotated[StrictStr | list[StrictStr], BeforeValidator(_no_token_ids)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Only the encoder's own number: its vectors cannot be shortened."
    )
    user: StrictStr | None = None


class RouteQuery(BaseModel):
    """POST /v1/route: what a chat or text completion with these fields would be answered by."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field("imprint", min_length=1, max_length=512)
    messages: list[Message] | None = Field(None, min_length=1)
    prompt: StrictStr | None = None
    collection: Collection | None = None
    adapters: Adapters | None = None
    compose: Compose = 1
    explain: Explain = None


class KeyPost(BaseModel):
    """POST /v1/keys. A tenant key takes `tenant`, a service key `tenants`; tenants that do not exist are made."""

    model_config = ConfigDict(extra="forbid")

    scope: Literal["tenant", "service", "admin"] = "tenant"
    tenant: StrictStr | None = Field(None, min_length=1, max_length=200)
    tenants: list[StrictStr] = Field(default_factory=list, max_length=100)
    label: StrictStr = Field("", max_length=200)


# Ours; never passed to vLLM.
SERVER_FIELDS = frozenset({"collection", "adapters", "compose", "explain", "service_tier"})


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
