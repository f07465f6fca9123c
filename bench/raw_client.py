"""A cheap HTTP client: raw sockets, one epoll, and no parsing except of each stream's last event.

It measures a server's limit with the client on the same cores, where a full HTTP library would dominate the
measurement. It reads streams of server-sent events to their end and counts the events.
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
"""Bytes kept from the end of a stream, to read its last event."""
READ_BYTES = 1 << 16


@attrs.define
class Stream:
    """One request and what has arrived of its answer. Times are ``time.perf_counter`` seconds."""

    socket: socket.socket
    began: float
    first: float = 0.0
    """When the first event arrived; 0 before that."""
    last: float = 0.0
    events: int = 0
    gaps: list[float] = attrs.field(factory=list)
    """Seconds between consecutive reads that contained events."""
    tail: bytes = b""

    def take(self, data: bytes, now: float) -> bool:
        """Process bytes; whether the body is complete. Raises ValueError unless the status is 200."""
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
        """Output tokens as the server counts them, from the usage in the last event."""
        return int(re.findall(rb'"completion_tokens":(\d+)', self.tail)[-1])


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """A POST request that closes its connection after the answer."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


def run_streams(port: int, requests: Sequence[bytes], limit_s: float = 120.0) -> list[Stream]:
    """Send all requests at once, each on its own connection, and read every answer to its end.

    Raises ValueError for a refusal, for a stream that is cut short, or if streams have not ended after
    ``limit_s``.
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
    """A kept-alive connection that reads one answer at a time."""

    socket: socket.socket
    _data: bytes = b""

    def take(self, data: bytes) -> bool:
        """Process received bytes; whether the answer is complete.

        Raises ValueError for a status other than 200, a closed connection, or an answer without a length.
        """
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
    """Answers per second of a closed loop, with one request at a time on each kept-alive connection.

    Answers must have status 200 and a Content-Length. Raises ValueError otherwise.
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
