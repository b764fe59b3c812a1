"""`/v1/feedback`: what clients say about answers, and questions that found no document."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from serve.api.auth import TenantDep
from serve.api.bodies import read_model
from serve.api.errors import ApiError, error_docs
from serve.api.recording import FLUSH_S, response_key
from serve.api.requests import documented_body
from serve.api.services import Services, ServicesDep
from serve.registry import NotFound
from serve.registry.feedback import ANSWER_LENGTH
from serve.registry.records import Feedback, NewFeedback, Tenant

router = APIRouter(prefix="/v1/feedback", tags=["routing"])


class FeedbackPost(BaseModel):
    """POST /v1/feedback: at least one of `rating`, `document`, `adapter`, `no_document` and `answer`."""

    model_config = ConfigDict(extra="forbid")

    response_id: StrictStr = Field(
        min_length=1, max_length=200, description="The `id` of the response, or the `x-request-id` that came with it."
    )
    rating: Literal["up", "down"] | None = None
    document: StrictStr | None = Field(
        None, min_length=1, max_length=512, description="The document that should have answered: its ID or external ID."
    )
    adapter: StrictStr | None = Field(
        None, min_length=1, max_length=512, description="The same by the ID of one of its adapters."
    )
    no_document: StrictBool = Field(False, description="No document answers this; the base should have.")
    answer: StrictStr | None = Field(
        None, min_length=1, max_length=ANSWER_LENGTH, description="What the answer should have been."
    )


class FeedbackObject(BaseModel):
    """Feedback as it is kept. `document_id` should have answered; `answered_by` is the adapter that did, null for the
    base."""

    object: Literal["feedback"] = "feedback"
    response_id: str
    created_at: float
    rating: Literal["up", "down"] | None
    document_id: str | None
    no_document: bool
    answer: str | None
    answered_by: str | None


class FeedbackList(BaseModel):
    """Feedback, oldest first. For the next page send the last `created_at` as `after`."""

    object: Literal["list"] = "list"
    data: list[FeedbackObject]


class Suggestion(BaseModel):
    """Questions on one subject that found no document. `question` is the most typical one."""

    question: str
    count: int
    examples: list[str]
    first_at: float
    last_at: float


class SuggestionList(BaseModel):
    """Suggested documents, the most asked for first. `questions` is how many recent ones found no document, general
    chat left out."""

    object: Literal["list"] = "list"
    questions: int
    data: list[Suggestion]


@router.post(
    "", openapi_extra=documented_body(FeedbackPost), responses=error_docs(400, 401, 403, 404, 413, 415)
)
async def give_feedback(request: Request, services: ServicesDep, tenant: TenantDep) -> FeedbackObject:
    """Say what an answer was worth. Sent again for the same response, it replaces what was said before.

    It moves the calibration of this tenant's router alone, in the background, once there is enough of it.
    """
    post = await read_model(request, services.config.limits.max_request_bytes, FeedbackPost)
    key = response_key(post.response_id)
    if key is None:
        raise ApiError(
            400,
            f"'response_id' is {post.response_id[:80]!r}; send the 'id' of a response, or its 'x-request-id'.",
            param="response_id",
            code="invalid_value",
        )
    if not (post.rating or post.document or post.adapter or post.no_document or post.answer):
        raise ApiError(
            400,
            "Send at least one of 'rating', 'document', 'adapter', 'no_document' and 'answer'.",
            param="rating",
            code="missing_field",
        )
    right = await _right_document(services, tenant, post)
    if right is not None and post.no_document:
        raise ApiError(
            400, "'no_document' and a document exclude each other.", param="no_document", code="invalid_value"
        )
    await _written(services, tenant, key)
    given = NewFeedback(key, post.rating, right, post.no_document, post.answer)
    try:
        kept = await services.call(services.registry.give_feedback, tenant.id, given)
    except NotFound as error:
        raise ApiError(404, str(error), param="response_id", code="response_not_found") from error
    services.metrics.feedback.labels(_kind(post)).inc()
    return _object(kept)


@router.get("", responses=error_docs(400, 401, 403))
async def list_feedback(
    services: ServicesDep,
    tenant: TenantDep,
    after: Annotated[float, Query(ge=0, allow_inf_nan=False, description="Seconds since the epoch.")] = 0.0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> FeedbackList:
    """The tenant's feedback given after a time."""
    found = await services.call(services.registry.feedback_since, tenant.id, after, limit)
    return FeedbackList(data=[_object(one) for one in found])


@router.get("/suggestions", responses=error_docs(400, 401, 403, 503))
async def suggestions(
    services: ServicesDep,
    tenant: TenantDep,
    least: Annotated[int, Query(ge=2, le=1000, description="Questions on one subject, at least.")] = 3,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> SuggestionList:
    """Subjects that a document is missing on: recent questions that the router found none for, grouped by likeness."""
    await services.recorder.flush()
    found: dict[str, Any] = await services.router.suggestions(tenant.id, least, limit)
    return SuggestionList(**found)


async def _right_document(services: Services, tenant: Tenant, post: FeedbackPost) -> str | None:
    """The ID of the document that should have answered. Raises ApiError 404, and 400 for two that differ."""
    found: str | None = None
    if post.document is not None:
        document = await services.call(services.registry.get_document, tenant.id, post.document)
        if document is None:
            raise ApiError(
                404, f"There is no document '{post.document}'.", param="document", code="document_not_found"
            )
        found = document.id
    if post.adapter is not None:
        adapter = await services.call(services.registry.get_adapter, tenant.id, post.adapter)
        if adapter is None:
            raise ApiError(404, f"There is no adapter '{post.adapter}'.", param="adapter", code="adapter_not_found")
        if found not in (None, adapter.document_id):
            raise ApiError(
                400, "'adapter' is not one of 'document'; send one of the two.", param="adapter", code="invalid_value"
            )
        found = adapter.document_id
    return found


async def _written(services: Services, tenant: Tenant, key: str) -> None:
    """Wait until a decision that was just made is in the registry; another ingress replica may still hold it."""
    await services.recorder.flush()
    if services.config.ingress.num_replicas > 1:
        if await services.call(services.registry.get_decision, tenant.id, key) is None:
            await asyncio.sleep(1.5 * FLUSH_S)


def _kind(post: FeedbackPost) -> str:
    if post.no_document:
        return "no_document"
    if post.document or post.adapter:
        return "document"
    return post.rating or "answer"


def _object(kept: Feedback) -> FeedbackObject:
    return FeedbackObject(
        response_id=kept.response_id,
        created_at=kept.created_at,
        rating=kept.rating,
        document_id=kept.right_document_id,
        no_document=kept.no_document,
        answer=kept.answer,
        answered_by=kept.adapter_id,
    )
