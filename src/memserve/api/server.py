"""Serves an ASGI application with anycorn, inside the caller's nursery."""

from __future__ import annotations

import errno
import socket
from typing import Any

import anycorn
import attrs
import trio
from anycorn.protocol.h11 import H11Protocol
from anycorn.tcp_server import TCPServer
from anyio.abc import SocketAttribute
from starlette.types import ASGIApp, Receive, Scope, Send

from memserve.api.direct import DIRECT, DirectWriter
from memserve.errors import UserError

BACKLOG = 1024
KEEP_ALIVE_S = 30.0
"""Longer than the 5 s that clients keep an idle connection: the client closes first, and no request meets that."""
SILENT_CLIENT_S = 30
"""A client that takes nothing for so long is cut off. anycorn shields its writes from cancellation, so without
this, one client that stops reading would keep the server from ever ending."""


async def serve_http(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    shutdown: trio.Event,
    reuse_port: bool = False,
    graceful_s: float = 30.0,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until ``shutdown`` is set, then let running requests go on for ``graceful_s``. Reports the bound port.

    ``reuse_port`` lets several processes share the port. Raises UserError when the address cannot be bound.
    """
    listener = _bind(host, port, reuse_port)
    bound: int = listener.getsockname()[1]
    config = anycorn.Config()
    # anycorn owns the descriptor from here on, and closes it.
    config.bind = [f"fd://{listener.detach()}"]
    config.loglevel = "WARNING"
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.backlog = BACKLOG
    config.graceful_timeout = graceful_s
    started = _Started(task_status, bound)
    framework: Any = _Adapted(app)
    await anycorn.serve(framework, config, shutdown_trigger=shutdown.wait, mode="asgi", task_status=started)


@attrs.frozen
class _Adapted:
    """Answers anycorn's start-up and shutdown questions itself: Starlette reports a cancellation as a failure.

    Adds the extension of :mod:`memserve.api.direct`.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            if (connection := _plain_socket(scope, send)) is not None:
                scope["extensions"][DIRECT] = DirectWriter(connection)
            return await self.app(scope, receive, send)
        for _ in ("startup", "shutdown"):
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
        return None


def _plain_socket(scope: Scope, send: Send) -> socket.socket | None:
    """The socket under anycorn's layers, where what it carries is HTTP/1.1 in the clear and bodies come in chunks.

    None also where the layers are not those that are known here: all goes through them then.
    """
    protocol = _owner(getattr(_owner(send), "send", None))
    server = _owner(getattr(protocol, "send", None))
    if scope["http_version"] != "1.1" or not isinstance(protocol, H11Protocol) or protocol.tls is not None:
        return None
    if not isinstance(server, TCPServer):
        return None
    found: socket.socket = server.stream.extra(SocketAttribute.raw_socket)
    return found


def _owner(method: object) -> object:
    """Whose method it is; None for a plain function."""
    return getattr(method, "__self__", None)


@attrs.frozen
class _Started:
    """anycorn reports URLs of its own making; the caller wants to know the port."""

    task_status: trio.TaskStatus[int]
    port: int

    def started(self, _urls: list[str] | None = None) -> None:
        self.task_status.started(self.port)


def _bind(host: str, port: int, reuse_port: bool) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"frontend.host: {host!r} cannot be resolved: {error.strerror}") from error
    listener = socket.socket(family, kind)
    try:
        _set_options(listener, reuse_port)
        listener.bind(address)
        # Not before listen() does a second process without SO_REUSEPORT see that the port is taken.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


def _set_options(listener: socket.socket, reuse_port: bool) -> None:
    """On Linux, accepted connections inherit all of these."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", SILENT_CLIENT_S),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", SILENT_CLIENT_S * 1000),
    ):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _bind_error(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        remedy = "stop who uses it, or set another (0 takes a free one)"
        return UserError(f"frontend.port: {port} on {host} is in use already; {remedy}")
    if error.errno == errno.EACCES:
        return UserError(f"frontend.port: {port} needs privileges this process lacks; set one above 1023")
    return UserError(f"frontend.host: cannot listen on {host!r}: {error.strerror}")
