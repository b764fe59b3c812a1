"""`/v1/policy`: the tenant's routing policy: read, check against recent requests, put in force, go back.

A policy is YAML or JSON, sent as the body itself; see docs/routing-policy.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from router.policy import CompiledPolicy, InvalidPolicy, compile_policy
from router.policy.document import PolicyDocument
from router.policy.source import MAX_CHARACTERS
from serve.api.auth import PrincipalDep, TenantDep
from serve.api.bodies import invalid_utf8, media_type, parse_json_value, read_body, read_model
from serve.api.errors import ApiError, error_docs
from serve.api.requests import documented_body
from serve.api.services import Services, ServicesDep
from serve.registry import Conflict, VersionNotFound
from serve.registry.records import PolicyVersion, Tenant

router = APIRouter(prefix="/v1/policy", tags=["routing"])

_BODY_BYTES = 4 * MAX_CHARACTERS
_YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml")


class PolicyObject(BaseModel):
    """One version of a policy. `text` is as it was sent; `restored_from` is the version that it was rolled back to."""

    object: Literal["policy"] = "policy"
    version: int
    text: str
    created_at: float
    created_by: str
    restored_from: int | None


class SavedPolicy(PolicyObject):
    """A policy that was put in force. `warnings` name what it can hold and yet not do, such as documents that are not
    there."""

    warnings: list[str]


class PolicyList(BaseModel):
    """Versions, newest first. For the next page send `next_cursor` as `cursor`."""

    object: Literal["list"] = "list"
    data: list[PolicyObject]
    has_more: bool
    next_cursor: str | None


class Answer(BaseModel):
    """Who answers under a policy; `adapter_id` null is the base."""

    adapter_id: str | None
    document_id: str | None
    reason: str
    confidence: float | None


class PolicyChange(BaseModel):
    """A recent request that would be answered otherwise. `steps` are those of the new policy."""

    response_id: str
    created_at: float
    text: str
    before: Answer
    after: Answer
    steps: list[dict[str, Any]]


class PolicyCheck(BaseModel):
    """A dry run: of `compared` recent requests, those in `changes` would be answered otherwise, newest first."""

    object: Literal["policy.check"] = "policy.check"
    rules: int
    warnings: list[str]
    compared: int
    changed: int
    changes: list[PolicyChange]


class PolicyRollback(BaseModel):
    """POST /v1/policy/rollback."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt | None = Field(
        None, ge=1, description="The version whose text to put in force again; by default the one before."
    )


_BODY = documented_body(PolicyDocument)
_BODY["requestBody"]["content"]["application/yaml"] = {"schema": {"type": "string"}}


@router.get("", responses=error_docs(400, 401, 403, 404))
async def get_policy(
    services: ServicesDep, tenant: TenantDep, version: Annotated[int | None, Query(ge=1, lt=2**31)] = None
) -> PolicyObject:
    """The policy in force, or one of its versions."""
    if version is None:
        found = await services.call(services.registry.current_policy, tenant.id)
        missing = ApiError(404, "This tenant has no routing policy.", code="policy_not_found")
    else:
        found = await services.call(services.registry.get_policy, tenant.id, version)
        missing = ApiError(404, f"The policy has no version {version}.", param="version", code="version_not_found")
    if found is None:
        raise missing
    return PolicyObject(**_fields(found))


@router.put("", openapi_extra=_BODY, responses=error_docs(400, 401, 403, 409, 413, 415))
async def put_policy(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    principal: PrincipalDep,
    expected_version: Annotated[
        int | None,
        Query(ge=0, lt=2**31, description="409 unless this version is the one in force; 0: none ever was."),
    ] = None,
) -> SavedPolicy:
    """Check a policy and put it in force as a new version. The next request at every replica follows it.

    The same text as the one in force makes no new version."""
    text = await _read(request)
    policy = await _compile(services, text)
    try:
        saved = await services.call(
            services.registry.put_policy, tenant.id, text, principal.key_id, expected_version
        )
    except Conflict as error:
        raise ApiError(409, str(error), param="expected_version", code="version_conflict") from error
    return SavedPolicy(**_fields(saved), warnings=await _warnings(services, tenant, policy))


@router.get("/versions", responses=error_docs(400, 401, 403))
async def list_versions(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: str | None = None,
) -> PolicyList:
    """All versions of the policy, newest first: the first one is in force."""
    page = await services.call(services.registry.list_policies, tenant.id, limit, cursor)
    return PolicyList(
        data=[PolicyObject(**_fields(version)) for version in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@router.post(
    "/rollback", openapi_extra=documented_body(PolicyRollback), responses=error_docs(400, 401, 403, 404, 409, 413, 415)
)
async def roll_back(
    request: Request, services: ServicesDep, tenant: TenantDep, principal: PrincipalDep
) -> PolicyObject:
    """Put the text of an earlier version in force again, as a new version."""
    version = (await read_model(request, _BODY_BYTES, PolicyRollback)).version
    try:
        saved = await services.call(services.registry.rollback_policy, tenant.id, version, principal.key_id)
    except VersionNotFound as error:
        raise ApiError(404, str(error), param="version", code="version_not_found") from error
    except Conflict as error:
        raise ApiError(409, str(error), param="version", code="no_earlier_version") from error
    return PolicyObject(**_fields(saved))


@router.post("/check", openapi_extra=_BODY, responses=error_docs(400, 401, 403, 413, 415))
async def check_policy(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=0, le=1000, description="How many recent requests to decide anew.")] = 200,
) -> PolicyCheck:
    """Check a policy and say which recent requests it would answer otherwise than the one in force. Changes nothing.

    It decides anew on the candidates that were recorded: documents that were not among the best then, or were
    forbidden, are not seen."""
    text = await _read(request)
    policy = await _compile(services, text)
    found = await services.router.check_policy(tenant.id, text, limit)
    return PolicyCheck(
        rules=len(policy.rules),
        warnings=await _warnings(services, tenant, policy),
        compared=found["compared"],
        changed=len(found["changes"]),
        changes=[PolicyChange.model_validate(change) for change in found["changes"]],
    )


async def _read(request: Request) -> str:
    """The body's text. Raises ApiError 400, 413 or 415."""
    raw = await read_body(request, _BODY_BYTES)
    content_type = media_type(request)
    if content_type == "application/json":
        parse_json_value(raw)
    elif content_type not in ("", *_YAML):
        message = f"Content-Type must be application/json or application/yaml, not {content_type}."
        raise ApiError(415, message, param="Content-Type")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise invalid_utf8("body", error.start) from error


async def _compile(services: Services, text: str) -> CompiledPolicy:
    """The policy. Raises ApiError 400 with field, line and column."""
    try:
        return await services.call(compile_policy, text)
    except InvalidPolicy as error:
        raise ApiError(400, f"Invalid {error}.", param=error.path or "policy", code="invalid_policy") from error


async def _warnings(services: Services, tenant: Tenant, policy: CompiledPolicy) -> list[str]:
    found = [
        (name, await services.call(services.registry.get_document, tenant.id, name)) for name in policy.targets
    ]
    return [f"There is no document '{name}' that a rule could use." for name, document in found if document is None]


def _fields(version: PolicyVersion) -> dict[str, Any]:
    return {
        "version": version.number,
        "text": version.text,
        "created_at": version.created_at,
        "created_by": version.created_by,
        "restored_from": version.restored_from,
    }
