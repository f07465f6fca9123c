"""Which web pages of other origins may call the server from a browser (CORS, see the Fetch standard)."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST")
EXPOSED = ("retry-after", "x-request-id")
"""Headers of responses that pages may read, besides those that browsers always let them read."""
CHANGES = "/cluster/"
"""What begins the paths that change workers. No page of another origin may call these."""


def open_to(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """``app``, open to pages of these origins, or of any origin if "*" is among them; unchanged if there are none.

    Must be outermost: a preflight has no API key, and a browser hides errors without these headers from pages.
    """
    if not origins:
        return app
    cors = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=("*",),  # those that the page asks for, Authorization among them
        expose_headers=EXPOSED,
        allow_private_network=True,
    )
    return _Open(app, cors)


@attrs.frozen
class _Open:
    app: ASGIApp
    cors: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = scope["type"] == "http" and scope["path"].startswith(CHANGES)
        await (self.app if closed else self.cors)(scope, receive, send)
