"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`.

Whatever goes wrong leaves through this module, so that clients see one shape: our own ApiError, what the registry
raises, FastAPI's validation errors (400, not 422), unknown paths, and bugs (500 without their inner text).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from router.embed import NotFinite
from serve.registry import Conflict, IdempotencyConflict, InvalidInput, NotFound
from serve.tenants import TENANT_HEADER, TenantRefused

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field, header or query parameter at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ApiError(Exception):
    """An error to be shown to the client as it is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """The HTTP response for this error."""
        return error_response(self.status, self.message, param=self.param, code=self.code, headers=self.headers)


def error_type(status: int) -> str:
    """OpenAI's `type` for an HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """A response in OpenAI's error format."""
    detail = ErrorDetail(message=message, type=error_type(status), param=param, code=code)
    return JSONResponse(ErrorResponse(error=detail).model_dump(), status, headers)


def invalid_fields(error: ValidationError, body: Any) -> ApiError:
    """Turn pydantic's complaint about a decoded request body into a 400 that names the first field at fault."""
    item = error.errors(include_url=False)[0]
    return _from_item(item["type"], item["msg"], _real_path(item["loc"], body, item["type"]), "request")


def error_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route: these statuses answer with ErrorResponse."""
    return {status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in sorted(statuses)}


def install(app: FastAPI) -> None:
    """Register the handlers on an application."""

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(TenantRefused)
    async def on_tenant_refused(_: Request, error: TenantRefused) -> JSONResponse:
        return error_response(error.status, str(error), param=TENANT_HEADER, code=error.code)

    @app.exception_handler(NotFound)
    async def on_not_found(_: Request, error: NotFound) -> JSONResponse:
        return error_response(404, str(error), code="not_found")

    @app.exception_handler(IdempotencyConflict)
    async def on_idempotency_conflict(_: Request, error: IdempotencyConflict) -> JSONResponse:
        return error_response(409, str(error), param="Idempotency-Key", code="idempotency_key_reused")

    @app.exception_handler(Conflict)
    async def on_conflict(_: Request, error: Conflict) -> JSONResponse:
        return error_response(409, str(error), code="conflict")

    @app.exception_handler(InvalidInput)
    async def on_invalid_input(_: Request, error: InvalidInput) -> JSONResponse:
        return error_response(400, str(error), code="invalid_value")

    @app.exception_handler(NotFinite)
    async def on_broken_encoder(request: Request, error: NotFinite) -> JSONResponse:
        logger.error("%s %s failed: %s", request.method, request.url.path, error)
        message = "The router's encoder makes no usable vectors of this; its weights may be damaged."
        return error_response(503, message, code="encoder_failed")

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        item = error.errors()[0]
        where, *path = (str(part) for part in item["loc"])
        return _from_item(item["type"], item["msg"], path, where).response()

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return error_response(error.status_code, message, headers=headers)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        request_id = getattr(request.state, "request_id", None)
        logger.error("%s %s failed (request %s)", request.method, request.url.path, request_id, exc_info=error)
        return error_response(500, f"Internal error; the server's log has it under request {request_id}.")


def _real_path(location: Sequence[int | str], body: Any, kind: str) -> list[str]:
    """The part of pydantic's location that is in the body; the rest names branches of a union."""
    path: list[str] = []
    for position, part in enumerate(location, 1):
        if isinstance(body, dict) and part in body or isinstance(body, list) and isinstance(part, int):
            body = body[part]  # type: ignore[index]
            path.append(str(part))
        elif kind == "missing" and position == len(location):
            path.append(str(part))
    return path


def _from_item(kind: str, message: str, path: list[str], where: str) -> ApiError:
    param = ".".join(path) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown {where} field: '{param}'.", param=param, code="unknown_field")
    if kind == "missing":
        return ApiError(400, f"Missing {where} field: '{param}'.", param=param, code="missing_field")
    name = f"'{param}'" if param else where
    message = message.removeprefix("Value error, ")
    return ApiError(400, f"Invalid {name}: {message}.", param=param, code="invalid_value")
