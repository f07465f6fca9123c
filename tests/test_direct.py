"""Events of a stream written straight to the socket: the same bytes, whatever the client and the socket do."""

from __future__ import annotations

import json
import socket
from array import array

import attrs
import h11
import httpx
import pytest
import trio
import trio.testing

from fake_service import FakeService, demo_spec, demo_tokenizer, says, served, settings, sse
from memserve.api.app import build_app
from memserve.api.direct import DIRECT, DirectWriter
from memserve.api.service import Chunk
from memserve.drawing import PromptLogprobs
from memserve.errors import RequestFailed
from memserve.tokens import pack

BODY = {"prompt": "x", "stream": True, "return_token_ids": True}


def tokens_of(text: str) -> list[int]:
    """The token ids of all events in a body."""
    chunks = [json.loads(one) for one in sse(text) if one != "[DONE]"]
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]


# ---- the writer ----------------------------------------------------------------------------------------------


@pytest.fixture
def ends():
    """A server's socket with a small buffer, and its client's."""
    server, client = socket.socketpair()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.setblocking(False)
    yield server, client
    server.close()
    client.close()


async def test_a_full_socket_keeps_the_rest_for_later(ends):
    """What a full socket does not take is written by drain, and the chunk arrives whole."""
    server, client = ends
    writer, data = DirectWriter(server), bytes(range(256)) * 2000
    assert not writer.write(data)
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.drain)
        with trio.fail_after(10):
            while len(received) < len(data) + 9:
                received += await trio.to_thread.run_sync(client.recv, 65536)
    assert received == b"%x\r\n%b\r\n" % (len(data), data)
    assert writer.write(b"next")
    assert client.recv(100) == b"4\r\nnext\r\n"


@pytest.mark.parametrize("how", ["client", "server", "server while it waits"])
async def test_a_connection_that_ends_is_an_error_of_drain(ends, how):
    """A connection that ends makes drain raise, never write: that runs in a turn of the Frontend for all requests."""
    server, client = ends
    writer = DirectWriter(server)
    if how == "server":
        server.close()
    assert not writer.write(bytes(1_000_000))
    if how == "client":
        client.close()
    ended = trio.Event()

    async def drain():
        with pytest.raises(OSError):
            await writer.drain()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        if how == "server while it waits":
            trio.lowlevel.notify_closing(server)
            server.close()
        with trio.fail_after(10):
            await ended.wait()


# ---- a response ----------------------------------------------------------------------------------------------


@attrs.define
class Paper:
    """A connection that records what was written, and how.

    ``takes``: whether the socket takes each write whole, True beyond its end.
    """

    takes: list[bool] = attrs.field(factory=list)
    drain_s: float = 10.0
    written: list[tuple[str, bytes]] = attrs.field(factory=list)
    full: bool = False

    def write(self, data: bytes) -> bool:
        assert not self.full, "written before the rest has left"
        self.written.append(("direct", data))
        self.full = not (self.takes.pop(0) if self.takes else True)
        return not self.full

    async def drain(self) -> None:
        if self.full:
            await trio.sleep(self.drain_s)
            self.full = False

    def through(self, app):
        """The application on a server that offers direct writes."""

        async def wrapped(scope, receive, send):
            async def noted(message):
                assert not self.full, "sent before the rest has left"
                if message.get("body"):
                    self.written.append(("server", message["body"]))
                await send(message)

            await app(scope | {"extensions": {DIRECT: self}}, receive, noted)

        return wrapped

    @property
    def text(self) -> str:
        return b"".join(data for _, data in self.written).decode()

    @property
    def ways(self) -> str:
        """For each write, d for direct or s for through the server."""
        return "".join(way[0] for way, _ in self.written)


async def answered(paper: Paper, *scripts: list, **body) -> Paper:
    """The response to one request with as many answers as there are scripts."""
    service = FakeService(lambda request: scripts[request.params.sampling.seed])
    app = build_app(service, demo_tokenizer(), demo_spec(), settings())
    transport = httpx.ASGITransport(paper.through(app), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(
            "/v1/completions", json=BODY | {"n": len(scripts), "seed": 0} | body, timeout=None
        )
    assert response.status_code == 200
    return paper


def spaced(gap_s: float, *tokens: int) -> list:
    """A script with one token each ``gap_s``, the last one together with the end."""
    steps = [step for token in tokens for step in (gap_s, Chunk((token,)))]
    return [*steps[:-1], Chunk(tokens[-1:], "length")]


async def test_each_event_goes_the_short_way_at_once(autojump_clock):
    """Each event is written directly, without the server's task switches."""
    paper = await answered(Paper(), spaced(1.0, *range(300, 310)))
    assert paper.ways == "d" * 10
    assert tokens_of(paper.text) == list(range(300, 310))
    assert paper.text.endswith("data: [DONE]\n\n")


async def test_what_comes_while_a_client_does_not_take_gathers(autojump_clock):
    """While the socket is full, tokens gather and are sent as one event when it has room."""
    paper = await answered(Paper([True, True, False], drain_s=3.5), spaced(1.0, *range(300, 310)))
    assert paper.ways == "d" * 8
    assert tokens_of(paper.text) == list(range(300, 310))
    assert tokens_of(paper.written[3][1].decode()) == [303, 304, 305]


async def test_pings_count_from_the_last_event_by_either_way(autojump_clock):
    """Pings are sent after silence only, counted from the last event, whichever way it was written."""
    steps = [*spaced(10.0, *range(300, 306))[:-1], Chunk((305,)), 40.0, Chunk((306,), "length")]
    paper = await answered(Paper(), steps)
    assert paper.ways == "d" * 9
    assert [data for _, data in paper.written[6:8]] == [b": waiting\n\n"] * 2
    assert tokens_of(paper.text) == list(range(300, 307))


async def test_answers_that_end_at_different_times_share_the_short_way(autojump_clock):
    """Several answers of one response, which end at different times, are each written whole."""
    scripts = spaced(1.0, 300, 301, 302), [1.5, *spaced(1.0, 400, 401, 402, 403)]
    paper = await answered(Paper(), *scripts, echo=True)
    assert paper.ways == "d" * 7
    choices = [json.loads(one)["choices"][0] for one in sse(paper.text) if one != "[DONE]"]
    for index, tokens in enumerate(([300, 301, 302], [400, 401, 402, 403])):
        mine = [one for one in choices if one["index"] == index]
        assert [token for one in mine for token in one["token_ids"]] == tokens
        assert mine[0]["text"] == "x"
        assert [one["finish_reason"] for one in mine] == [None] * len(tokens) + ["length"]


async def test_the_scores_of_a_prompt_go_before_all_that_came_sooner():
    """Tokens that arrive before the scores of their prompt are written after them."""
    values, two = array("d", [-0.5]).tobytes(), pack([2])
    scores = (PromptLogprobs(values, two, two, values),)
    scripts = (
        [0.3, Chunk((300,), None, 0, (), scores), 0.5, Chunk((301,), "length")],
        spaced(0.05, 400, 401, 402),
    )
    with trio.fail_after(5):
        paper = await answered(Paper(), *scripts, prompt=[7, 8], echo=True, prompt_logprobs=1)
    choices = [json.loads(one)["choices"][0] for one in sse(paper.text) if one != "[DONE]"]
    for index, tokens in enumerate(([[], [300], [301]], [[], [400, 401, 402]])):
        mine = [one for one in choices if one["index"] == index]
        assert [len(one.get("prompt_logprobs", ())) for one in mine] == [2] + [0] * (len(mine) - 1)
        assert [one["token_ids"] for one in mine] == tokens


async def test_a_failure_after_events_of_the_short_way_is_an_event(autojump_clock):
    """A failure after direct events is an error event, and no [DONE] follows."""
    failure = RequestFailed("worker_lost", "gone", 503)
    paper = await answered(Paper(), [1.0, Chunk((300,)), 1.0, Chunk((301,)), 1.0, failure])
    assert paper.ways == "ddd"
    assert "event: error\n" in paper.written[2][1].decode()
    assert "[DONE]" not in paper.text


async def test_text_that_is_held_back_makes_no_event_by_the_short_way(autojump_clock):
    """Incomplete characters make no event: an empty chunk would end the body."""
    steps = [1.0, *says("a 日本 done", delay_s=1.0)]
    paper = await answered(Paper(), steps, return_token_ids=False, stream_options={"include_usage": True})
    *chunks, done = list(sse(paper.text))
    documents = [json.loads(one) for one in chunks]
    assert done == "[DONE]"
    assert "".join(one["text"] for chunk in documents for one in chunk["choices"]) == "a 日本 done"
    assert all(data for _, data in paper.written)
    assert [chunk["usage"] for chunk in documents[:-1]] == [None] * (len(documents) - 1)
    assert {tuple(chunk) for chunk in documents} == {("id", "object", "created", "model", "choices", "usage")}


# ---- a real server -------------------------------------------------------------------------------------------


@pytest.fixture
def direct_writes(monkeypatch):
    """The sizes of what was written directly."""
    sizes: list[int] = []
    write = DirectWriter.write

    def counted(self, data):
        sizes.append(len(data))
        return write(self, data)

    monkeypatch.setattr(DirectWriter, "write", counted)
    return sizes


def request(version: bytes = b"1.1") -> bytes:
    body = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/%b\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (version, len(body))
    return head + body


async def open_client(url: str, buffer: int | None = None) -> trio.SocketStream:
    host, port = url.removeprefix("http://").split(":")
    client = trio.socket.socket()
    if buffer is not None:
        client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, buffer)
    await client.connect((host, int(port)))
    return trio.SocketStream(client)


async def read_body(stream: trio.SocketStream, parser: h11.Connection) -> str:
    """The body of the next response, read by h11."""
    body = b""
    with trio.fail_after(20):
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                parser.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
    return body.decode()


def asking() -> h11.Connection:
    """A parser for the response to :func:`request`."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    return parser


async def test_a_kept_connection_serves_one_stream_after_another(direct_writes):
    """Several streams on one connection work, though the server does not see what is written directly."""
    service = FakeService(lambda _r: spaced(0.005, *range(300, 320)))
    async with served(service) as url, await open_client(url) as stream:
        for _ in range(3):
            before = len(direct_writes)
            await stream.send_all(request())
            assert tokens_of(await read_body(stream, asking())) == list(range(300, 320))
            assert len(direct_writes) > before, "the short way is not taken: has the server's inside changed?"


async def test_a_client_that_pauses_gets_every_token_in_order(direct_writes):
    """A client that reads late gets every token in order, although the socket was full in between."""
    tokens = [300 + number % 40_000 for number in range(200_000)]
    parts = [tuple(tokens[at : at + 1000]) for at in range(0, len(tokens), 1000)]
    steps = [step for part in parts for step in (0.001, Chunk(part))]
    service = FakeService(lambda _r: [*steps, Chunk((2,), "stop")])
    async with served(service) as url, await open_client(url, 4096) as stream:
        await stream.send_all(request())
        with trio.fail_after(20):
            await service.ended.wait()
        assert tokens_of(await read_body(stream, asking())) == [*tokens, 2]
    assert direct_writes


async def test_a_client_without_chunks_is_served_through_the_server(direct_writes):
    """A client of HTTP/1.0, which knows no chunks, is served through the server."""
    service = FakeService(lambda _r: spaced(0.005, *range(300, 320)))
    async with served(service) as url, await open_client(url) as stream:
        await stream.send_all(request(b"1.0"))
        received = b""
        with trio.fail_after(20):
            while data := await stream.receive_some():
                received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: ")
    assert tokens_of(body.decode()) == list(range(300, 320))
    assert not direct_writes
