"""Serves an ASGI application with anycorn, inside the caller's nursery."""

from __future__ import annotations

import select
import socket
from typing import Any

import anycorn
import attrs
import trio
from anycorn import tcp_server
from anycorn.events import Event, Updated
from anycorn.protocol.h11 import H11Protocol
from anycorn.tcp_server import TCPServer
from anyio._backends import _trio as backend
from anyio.abc import SocketAttribute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memserve.accepting import accepted
from memserve.api.direct import DIRECT, DirectWriter
from memserve.api.listening import BACKLOG, listen

KEEP_ALIVE_S = 30.0
"""Longer than the 5 s for which clients keep an idle connection: the client closes it first, so that no
request is sent on a connection that the server is just closing."""
LOOK_S = 2.0
"""Interval at which a waiting request's connection is looked at."""


class PatientListener(backend.TCPSocketListener):
    """Goes on after errors that pass; anyio's listener ends the server at every error."""

    async def accept(self) -> backend.SocketStream:
        return await accepted(super().accept)


class PromptServer(TCPServer):
    """One connection, closed as soon as its client has left.

    anycorn's own waits for KEEP_ALIVE_S first, so that clients with a new connection for each request would
    use up the descriptors.
    """

    _left = False
    """Whether the client has closed its side."""

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not (self._left and isinstance(event, Updated)):  # an Updated would start the wait again
            await super().protocol_send(event)


# anycorn and anyio offer no other way to replace these two.
backend.TCPSocketListener = PatientListener  # type: ignore[misc]
tcp_server.TCPServer = PromptServer  # type: ignore[misc]


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
    """Serve until ``shutdown`` is set, then let running requests continue for ``graceful_s``.

    Reports the bound port. ``reuse_port`` lets several processes share the port. Raises UserError when the
    address cannot be bound.
    """
    listener = listen(host, port, reuse_port)
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
    """Handles anycorn's start-up and shutdown messages itself: Starlette reports a cancellation as a failure.

    Adds the extension of :mod:`memserve.api.direct` if the connection allows it, and looks at the connection
    while a request waits.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            if (connection := _plain_socket(scope, send)) is not None:
                scope["extensions"][DIRECT] = DirectWriter(connection)
                receive = _Watching(receive, connection)
            return await self.app(scope, receive, send)
        for _ in ("startup", "shutdown"):
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
        return None


@attrs.frozen
class _Watching:
    """Wraps ``receive``. Notices that the client is gone where the server does not.

    If bytes come after a request, of the next one or a line break too many, the server reads no more until it
    has answered the first.
    """

    receive: Receive
    connection: socket.socket

    async def __call__(self) -> Message:
        while True:
            with trio.move_on_after(LOOK_S):
                return await self.receive()
            if _hung_up(self.connection):
                return {"type": "http.disconnect"}


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection, whatever is left to read."""
    if connection.fileno() < 0:
        return True
    looking = select.poll()
    looking.register(connection, select.POLLRDHUP)
    return bool(looking.poll(0))


def _plain_socket(scope: Scope, send: Send) -> socket.socket | None:
    """The socket under anycorn's layers, if it carries unencrypted HTTP/1.1, where bodies are sent in chunks.

    Also None if the layers are not those expected here: everything then goes through them.
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
    """The object to which a method is bound; None for a plain function."""
    return getattr(method, "__self__", None)


@attrs.frozen
class _Started:
    """Reports the port to the caller, in place of the URLs that anycorn makes up."""

    task_status: trio.TaskStatus[int]
    port: int

    def started(self, _urls: list[str] | None = None) -> None:
        self.task_status.started(self.port)
