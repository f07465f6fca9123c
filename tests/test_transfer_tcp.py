"""The TCP path with wrong, damaged, repeated and broken connections: no side waits, and no transfer is complete by
mistake."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager

import pytest
import trio

from memserve.transfer import tcp, tcp_wire
from memserve.transfer.actions import Received, ReceiveFailed
from memserve.transfer.mover import PieceFeed
from memserve.transfer.tcp_wire import Header, Hello
from memserve.transfer.values import Piece, TransferDone
from memserve.transfer_messages import Failure, Granularity, Way
from movers import GEOMETRY, PAGES, pair


@pytest.fixture
def place(tmp_path_factory):
    """The directory where arenas are served."""
    return tmp_path_factory.mktemp("t")


def hello(both, number, **changes):
    """The hello of an expected transfer of one page, with changes."""
    token = changes.pop("token", both.way.data)
    fields = {"sender": "a.1", "id": number, "pages": 1} | changes
    return Hello(page_bytes=GEOMETRY.page_bytes, parts=1, **fields).encode(token)


@asynccontextmanager
async def connected(both):
    """A connection to the receiver that the test writes to itself."""
    host, port = both.way.address.split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        yield stream


async def rest(stream):
    """Everything that is still received."""
    received = b""
    while some := await stream.receive_some():
        received += some
    return received


@asynccontextmanager
async def proxy(way, spoil):
    """A path through a relay that gives every chunk to ``spoil`` and forwards the result; None cuts the connection."""

    async def relay(client):
        host, port = way.address.split(":")
        server = await trio.open_tcp_stream(host, int(port))
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(pump, server, client, lambda chunk: chunk)
            await pump(client, server, spoil)
            nursery.cancel_scope.cancel()

    async def pump(source, sink, change):
        try:
            async for chunk in source:
                chunk = change(chunk)
                if chunk is None:
                    return
                await sink.send_all(chunk)
        except trio.BrokenResourceError:
            return

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, relay, 0)
        port = listeners[0].socket.getsockname()[1]
        yield Way("tcp", f"127.0.0.1:{port}", way.data)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"token": bytes(32)}, "token"),
        ({"sender": "a.2"}, "not expected"),
        ({"id": 9}, "not expected"),
        ({"pages": 2}, "not what was granted"),
    ],
)
async def test_only_what_was_granted_is_let_in(changes, text, place):
    """A hello with a wrong token, sender, id or size is refused, and nothing is written."""
    async with pair("tcp", place) as both:
        transfer = both.transfer([0], [1])
        async with connected(both) as stream:
            await stream.send_all(hello(both, transfer.id, **changes) + bytes(50_000))
            answer = await rest(stream)
        assert answer.startswith(b"F") and b"refused" in answer and text.encode() in answer
        assert not any(both.destination) and both.reported == []
        assert isinstance(await both.send(transfer), TransferDone), "the granted transfer still works"


async def test_a_hello_that_was_overheard_opens_nothing_else(place):
    """The proof in one transfer's hello does not work for another transfer: the network may be listened to."""
    async with pair("tcp", place) as both:
        transfer = both.transfer([0], [1])
        heard = hello(both, transfer.id + 1)
        assert both.way.data not in heard
        mine = hello(both, transfer.id, token=bytes(32))
        start = len(tcp_wire.MAGIC) + 4
        forged = (
            mine[:start] + heard[start : start + tcp_wire.PROOF_BYTES] + mine[start + tcp_wire.PROOF_BYTES :]
        )
        async with connected(both) as stream:
            await stream.send_all(forged)
            assert b"token" in await rest(stream)
        assert isinstance(await both.send(transfer), TransferDone)


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n" + bytes(100), b"\0" * 200, tcp_wire.MAGIC + b"\xff" * 200],
)
async def test_noise_is_refused(noise, place):
    """Bytes that are no hello are refused, and nothing is written."""
    async with pair("tcp", place) as both, connected(both) as stream:
        await stream.send_all(noise)
        assert (await rest(stream)).startswith(b"F")
        assert not any(both.destination)


async def test_who_says_nothing_is_let_go(place, monkeypatch):
    """Connections that send nothing are closed, so that they do not keep senders out."""
    monkeypatch.setattr(tcp, "CONNECT_S", 0.1)
    monkeypatch.setattr(tcp, "CONNECTIONS_MAX", 1)
    async with pair("tcp", place) as both:
        async with connected(both) as silent, connected(both) as refused:
            assert await refused.receive_some() == b""
            assert (await rest(silent)).startswith(b"F")
        assert isinstance(await both.send(both.transfer([0], [0])), TransferDone)


async def test_a_second_connection_for_one_transfer_is_refused_and_harmless(place):
    """A second connection for a running or finished transfer is refused and changes nothing."""
    async with pair("tcp", place) as both:
        transfer = both.transfer([0, 1], [2, 3], Granularity.BY_LAYER)
        feed = PieceFeed(2, GEOMETRY.layers)
        outcome = []

        async def send():
            outcome.append(await both.send(transfer, feed))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            feed.put((Piece(0, 2, 0),))
            while not any(both.destination):
                await trio.sleep(0.001)
            again = await both.send(transfer)
            assert again.failure is Failure.REFUSED and "coming in already" in again.message
            feed.put(tuple(Piece(0, 2, layer) for layer in range(1, GEOMETRY.layers)))
        assert isinstance(outcome[0], TransferDone) and both.reported == [Received("a.1", 1)]
        both.assert_moved(transfer)
        late = await both.send(transfer)
        assert late.failure is Failure.REFUSED and both.reported == [Received("a.1", 1)]
        both.assert_moved(transfer)


async def test_damaged_bytes_fail_on_both_sides(place):
    """A flipped bit fails the transfer on both sides."""
    seen = 0

    def flip(chunk):
        nonlocal seen
        before, seen = seen, seen + len(chunk)
        if before <= 60_000 < seen:
            chunk = bytearray(chunk)
            chunk[60_000 - before] ^= 4
        return chunk

    async with pair("tcp", place) as both, proxy(both.way, flip) as both.way:
        result = await both.send(both.transfer(range(8), range(8)))
        assert result.failure is Failure.CHECKSUM
        assert [one.failure for one in both.reported] == [Failure.CHECKSUM]


async def test_a_connection_cut_in_the_middle_fails_on_both_sides(place):
    """A connection that is cut in the middle fails the transfer on both sides."""
    left = 100_000

    def cut(chunk):
        nonlocal left
        left -= len(chunk)
        return chunk if left > 0 else None

    async with pair("tcp", place) as both, proxy(both.way, cut) as both.way:
        result = await both.send(both.transfer(range(PAGES), range(PAGES)))
        while not both.reported:
            await trio.sleep(0.001)
        assert result.failure is Failure.CUT
        assert [one.failure for one in both.reported] == [Failure.CUT]
        assert any(both.destination), "cut too early to mean anything"


async def test_a_line_that_goes_dead_fails_on_both_sides(place, monkeypatch):
    """A connection without any data for STALL_S fails the transfer on both sides."""
    monkeypatch.setattr(tcp_wire, "STALL_S", 0.3)
    left = 100_000

    def swallow(chunk):
        nonlocal left
        left -= len(chunk)
        return chunk if left > 0 else b""

    async with pair("tcp", place) as both, proxy(both.way, swallow) as both.way:
        result = await both.send(both.transfer(range(PAGES), range(PAGES)), deadline_s=60.0)
        while not both.reported:
            await trio.sleep(0.01)
        assert result.failure is Failure.CUT
        assert [one.failure for one in both.reported] == [Failure.CUT]


async def test_a_slow_prefill_is_not_a_dead_line(place, monkeypatch):
    """Pauses between two layers, longer than STALL_S, do not fail a transfer."""
    monkeypatch.setattr(tcp_wire, "STALL_S", 0.15)
    async with pair("tcp", place) as both:
        transfer = both.transfer([5], [6], Granularity.BY_LAYER)
        feed = PieceFeed(1, GEOMETRY.layers)

        async def prefill():
            for layer in range(GEOMETRY.layers):
                await trio.sleep(0.2)
                feed.put((Piece(0, 1, layer),))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefill)
            assert isinstance(await both.send(transfer, feed), TransferDone)
        both.assert_moved(transfer)


async def test_a_receiver_that_stops_says_so_and_writes_no_more(place):
    """A receiver that stops a transfer reports it to the sender and writes no more bytes."""
    async with pair("tcp", place) as both:
        transfer = both.transfer([0, 1], [2, 3], Granularity.BY_LAYER)
        feed = PieceFeed(2, GEOMETRY.layers)
        outcome = []

        async def send():
            outcome.append(await both.send(transfer, feed))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            feed.put((Piece(0, 2, 0),))
            while not any(both.destination):
                await trio.sleep(0.001)
            assert both.receiver.stop(("a.1", 1))
        both.destination[:] = bytes(len(both.destination))
        feed.put((Piece(0, 2, 1),))
        await trio.sleep(0.02)
        assert outcome[0].failure is Failure.WITHDRAWN
        assert [type(one) for one in both.reported] == [ReceiveFailed]
        assert not any(both.destination)
        both.transfer([0], [0])
        assert not both.receiver.stop(("a.1", 2)), "nothing had come in"
        assert both.receiver.stop(("a.1", 2)), "and now there is nothing left to stop"


async def test_repeated_frames_are_harmless_and_strange_ones_end_it(place):
    """A repeated frame does not count twice, and an invalid one ends the transfer."""
    async with pair("tcp", place) as both, connected(both) as stream:
        transfer = both.transfer([0, 1], [2, 3])
        payload = bytes(both.source[: GEOMETRY.page_bytes])
        frame = Header(Piece(0, 1), tcp.zlib.crc32(payload)).encode() + payload
        await stream.send_all(hello(both, transfer.id, pages=2) + 2 * frame)
        while bytes(both.destination[2 * GEOMETRY.page_bytes :][: len(payload)]) != payload:
            await trio.sleep(0.001)
        assert both.reported == []
        await stream.send_all(struct.pack("<IIII", 1, 2, 0, 0))
        answer = await rest(stream)
        assert answer.startswith(b"AF") and b"refused" in answer
        assert [one.failure for one in both.reported] == [Failure.REFUSED]
