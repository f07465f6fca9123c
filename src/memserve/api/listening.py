"""The socket on which a Frontend listens.

Separate from the server, so that the supervisor need not import that to find out that a port is taken.
"""

from __future__ import annotations

import errno
import socket

from memserve.errors import UserError

BACKLOG = 1024
SILENT_CLIENT_S = 30
"""A client that takes no data for this long is cut off. anycorn shields its writes from cancellation, so
without this limit one client that stops reading would keep the server from ever ending."""


def check_port(host: str, port: int) -> None:
    """Raise UserError if the address cannot be bound now, or is in use, even with SO_REUSEPORT."""
    listen(host, port, reuse_port=False).close()


def listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    """Open a listening socket; ``reuse_port`` lets several processes share the port. Raises UserError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"frontend.host: {host!r} cannot be resolved: {error.strerror}") from error
    listener = socket.socket(family, kind)
    try:
        _set_options(listener, reuse_port)
        listener.bind(address)
        # A second process without SO_REUSEPORT sees only in listen() that the port is taken.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


def _set_options(listener: socket.socket, reuse_port: bool) -> None:
    """Set the listener's options. On Linux, accepted connections inherit all of them."""
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
        remedy = "stop the process that uses it, or set another port (0 takes a free one)"
        return UserError(f"frontend.port: {port} on {host} is in use already; {remedy}")
    if error.errno == errno.EACCES:
        return UserError(
            f"frontend.port: {port} needs privileges that this process lacks; set a port above 1023"
        )
    return UserError(f"frontend.host: cannot listen on {host!r}: {error.strerror}")
