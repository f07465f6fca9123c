"""The error responses of the HTTP surface, in OpenAI's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from memserve.errors import RequestFailed


@attrs.frozen
class ApiError(Exception):
    """Raised for a request that gets an error as response: ``{"error": {message, type, param, code}}``."""

    message: str
    param: str | None = None
    """Path of the field at fault: ``messages[0].content``."""
    status: int = 400
    code: str | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """OpenAI's coarse class of the error."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def body(self) -> bytes:
        """The JSON document."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The complete response."""
        return Response(self.body(), self.status, dict(self.headers), "application/json")


def from_failure(failure: RequestFailed) -> ApiError:
    """The error response for a failed request."""
    headers = {}
    if failure.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(failure.retry_after_s)))
    return ApiError(failure.message, None, failure.status, failure.code, headers)


def unsupported(param: str, remedy: str = "leave it out") -> ApiError:
    """The error for a known field that this server does not support."""
    return ApiError(f"{param} is not supported by this server; {remedy}", param, code="unsupported_parameter")


async def on_api_error(_request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for what its router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    known: dict[int, tuple[str, str]] = {
        404: (f"Unknown request URL: {method} {path}. See docs/api.md for what is served", "unknown_url"),
        405: (f"Not allowed to {method} on {path}", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (error.detail, "http_error"))
    return ApiError(message, None, error.status_code, code, dict(error.headers or {})).response()


async def on_bug(_request: Request, _error: Exception) -> Response:
    """Starlette's handler for all other errors. It raises the error again afterwards, to have it logged."""
    return ApiError("The server failed to answer; its log says why", None, 500, "internal_error").response()


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    """Starlette's handler for a client that left before its body was complete: no one reads this response."""
    return Response(status_code=400)


def handlers() -> dict[Any, Any]:
    """Starlette's exception_handlers."""
    return {
        ApiError: on_api_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_client_gone,
        Exception: on_bug,
    }
