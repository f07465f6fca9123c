"""Measure how many events the load generator can read on one core: ``make bench-loadgen``.

A second process sends server-sent events on many streams at once, at rising rates, and puts the time into
each event; both processes read the same clock. The generator reads the events as in any run. The table has
events a second, CPU per event, and how long an event waited until the generator had read it. For comparison,
h11's own body path and httpx read the same events.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import h11
import httpx
import numpy as np
import orjson
import trio

from loadgen.answer import Answer
from loadgen.client import Client
from loadgen.wire import Events

PATH = "/v1/completions"
BODY = orjson.dumps({"prompt": "x", "stream": True})
DELAY_LIMIT_MS = 50.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1763900000,"model":"stub",'
    b'"choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null}],"at":%.6f}\n\n'
)


# ---- the server: as little as possible, so that the generator is what is measured --------------------------


@attrs.define
class Hose:
    """Sends an event on every stream at each tick. It does not use trio: an event costs one send."""

    rate: float
    """Events a second on each stream."""
    count: int
    """Events per stream."""
    streams: dict[socket.socket, int] = attrs.field(factory=dict)
    """Number of events left, by connection."""
    selector: selectors.BaseSelector = attrs.field(factory=selectors.DefaultSelector)

    def serve(self, listener: socket.socket) -> None:
        """Serve until the process is killed."""
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        tick = time.monotonic()
        while True:
            for key, _ in self.selector.select(max(0.0, tick - time.monotonic())):
                assert isinstance(key.fileobj, socket.socket)
                self._accept(listener) if key.fileobj is listener else self._read(key.fileobj, key.data)
            if time.monotonic() >= tick:
                tick = max(tick + 1 / self.rate, time.monotonic())
                self._spray()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, bytearray())

    def _read(self, connection: socket.socket, got: bytearray) -> None:
        data = connection.recv(65_536)
        got += data
        if not data:
            self.selector.unregister(connection)
            self.streams.pop(connection, None)
            connection.close()
        elif got.endswith(BODY):
            got.clear()
            connection.send(HEAD)
            self.streams[connection] = self.count

    def _spray(self) -> None:
        for connection, left in list(self.streams.items()):
            event = EVENT % time.monotonic()
            data = b"%x\r\n%s\r\n" % (len(event), event)
            if left == 1:
                data += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
            try:
                connection.send(data)
            except OSError:
                left = 1  # the client has closed the connection, or does not read at all
            self.streams[connection] = left - 1
            if left == 1:
                del self.streams[connection]


# ---- the clients -------------------------------------------------------------------------------------------


@attrs.define
class Reading:
    """Delays of the events that a client has read."""

    delays_s: list[float] = attrs.field(factory=list)

    def event(self, data: bytes) -> None:
        """Record an event's delay since the time in it."""
        if data.startswith(b"{"):
            self.delays_s.append(time.monotonic() - orjson.loads(data)["at"])


async def ours(port: int, reading: Reading, client: Client) -> None:
    """The generator's own client and answer.

    Reading an event's time parses its JSON a second time, which counts against the generator.
    """
    answer = Answer()

    def on_event(name: str, data: bytes, now: float) -> None:
        answer.receive(name, data, now)
        reading.event(data)

    await client.post(PATH, BODY, on_event)


async def through_h11(port: int, reading: Reading) -> None:
    """A client that uses h11 for heads and bodies."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    connection, events, answer = h11.Connection(h11.CLIENT), Events(), Answer()
    head = h11.Request(
        method="POST", target=PATH, headers=[("Host", "x"), ("Content-Length", str(len(BODY)))]
    )
    for part in (head, h11.Data(data=BODY), h11.EndOfMessage()):
        await stream.send_all(connection.send(part) or b"")
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(65_536)))
        elif isinstance(event, h11.Data):
            for name, data in events.receive(bytes(event.data)):
                answer.receive(name, data, trio.current_time())
                reading.event(data)
        elif isinstance(event, h11.EndOfMessage):
            break
    await stream.aclose()


async def through_httpx(port: int, reading: Reading, client: httpx.AsyncClient) -> None:
    """A client that uses httpx and reads lines."""
    answer = Answer()
    async with client.stream("POST", f"http://127.0.0.1:{port}{PATH}", content=BODY) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                answer.receive("message", line[6:].encode(), trio.current_time())
                reading.event(line[6:].encode())


One = Callable[[int, Reading], Awaitable[None]]


async def all_at_once(one: One, port: int, streams: int) -> dict[str, float]:
    """Run a client on ``streams`` streams at once and return the figures."""
    reading = Reading()
    began, cpu = time.monotonic(), time.process_time()
    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(one, port, reading)
            if number % 50 == 49:
                await trio.sleep(0.01)  # the listener's queue is short
    took, used = time.monotonic() - began, time.process_time() - cpu
    delays = np.percentile(np.array(reading.delays_s) * 1e3, (50, 99))
    return {
        "events": len(reading.delays_s),
        "events_per_s": len(reading.delays_s) / took,
        "cpu_us_per_event": used / len(reading.delays_s) * 1e6,
        "cpu_percent": used / took * 100,
        "delay_p50_ms": float(delays[0]),
        "delay_p99_ms": float(delays[1]),
    }


async def measure(client: str, port: int, streams: int) -> dict[str, float]:
    """Run one kind of client and return its figures."""
    if client == "httpx":
        limits = httpx.Limits(max_connections=streams)
        async with httpx.AsyncClient(timeout=600, limits=limits) as session:
            return await all_at_once(lambda p, r: through_httpx(p, r, session), port, streams)
    if client == "h11":
        return await all_at_once(through_h11, port, streams)
    keeping = Client(f"http://127.0.0.1:{port}")
    try:
        return await all_at_once(lambda p, r: ours(p, r, keeping), port, streams)
    finally:
        await keeping.aclose()


def against_hose(client: str, streams: int, rate: float, count: int) -> dict[str, float]:
    """Run one kind of client against a :class:`Hose` in a separate process and return its figures."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.set_inheritable(True)
        words = [sys.executable, __file__, "--hose", str(listener.fileno()), str(rate / streams), str(count)]
        hose = subprocess.Popen(words, pass_fds=[listener.fileno()])
        try:
            return trio.run(measure, client, listener.getsockname()[1], streams)
        finally:
            hose.send_signal(signal.SIGKILL)
            hose.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument(
        "--rates", default="5000,10000,15000,20000", help="events a second, all streams together"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--clients", default="loadgen,h11,httpx")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--hose", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.hose:
        descriptor, rate, count = given.hose
        Hose(float(rate), int(count)).serve(socket.socket(fileno=int(descriptor)))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
          f"{given.streams} streams", flush=True)  # fmt: skip
    print("client    offered/s  events/s  CPU us/event   CPU %   delay p50, ms   p99, ms", flush=True)
    found = []
    for client in given.clients.split(","):
        for rate in map(float, given.rates.split(",")):
            count = max(1, round(given.seconds * rate / given.streams))
            figures = against_hose(client, given.streams, rate, count)
            found.append({"client": client, "streams": given.streams, "offered_per_s": rate, **figures})
            print(
                f"{client:8} {rate:10,.0f} {figures['events_per_s']:9,.0f} {figures['cpu_us_per_event']:13.1f}"
                f" {figures['cpu_percent']:7.0f} {figures['delay_p50_ms']:15.1f} {figures['delay_p99_ms']:9.1f}",
                flush=True,
            )
            if figures["events_per_s"] < 0.7 * rate:
                break  # at higher rates the client would only fall further behind
    kept = [
        one for one in found if one["client"] == "loadgen" and float(one["delay_p99_ms"]) <= DELAY_LIMIT_MS
    ]
    best = max((float(one["events_per_s"]) for one in kept), default=0.0)
    print(
        f"with 99 % of events read within {DELAY_LIMIT_MS:g} ms, loadgen took up to {best:,.0f} events/s",
        flush=True,
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
