"""Where a Frontend listens. Apart from the server, which the supervisor would have to import to find that a port is taken."""

from __future__ import annotations

import errno
import socket

from memserve.errors import UserError

BACKLOG = 1024
SILENT_CLIENT_S = 30
"""A client that takes nothing for so long is cut off. anycorn shields its writes from cancellation, so without
this, one client that stops reading would keep the server from ever ending."""


def check_port(host: str, port: int) -> None:
    """Raise UserError when nobody could listen there now, or somebody does, on whatever terms."""
    listen(host, port, reuse_port=False).close()


def listen(host: str, port: int, reuse_port: bool) -> socket.socket:
    """A listening socket; ``reuse_port`` lets several processes share the port. Raises UserError."""
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
