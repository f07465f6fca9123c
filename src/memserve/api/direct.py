"""The short way of a stream's events to its socket.

Through the server's layers an event costs several times what its send does: two task switches, a lock, a shielded scope, and
an object for each of a handful of layers. Between a response's head and the end of its body they all have nothing to add.
"""

from __future__ import annotations

import socket

import trio

DIRECT = "memserve.direct"
"""The ASGI extension that holds a :class:`DirectWriter`, where the connection allows one."""


class DirectWriter:
    """Writes into the body of a response whose head went out through the server; so must its end.

    For HTTP/1.1's chunked coding (RFC 9112, 7.1) on a plain socket. Nobody else may write meanwhile.
    """

    def __init__(self, connection: socket.socket) -> None:
        """``connection`` does not block, and is the server's."""
        self._connection = connection
        self._rest = b""

    def write(self, data: bytes) -> bool:
        """Send as much as the socket takes now; whether that was all. If not, :meth:`drain` must follow."""
        assert data and not self._rest, (
            "a chunk before the last one has left, or an empty one, which ends the body"
        )
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        try:
            sent = self._connection.send(chunk)
        except OSError:  # full, or broken: drain finds out
            sent = 0
        self._rest = chunk[sent:]
        return not self._rest

    async def drain(self) -> None:
        """Send what is left, as fast as the client takes it. Raises OSError when it is gone.

        Cancelled in the middle of a chunk, the connection is of no further use.
        """
        while self._rest:
            if self._connection.fileno() < 0:
                raise BrokenPipeError("the connection was closed")
            try:
                await trio.lowlevel.wait_writable(self._connection)
            except trio.ClosedResourceError as error:
                raise BrokenPipeError("the connection was closed") from error
            self._rest = self._rest[self._connection.send(self._rest) :]
