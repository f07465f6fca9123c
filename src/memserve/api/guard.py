"""Checks before every handler: API keys, and limits on what a client may send. Pure ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac

import attrs
import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memserve.api.errors import ApiError
from memserve.api.service import ApiSettings
from memserve.panics import panics_as_errors
from memserve.scopes import scope_of_key

OPEN_PATHS = ("/health", "/metrics")
"""Paths that load balancers and metrics scrapers request, which have no key."""

CALLER = "memserve.caller"
"""Key of the ASGI scope under which the request's :class:`Caller` is."""


@attrs.frozen
class Caller:
    """The owner of a request's key, and what this key may do."""

    tenant: str
    """Its scope, see :mod:`memserve.scopes`."""
    may_administrate: bool = True
    """Whether it may change workers."""
    may_hurry: bool = True
    """Whether it may ask for a priority below 0."""


ANYONE = Caller("")
"""The caller of open paths, and of all paths if no keys are set."""


def caller(key: str, settings: ApiSettings) -> Caller:
    """The tenant and the permissions of a key."""
    return Caller(
        scope_of_key(key),
        may_administrate=not settings.admin_keys or key in settings.admin_keys,
        may_hurry=not settings.priority_keys or key in settings.priority_keys,
    )


class Guard:
    """Refuses requests that no handler must see, and limits the bodies of the others while they are read."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [
            (hashlib.sha256(key.encode()).digest(), caller(key, settings)) for key in settings.api_keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        try:
            scope[CALLER] = ANYONE if scope["path"] in OPEN_PATHS else self._authenticate(headers)
            self._check_framing(headers)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        with panics_as_errors():
            return await self._app(scope, _Limited(receive, self._settings), send)

    def _authenticate(self, headers: list[tuple[bytes, bytes]]) -> Caller:
        """The caller whose key the request has. Raises ApiError (401)."""
        if not self._keys:
            return ANYONE
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared in constant time: the timing does not reveal which key came close.
        callers = [one for known, one in self._keys if hmac.compare_digest(known, digest)]
        if scheme.lower() == b"bearer" and callers:
            return callers[0]
        message = "Give a valid API key: Authorization: Bearer YOUR_KEY"
        raise ApiError(message, None, 401, "invalid_api_key", {"www-authenticate": "Bearer"})

    def _check_framing(self, headers: list[tuple[bytes, bytes]]) -> None:
        lengths = [value for name, value in headers if name == b"content-length"]
        if lengths and any(name == b"transfer-encoding" for name, _ in headers):
            # Two lengths for one body make request smuggling possible (RFC 9112, 6.1).
            message = "Content-Length and Transfer-Encoding in one request; send one of them"
            raise ApiError(message, None, 400, "invalid_framing", {"connection": "close"})
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._settings.body_bytes_max:
            raise _too_large(self._settings)


class _Limited:
    """Wraps ``receive``; raises ApiError if the body grows too large (413) or takes too long (408)."""

    def __init__(self, receive: Receive, settings: ApiSettings) -> None:
        self._receive = receive
        self._settings = settings
        self._bytes = 0
        self._more = True
        self._deadline = trio.current_time() + settings.body_timeout_s

    async def __call__(self) -> Message:
        if not self._more:
            # Only the client's disconnect can come now, and it has no deadline.
            return await self._receive()
        with trio.move_on_at(self._deadline):
            return self._counted(await self._receive())
        message = f"The body was not there after {self._settings.body_timeout_s:g} s"
        raise ApiError(message, None, 408, "body_timeout", {"connection": "close"})

    def _counted(self, message: Message) -> Message:
        self._bytes += len(message.get("body", b""))
        self._more = message.get("more_body", False)
        if self._bytes > self._settings.body_bytes_max:
            raise _too_large(self._settings)
        return message


def _too_large(settings: ApiSettings) -> ApiError:
    message = f"The body is larger than {settings.body_bytes_max} bytes"
    return ApiError(message, None, 413, "body_too_large", {"connection": "close"})
