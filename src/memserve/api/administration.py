"""The request body of POST /cluster/{worker}, which operators send."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request

from memserve.api.errors import ApiError
from memserve.messages import Change


class ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    """A new role, ``{"role": "prefill"}``, or an order to drain, ``{"drain": true}``."""

    role: Literal["prefill", "decode", "both", "auto"] | None = None
    drain: bool = False


async def read_change(request: Request) -> Change:
    """Read the change from a request's body. Raises ApiError (400, 415).

    Only application/json is accepted: a web page cannot send that to another origin unasked (CORS).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("Send Content-Type: application/json", None, 415, "unsupported_media_type")
    try:
        body = msgspec.json.decode(await request.body(), type=ChangeBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f'The body must be {{"role": "prefill" | "decode" | "both" | "auto"}} or {{"drain": true}}: {error}'
        raise ApiError(message, code="invalid_value") from error
    if (body.role is not None) == body.drain:
        raise ApiError(
            "The body must have either role, or drain with the value true", "role", code="invalid_value"
        )
    return Change(body.role or "", body.drain)
