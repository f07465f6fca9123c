"""The HTTP server on a real socket: limits, clients that disconnect, shutdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import trio
import trio.testing
import zmq

from fake_service import (
    FakeService,
    demo_spec,
    demo_tokenizer,
    says,
    served,
    settings,
)
from memserve.api.app import build_app
from memserve.api.server import serve_http
from memserve.api.service import Chunk
from memserve.errors import UserError

# ---- the server ----------------------------------------------------------------------------------------------


async def raw(url, *parts, until=b"", wait_s=5.0):
    """Send bytes on a new connection; returns what is received until ``until`` is in it, or the end."""
    host, port = url.removeprefix("http://").split(":")
    stream = await trio.open_tcp_stream(host, int(port))
    received = b""
    async with stream:
        for part in parts:
            await stream.send_all(part)
        with trio.move_on_after(wait_s):
            while (data := await stream.receive_some()) and not (until and until in received + data):
                received += data
            received += data
    return received


def head(length, extra=""):
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


WEBSOCKET = (
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


async def test_bodies_are_limited_in_size_time_and_framing():
    """Bodies that are too large, too slow or ambiguously framed are refused."""
    service = FakeService(lambda _r: says("x"))
    async with served(service, body_bytes_max=1000, body_timeout_s=0.2) as url:
        too_large = await raw(url, head(1001))
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        grown = await raw(url, chunked, *([b"1F4\r\n" + b" " * 500 + b"\r\n"] * 3))
        slow = await raw(url, head(100), b"{")
        both = await raw(url, head(2, "Transfer-Encoding: chunked\r\n"), b"0\r\n\r\n")
        fine = await raw(url, head(15), b'{"prompt": "x"}', until=b"usage")

    assert too_large.startswith(b"HTTP/1.1 413 ")
    assert grown.startswith(b"HTTP/1.1 413 ")
    assert slow.startswith(b"HTTP/1.1 408 ")
    assert both.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_framing" in both
    assert fine.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"gibberish\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (200 << 10) + b"\r\n\r\n", 431),
        (WEBSOCKET, 403),
    ],
)
async def test_what_never_becomes_a_request_has_a_status_alone(sent, status):
    """What is no valid HTTP request is answered with a status and no body, as docs/api.md says."""
    async with served(FakeService(lambda _r: says("x"))) as url:
        answer = await raw(url, sent)
    line, _, body = answer.partition(b"\r\n\r\n")
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert body == b""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", ["silent", "talking"])
async def test_a_client_that_leaves_cancels_its_request(stream, script):
    """When a client disconnects, its requests are cancelled at once, streamed or not."""
    talk = [step for _ in range(2000) for step in (Chunk((29,)), 0.005)]
    service = FakeService(lambda _r: talk if script == "talking" else [600.0])
    body = json.dumps({"prompt": "x", "stream": stream, "n": 2}).encode()
    async with served(service) as url:
        host, port = url.removeprefix("http://").split(":")
        client = await trio.open_tcp_stream(host, int(port))
        await client.send_all(head(len(body)) + body)
        while len(service.opened) < 2:
            await trio.sleep(0.01)
        await trio.sleep(0.05)
        left = trio.current_time()
        await client.aclose()
        await service.ended.wait()

        assert trio.current_time() - left < 0.5
        await trio.sleep(0.05)
        assert [request.outcome for request in service.opened] == ["cancelled", "cancelled"]


@pytest.mark.parametrize("more", [b"\r\n", head(15) + b'{"prompt": "x"}'], ids=["line break", "request"])
async def test_a_client_that_sends_more_and_leaves_cancels_its_request(more, monkeypatch):
    """The server reads no more until it has answered: workers would go on for nobody up to the answer's end."""
    monkeypatch.setattr("memserve.api.server.LOOK_S", 0.1)
    service = FakeService(lambda _r: [600.0])
    async with served(service) as url:
        host, port = url.removeprefix("http://").split(":")
        client = await trio.open_tcp_stream(host, int(port))
        await client.send_all(head(15) + b'{"prompt": "x"}' + more)
        while not service.opened:
            await trio.sleep(0.01)
        await trio.sleep(0.3)
        assert service.opened[0].outcome == "running"
        await client.aclose()
        with trio.fail_after(5):
            await service.ended.wait()
        await trio.sleep(0.05)
        assert [request.outcome for request in service.opened] == ["cancelled"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody():
    """A client that disconnects within its body starts no request and disturbs no other."""
    service = FakeService(lambda _r: says("x"))
    async with served(service) as url:
        host, port = url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as client:
            await client.send_all(head(100) + b"{")
        assert (await raw(url, head(15), b'{"prompt": "x"}', until=b"usage")).startswith(b"HTTP/1.1 200 ")
    assert len(service.opened) == 1


async def test_shutdown_lets_running_streams_finish_and_refuses_new_ones():
    """During a shutdown running streams finish, and new connections are refused."""
    app = build_app(
        FakeService(lambda _r: says("one two three", delay_s=0.1)), demo_tokenizer(), demo_spec(), settings()
    )
    shutdown = trio.Event()
    received = []
    async with trio.open_nursery() as nursery:

        async def serve(task_status):
            await serve_http(app, "127.0.0.1", 0, shutdown=shutdown, graceful_s=5, task_status=task_status)

        port = await nursery.start(serve)
        body = b'{"prompt": "x", "stream": true}'

        async def ask():
            received.append(await raw(f"http://127.0.0.1:{port}", head(len(body)) + body, until=b"[DONE]"))

        nursery.start_soon(ask)
        await trio.sleep(0.15)
        shutdown.set()
        await trio.sleep(0.05)
        with pytest.raises(OSError):
            await trio.open_tcp_stream("127.0.0.1", port)

    assert b"[DONE]" in received[0]


@pytest.mark.parametrize("stream", [True, False])
async def test_shutdown_does_not_wait_for_idle_connections(stream):
    """A shutdown does not wait for connections that clients keep open after an answer."""
    app = build_app(FakeService(lambda _r: says("x")), demo_tokenizer(), demo_spec(), settings())
    shutdown, ended = trio.Event(), trio.Event()
    body = json.dumps({"prompt": "x", "stream": stream}).encode()

    async def serve(task_status):
        await serve_http(app, "127.0.0.1", 0, shutdown=shutdown, graceful_s=600, task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            for _ in range(2):
                await client.send_all(head(len(body)) + body)
                received = b""
                while not (b"[DONE]" in received if stream else b"usage" in received):
                    received += await client.receive_some()
            await trio.testing.wait_all_tasks_blocked(0.05)
            shutdown.set()
            with trio.fail_after(20):
                await ended.wait()


async def test_a_client_that_stops_reading_cannot_keep_the_server_from_ending(monkeypatch):
    """A client that does not read is cut off, so that the server can end."""
    monkeypatch.setattr("memserve.api.listening.SILENT_CLIENT_S", 1)
    flood = [step for _ in range(300) for step in (Chunk(tuple(range(300, 5300))), 0.0)]
    service = FakeService(lambda _r: [*flood, 600.0])
    body = json.dumps({"prompt": "x", "stream": True, "return_token_ids": True}).encode()
    with trio.fail_after(20):
        async with served(service) as url:
            host, port = url.removeprefix("http://").split(":")
            client = trio.socket.socket()
            client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
            await client.connect((host, int(port)))
            await client.send(head(len(body)) + body)
            await trio.sleep(0.5)
        assert service.opened[0].outcome == "cancelled"
    client.close()


async def test_an_address_that_cannot_be_bound_is_named():
    """An address that cannot be bound gives an error with the setting's name."""
    service, shutdown = FakeService(lambda _r: []), trio.Event()
    async with served(service) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"frontend.port: {port} on 127.0.0.1 is in use already"):
            await serve_http(
                build_app(service, demo_tokenizer(), demo_spec(), settings()),
                "127.0.0.1",
                port,
                shutdown=shutdown,
            )
    with pytest.raises(UserError, match=r"frontend.host: cannot listen on '192\.0\.2\.1'"):
        await serve_http(lambda *_: None, "192.0.2.1", 0, shutdown=shutdown)


async def test_a_client_that_leaves_takes_its_connection_along():
    """Each request on a connection of its own would cost a descriptor for half a minute."""
    service = FakeService(lambda _r: says("x"))
    async with served(service) as url:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            assert await raw(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", until=b"ok")
            await raw(url, wait_s=0.0)
        with trio.fail_after(5):
            while len(os.listdir("/proc/self/fd")) > before + 2:
                await trio.sleep(0.05)


FEW_DESCRIPTORS = """
import resource, sys, trio, zmq
from starlette.applications import Starlette
from memserve.api.server import serve_http

async def main():
    inbox = zmq.Context.instance().socket(zmq.ROUTER)
    inbox.bind(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    async with trio.open_nursery() as nursery:
        serve = lambda task_status: serve_http(
            Starlette(), "127.0.0.1", 0, shutdown=trio.Event(), task_status=task_status
        )
        print(await nursery.start(serve), flush=True)

trio.run(main)
"""


async def test_more_clients_than_descriptors_end_no_server(folder):
    """Somebody who opens a thousand connections would end the Frontend, and every stream with it.

    Nor may they take the last descriptors: ZeroMQ aborts the process if it has none for another actor's connection.
    """
    inbox = f"ipc://{folder}/inbox.sock"
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", FEW_DESCRIPTORS, inbox]
        start = partial(trio.run_process, command, stdout=subprocess.PIPE)
        process = await nursery.start(start)
        url = f"http://127.0.0.1:{int(await process.stdout.receive_some(20))}"
        clients = [await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(60)]
        await trio.sleep(0.3)
        with zmq.Context() as context, context.socket(zmq.DEALER) as actor:
            actor.connect(inbox)
            await trio.sleep(0.3)
        for client in clients:
            await client.aclose()
        assert (await raw(url, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", until=b"Not Found")).startswith(
            b"HTTP/1.1 404"
        )
        nursery.cancel_scope.cancel()
