"""A client that costs little: raw sockets, one epoll, no parsing but of each stream's last event.

For measuring a server's own limit with a client on the same cores, where a full HTTP library would be what is
measured. It reads streams of server-sent events to their end and counts what came.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

import attrs

END = b"0\r\n\r\n"
"""The last chunk of a chunked body."""
TAIL_BYTES = 2048
"""Of a stream, kept to read its last event."""
READ_BYTES = 1 << 16


@attrs.define
class Stream:
    """One request and what has come back. Times are those of ``time.perf_counter``, in seconds."""

    socket: socket.socket
    began: float
    first: float = 0.0
    """When the first event came, or 0."""
    last: float = 0.0
    events: int = 0
    gaps: list[float] = attrs.field(factory=list)
    """Seconds between reads that brought something."""
    tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Take bytes in; whether the body is whole. Raises ValueError unless the answer is a stream with status 200."""
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"the server refused: {data[:300]!r}")
        if found := data.count(b"data: {"):
            if self.first:
                self.gaps.append(now - self.last)
            self.first = self.first or now
            self.last = now
            self.events += found
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        return self.tail.endswith(END)

    @property
    def output_tokens(self) -> int:
        """By the server's own account, in the usage of the last event."""
        return int(re.findall(rb'"completion_tokens":(\d+)', self.tail)[-1])


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """A POST whose connection ends with it."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


def run_streams(port: int, requests: Sequence[bytes], limit_s: float = 120.0) -> list[Stream]:
    """Send all requests at once, each on a connection of its own, and read every answer to its end.

    Raises ValueError for a refusal, a stream cut short, or one without an end within ``limit_s``.
    """
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in requests]
    poll = select.epoll()
    open_streams: dict[int, Stream] = {}
    done = []
    try:
        for connection, data in zip(connections, requests, strict=True):
            open_streams[connection.fileno()] = Stream(connection, time.perf_counter())
            connection.sendall(data)
            connection.setblocking(False)
            poll.register(connection.fileno(), select.EPOLLIN)
        deadline = time.perf_counter() + limit_s
        while open_streams:
            for descriptor, _ in poll.poll(limit_s):
                stream = open_streams[descriptor]
                data = stream.socket.recv(READ_BYTES)
                if not data:
                    raise ValueError(f"a stream ended early: {stream.tail[-200:]!r}")
                if stream.take(data, time.perf_counter()):
                    poll.unregister(descriptor)
                    done.append(open_streams.pop(descriptor))
            if time.perf_counter() > deadline:
                raise ValueError(f"{len(open_streams)} streams had not ended after {limit_s:g} s")
    finally:
        poll.close()
        for connection in connections:
            connection.close()
    return done


@attrs.define
class Exchange:
    """A kept connection of which one answer at a time is read."""

    socket: socket.socket
    _data: bytes = b""

    def take(self, data: bytes) -> bool:
        """Take bytes in; whether the answer is whole. Raises ValueError for another status than 200."""
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        if not data or not head.startswith(b"HTTP/1.1 200"[: len(head)]):
            raise ValueError(f"the server refused: {self._data[:300]!r}")
        if not separator:
            return False
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if length is None:
            raise ValueError(f"an answer without a length: {head!r}")
        if len(body) < int(length[1]):
            return False
        self._data = b""
        return True


def closed_loop(port: int, request: bytes, connections: int, seconds: float) -> float:
    """Answers a second when each of ``connections``, kept open, sends its next request after the answer.

    The answer must have a Content-Length and status 200. Raises ValueError otherwise.
    """
    poll = select.epoll()
    waiting = {}
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        poll.register(connection.fileno(), select.EPOLLIN)
        waiting[connection.fileno()] = Exchange(connection)
    try:
        began = time.perf_counter()
        for one in waiting.values():
            one.socket.sendall(request)
        answers = 0
        while time.perf_counter() < began + seconds:
            for descriptor, _ in poll.poll(seconds):
                one = waiting[descriptor]
                if one.take(one.socket.recv(READ_BYTES)):
                    answers += 1
                    one.socket.sendall(request)
        return answers / (time.perf_counter() - began)
    finally:
        poll.close()
        for one in waiting.values():
            one.socket.close()
