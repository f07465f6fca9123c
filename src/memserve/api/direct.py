"""The fast path of a stream's events to its socket.

Through the server's layers, an event costs several times what its send does: two task switches, a lock, a
shielded scope, and an object for each of a handful of layers. Between a response's head and the end of its
body, none of these layers has anything to add.
"""

from __future__ import annotations

import socket

import trio

DIRECT = "memserve.direct"
"""The ASGI extension that holds a :class:`DirectWriter`, if the connection allows one."""


class DirectWriter:
    """Writes into the body of a response; the response's head and the body's end must go through the server.

    For HTTP/1.1's chunked coding (RFC 9112, 7.1) on a plain socket. Nothing else may write in between.
    """

    def __init__(self, connection: socket.socket) -> None:
        """``connection`` is non-blocking and belongs to the server."""
        self._connection = connection
        self._rest = b""

    def write(self, data: bytes) -> bool:
        """Send as much as the socket takes now. Returns whether that was all; if not, call :meth:`drain`."""
        assert data and not self._rest, (
            "a chunk before the last one has left, or an empty one, which ends the body"
        )
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        try:
            sent = self._connection.send(chunk)
        except OSError:  # full or broken: drain finds out which
            sent = 0
        self._rest = chunk[sent:]
        return not self._rest

    async def drain(self) -> None:
        """Send what is left, as fast as the client takes it. Raises OSError when the client is gone.

        If this is cancelled in the middle of a chunk, the connection cannot be used any more.
        """
        while self._rest:
            if self._connection.fileno() < 0:
                raise BrokenPipeError("the connection was closed")
            try:
                await trio.lowlevel.wait_writable(self._connection)
            except trio.ClosedResourceError as error:
                raise BrokenPipeError("the connection was closed") from error
            self._rest = self._rest[self._connection.send(self._rest) :]
