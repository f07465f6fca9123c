"""HTTP/1.1 and server-sent events without sockets: bytes in, event payloads out.

h11 reads and writes the heads. Bodies are decoded here: with a thousand streams, an event of a few tokens may
cost only a few microseconds, and h11's general body path costs several times that.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import h11

BODY_MAX = 64 * 1024 * 1024
"""Maximum size of an answer that is not a stream, and of one event or chunk; our requests need no more."""


class WireError(Exception):
    """The server sent something that is not HTTP, or not server-sent events."""


class IncompleteError(WireError):
    """The connection closed before the answer's end."""


@attrs.define
class Events:
    """Splits a stream into server-sent events."""

    _rest: bytes = b""

    def receive(self, data: bytes) -> list[tuple[str, bytes]]:
        """The events that are complete now: name (``message`` if none is given) and data.

        Comments are dropped.
        """
        data = self._rest + data
        if b"\r" in data:  # after joining: a line end of two bytes may arrive in two parts
            data = data.replace(b"\r\n", b"\n")
        blocks = data.split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > BODY_MAX:
            raise WireError(f"an event of more than {BODY_MAX} bytes")
        found = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:
                found.append(("message", block[6:]))
            elif event := _event(block):
                found.append(event)
        return found


def _event(block: bytes) -> tuple[str, bytes] | None:
    name, data = "message", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode(errors="replace")
    return (name, b"\n".join(data)) if data else None


@attrs.define
class Body:
    """Decodes a body: chunked, of known length, or up to the end of the connection."""

    chunked: bool
    left: int | None
    """Bytes still to come, if the length is known."""
    done: bool = False
    _rest: bytes = b""
    _trailers: bool = False

    def receive(self, data: bytes) -> bytes:
        """The decoded bytes. Nothing follows once ``done`` is set."""
        if self.chunked:
            return self._chunks(data)
        if self.left is None:
            return data
        taken = data[: self.left]
        self.left -= len(taken)
        self.done = self.left == 0
        return taken

    def _chunks(self, data: bytes) -> bytes:
        rest = self._rest + data
        parts: list[bytes] = []
        at = 0
        while not self.done:
            line_end = rest.find(b"\r\n", at)
            if line_end < 0:
                break
            if self._trailers:
                self.done = line_end == at
                at = line_end + 2
                continue
            size = _chunk_size(rest[at:line_end])
            if size == 0:
                self._trailers = True
                at = line_end + 2
                continue
            end = line_end + 2 + size
            if len(rest) < end + 2:
                break
            if rest[end : end + 2] != b"\r\n":
                raise WireError("a chunk without its end")
            parts.append(rest[line_end + 2 : end])
            at = end + 2
        self._rest = rest[at:]
        if len(self._rest) > BODY_MAX:
            raise WireError(f"a chunk of more than {BODY_MAX} bytes")
        return b"".join(parts)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        return int(digits, 16)
    except ValueError:
        raise WireError(f"not a chunk size: {digits[:40]!r}") from None


@attrs.define
class Exchange:
    """One request and its answer, on one connection."""

    status: int = 0
    headers: dict[str, str] = attrs.field(factory=dict)
    body: bytearray = attrs.field(factory=bytearray)
    """The body of an answer that is not a stream of events."""
    _h11: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT), init=False)
    _decoder: Body | None = attrs.field(default=None, init=False)
    _events: Events | None = attrs.field(default=None, init=False)
    _reusable: bool = attrs.field(default=False, init=False)

    def request(self, method: str, target: str, headers: Sequence[tuple[str, str]], body: bytes) -> bytes:
        """The request as bytes to send."""
        head = h11.Request(
            method=method, target=target, headers=[*headers, ("Content-Length", str(len(body)))]
        )
        parts = [
            self._h11.send(head),
            self._h11.send(h11.Data(data=body)),
            self._h11.send(h11.EndOfMessage()),
        ]
        return b"".join(part for part in parts if part)

    @property
    def done(self) -> bool:
        """Whether the complete answer has arrived."""
        return self._decoder is not None and self._decoder.done

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.done and self._reusable

    def receive(self, data: bytes) -> list[tuple[str, bytes]]:
        """Take in bytes (empty: the server has closed); returns the events that are complete now.

        Raises WireError for anything but HTTP.
        """
        if self._decoder is not None:
            return self._body(data)
        try:
            self._h11.receive_data(data)
            head = self._h11.next_event()
            while isinstance(head, h11.InformationalResponse):
                head = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise WireError(str(error)) from None
        if not isinstance(head, h11.Response):
            return []
        self._begin(head)
        trailing, _ = self._h11.trailing_data
        return self._body(trailing) if trailing or self.done else []

    def _begin(self, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        left = 0 if self.status in (204, 304) else int(length) if length is not None and not chunked else None
        self._decoder = Body(chunked, left, done=left == 0)
        self._reusable = (chunked or left is not None) and self.headers.get(
            "connection", ""
        ).lower() != "close"
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            self._events = Events()

    def _body(self, data: bytes) -> list[tuple[str, bytes]]:
        decoder = self._decoder
        assert decoder is not None
        if not data and not decoder.chunked and decoder.left is None:
            decoder.done = True
        decoded = decoder.receive(data)
        if self._events is not None:
            return self._events.receive(decoded) if decoded else []
        self.body += decoded
        if len(self.body) > BODY_MAX:
            raise WireError(f"an answer of more than {BODY_MAX} bytes")
        return []
