"""The load generator's pure parts: arrivals, content, the paper's workload shapes, HTTP and events, answers."""

from __future__ import annotations

import math

import h11
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import generated
from loadgen.answer import Answer
from loadgen.arrivals import Arrivals, times
from loadgen.client import Target
from loadgen.content import Filler
from loadgen.conversation import one_turn
from loadgen.errors import LoadgenError
from loadgen.wire import Events, Exchange, IncompleteError, WireError
from loadgen.workload import Piece, Workload


def sessions(count: int, at=lambda i: None) -> list:
    """Sessions of one request each."""
    return [one_turn(str(i), (Piece(str(i), 4),), 1, at_s=at(i)) for i in range(count)]


# ---- arrivals ------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(["poisson", "constant", "gamma"]),
    rate=st.floats(0.01, 1000),
    burstiness=st.floats(0.1, 5),
    seed=st.integers(0, 2**32),
    count=st.integers(0, 50),
)
def test_arrivals_are_in_order_and_repeatable(kind, rate, burstiness, seed, count):
    """Arrival times are sorted, not negative, and the same for the same seed."""
    plan = Arrivals(kind, rate, burstiness, seed=seed)
    moments = times(plan, sessions(count))
    assert len(moments) == count
    assert all(one >= 0 for one in moments) and moments == sorted(moments)
    assert moments == times(plan, sessions(count))


@pytest.mark.parametrize(
    ("kind", "burstiness", "spread"),
    [("poisson", 9, 1), ("constant", 9, 0), ("gamma", 0.5, 0.5), ("gamma", 2, 2)],
)
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(kind, burstiness, spread):
    """The gaps between arrivals have the mean and spread of the chosen process."""
    gaps = np.diff(times(Arrivals(kind, 5.0, burstiness, seed=3), sessions(20_000)))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, abs=0.05 * max(1, spread))


def test_a_trace_is_played_at_its_times():
    """A trace is played at its own times from 0, scaled; times that are missing or go backwards are errors."""
    found = times(Arrivals("trace", time_factor=0.5), sessions(4, lambda i: 100.0 + i * i))
    assert found == [0.0, 0.5, 2.0, 4.5]
    with pytest.raises(LoadgenError, match="this workload has no times"):
        times(Arrivals("trace"), sessions(1))
    with pytest.raises(LoadgenError, match="go backwards"):
        times(Arrivals("trace"), sessions(3, lambda i: float(-i)))


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ({"kind": "poisson", "rate": 0}, "--rate: must be above 0"),
        ({"kind": "gamma", "rate": 1, "burstiness": 0}, "--burstiness"),
        ({"kind": "closed"}, "--clients: must be 1 or more"),
        ({"kind": "trace", "time_factor": -1}, "--time-factor"),
    ],
)
def test_arrivals_that_cannot_be_played_are_refused(plan, complaint):
    """Arrival options that make no sense are refused with the option's name."""
    with pytest.raises(LoadgenError, match=complaint):
        Arrivals(**plan)


# ---- content -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), key=st.text(max_size=8), short=st.integers(1, 300), more=st.integers(0, 300))
def test_a_shorter_piece_is_the_beginning_of_a_longer_one(seed, key, short, more):
    """A piece of content is the beginning of a longer piece with the same key."""
    filler, other = Filler(seed), Filler(seed)
    long = filler.ids(Piece(key, short + more)).tolist()
    assert other.ids(Piece(key, short)).tolist() == long[:short]
    assert all(1000 <= one < 30_000 for one in long)
    words = filler.text(Piece(key, short)).split()
    assert len(words) == short
    text = Filler(seed, corpus=[str(i) for i in range(100)])  # shorter than some pieces
    words = text.text(Piece(key, short + more)).split()
    assert len(words) == short + more and text.text(Piece(key, short)).split() == words[:short]


def test_content_depends_on_seed_salt_and_key_only():
    """Content depends on the seed, the salt and the key only; a corpus is used word by word."""
    piece = Piece("a", 64)
    first = Filler(1, "s").ids(piece).tolist()
    assert first == Filler(1, "s").ids(piece).tolist()
    for other in (Filler(2, "s").ids(piece), Filler(1, "t").ids(piece), Filler(1, "s").ids(Piece("b", 64))):
        assert other.tolist() != first
    corpus = Filler(corpus=[str(i) for i in range(1000)]).text(piece).split()
    assert [int(one) for one in corpus] == [(int(corpus[0]) + i) % 1000 for i in range(64)]


def test_a_fingerprint_tells_workloads_apart():
    """Workloads with other sessions or times have other fingerprints; the name does not count."""
    one = Workload("a", tuple(sessions(3)))
    assert one.fingerprint() == Workload("another name", tuple(sessions(3))).fingerprint()
    others = [Workload("a", tuple(sessions(2))), Workload("a", tuple(sessions(3, float)))]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 3


# ---- the paper's shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prompt", "output", "shared", "none"),
    [
        ("sharegpt-like", (27, 633, 1852, 2281), (69, 293, 636, 980), 0.38, 0.32),
        ("loogle-like", (1586, 1762, 2013, 2741), (10, 21, 43, 73), 0.98, 0.17),
        ("react-like", (1917, 2214, 2560, 2867), (59, 131, 316, 459), 0.90, 0.25),
    ],
)
def test_the_shapes_are_the_papers(kind, prompt, output, shared, none):
    """The generated workloads have the length distributions and shares of common prefixes that the paper gives."""
    made = generated.paper_shape(kind, 4000, 1.0, 0.0, 7)
    lengths, shares = generated.shares(made)
    percents = (10, 50, 90, 99)
    # At the 10th percentile ShareGPT's curve has a kink: the slope there is 60 times that below it.
    assert np.percentile(lengths, percents) == pytest.approx(prompt, rel=0.05, abs=15)
    outputs = [turn.output_tokens for session in made for turn in session.turns]
    assert np.percentile(outputs, percents) == pytest.approx(output, rel=0.05, abs=2)
    assert np.median(shares) == pytest.approx(shared, abs=0.03)
    assert np.mean(np.array(shares) < 0.01) == pytest.approx(none, abs=0.02)


def test_groups_share_prefixes_and_nothing_else():
    """Sessions of a group share one prefix and nothing else, come mixed, and are the same for the same seed."""
    made = generated.shared_prefix(generated.Shared(groups=3, group_size=4, turns=2), seed=1)
    firsts = [session.turns[0].messages[0].content for session in made]
    assert len(made) == 12 and len({content[0] for content in firsts}) == 3
    assert len({content[1] for content in firsts}) == 12
    assert [one.id for one in made] != sorted(one.id for one in made)
    assert made == generated.shared_prefix(generated.Shared(groups=3, group_size=4, turns=2), seed=1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_prefix_share_is_the_share(share):
    """Each prompt shares exactly the share of its tokens that was asked for."""
    for session in generated.prefix_share(3, 1000, 10, share):
        pieces = session.turns[0].messages[0].content
        assert sum(one.tokens for one in pieces) == 1000
        assert sum(one.tokens for one in pieces if one.key == "common") == round(1000 * share)


# ---- HTTP and events -----------------------------------------------------------------------------------------


def served(events: list[bytes], chunks: list[int]) -> bytes:
    """A whole streamed answer as h11 writes it, its body cut into chunks of these sizes."""
    server = h11.Connection(h11.SERVER)
    client = h11.Connection(h11.CLIENT)
    server.receive_data(client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")])) or b"")
    server.next_event()
    headers = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]
    parts = [server.send(h11.Response(status_code=200, headers=headers))]
    body = b"".join(b"data: " + one + b"\n\n" for one in events)
    while body:
        size = chunks.pop() if chunks else len(body)
        parts.append(server.send(h11.Data(data=body[:size])))
        body = body[size:]
    parts.append(server.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)


PAYLOAD = st.binary(min_size=1, max_size=40).filter(lambda one: b"\n" not in one and b"\r" not in one)


@given(
    events=st.lists(PAYLOAD, max_size=8),
    chunks=st.lists(st.integers(1, 30), max_size=20),
    reads=st.lists(st.integers(1, 60), max_size=40),
)
def test_events_come_whole_however_the_bytes_are_cut(events, chunks, reads):
    """Events are read whole however chunks and reads cut the bytes."""
    data, found, exchange = served(events, chunks), [], Exchange()
    exchange.request("POST", "/", [("Host", "x")], b"{}")
    while data:
        size = reads.pop() if reads else len(data)
        found += exchange.receive(data[:size])
        data = data[size:]
    assert found == [("message", one) for one in events]
    assert exchange.done and exchange.reusable and exchange.status == 200


def test_other_forms_of_events():
    """Events are read in the other forms that the format allows: comments, CRLF, several data lines, no space."""
    events = Events()
    assert events.receive(b": waiting\n\ndata:1\r\n\r\nevent: error\ndata: a\ndata: b\n\nid: 4\n") == [
        ("message", b"1"),
        ("error", b"a\nb"),
    ]
    assert events.receive(b"data: 2\n\n") == [("message", b"2")]


@given(st.lists(st.integers(1, 6), max_size=30))
def test_line_ends_of_two_bytes_may_be_cut(reads):
    """If it failed, two events would be read as one where the network cuts between their line ends."""
    events, found, data = Events(), [], b"data: 1\r\n\r\ndata: 2\r\n\r\nevent: error\r\ndata: 3\r\n\r\n"
    while data:
        size = reads.pop() if reads else len(data)
        found += events.receive(data[:size])
        data = data[size:]
    assert found == [("message", b"1"), ("message", b"2"), ("error", b"3")]


def answered(*parts: bytes) -> Exchange:
    """An exchange that received these bytes."""
    exchange = Exchange()
    exchange.request("POST", "/", [("Host", "x")], b"{}")
    for part in parts:
        exchange.receive(part)
    return exchange


def test_bodies_of_a_length_and_until_the_end():
    """Bodies with a length, or up to the end of the connection, are read; it is reused only where that is allowed."""
    exchange = answered(b"HTTP/1.1 429 Slow\r\ncontent-length: 5\r\n\r\nab", b"cde")
    assert (exchange.status, bytes(exchange.body), exchange.done, exchange.reusable) == (
        429,
        b"abcde",
        True,
        True,
    )
    exchange = answered(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nconnection: close\r\n\r\nab")
    assert not exchange.done
    exchange.receive(b"")
    assert (bytes(exchange.body), exchange.done, exchange.reusable) == (b"ab", True, False)
    assert answered(b"HTTP/1.1 204 No\r\n\r\n").done


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    ],
)
def test_what_is_not_http_is_an_error(data):
    """Bytes that are not HTTP are an error."""
    with pytest.raises(WireError):
        answered(data)
    assert issubclass(IncompleteError, WireError)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8080", Target("127.0.0.1", 8080, False, "")),
        ("http://host/v1/", Target("host", 80, False, "")),
        ("https://host/api/v1", Target("host", 443, True, "/api")),
        ("host:81", Target("host", 81, False, "")),
        ("http://[::1]:9", Target("::1", 9, False, "")),
    ],
)
def test_addresses(url, target):
    """Addresses are understood with and without scheme, port, path and brackets."""
    assert Target.parse(url) == target


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "", "http://[::1"])
def test_wrong_addresses_are_explained(url):
    """A wrong address is refused with an explanation."""
    with pytest.raises(LoadgenError, match="--url: must be like"):
        Target.parse(url)


# ---- answers -------------------------------------------------------------------------------------------------


def test_an_answer_is_read_from_both_endpoints():
    """Answers of both endpoints are read; a chat's first event, with the role only, does not count as a token."""
    answer = Answer()
    got = [
        answer.receive("message", data, now)
        for now, data in enumerate(
            [
                b'{"choices":[{"delta":{"role":"assistant","content":""}}]}',
                b'{"choices":[{"delta":{"reasoning_content":"Hm"}}]}',
                b'{"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}',
                b'{"choices":[{"text":" you","token_ids":[5,6],"finish_reason":"length"}]}',
                b'{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":8}}}',
                b"[DONE]",
            ]
        )
    ]
    assert got == [0, 1, 1, 1, 0, 0]
    assert answer.event_s == [1, 2, 3] and answer.text == "HmHi you" and answer.ids == [5, 6]
    assert (answer.output_tokens, answer.tokens("prompt_tokens"), answer.cached_tokens) == (7, 9, 8)
    assert answer.done and answer.finish_reason == "length" and not answer.error


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("error", b'{"error":{"message":"gone"}}', "server error"),
        ("message", b'{"error":{"message":"gone"}}', "server error"),
        ("message", b"<html>", "bad event"),
        ("message", b"[1]", "bad event"),
    ],
)
def test_errors_in_a_stream_are_errors(name, data, error):
    """An error event, or data that is no chunk, marks the answer as failed."""
    answer = Answer()
    answer.receive(name, data, 0.0)
    assert answer.error == error and answer.detail


def test_tokens_without_usage_are_counted_by_ids_or_events():
    """Without usage, output tokens are counted by their ids, or else by events."""
    answer = Answer()
    answer.receive("message", b'{"choices":[{"text":"a"}]}', 0.0)
    answer.receive("message", b'{"choices":[{"text":"b"}]}', 1.0)
    assert answer.output_tokens == 2 and answer.cached_tokens is None
    assert answer.first_tokens is None
    answer.receive("message", b'{"choices":[{"text":"","token_ids":[1,2,3]}]}', 2.0)
    assert answer.output_tokens == 3 and math.isclose(answer.event_s[-1], 2.0)
