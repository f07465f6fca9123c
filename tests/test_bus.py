"""The bus: no message lost or doubled, no receiver left asleep, every queue bounded."""

from __future__ import annotations

import random
import socket as socket_module
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import zmq

from memory_bus import MemoryBus
from memserve.bus import HELLO, Inbox, Link, Received, ZmqLink, bind_private, open_link, wait_for_head
from memserve.costs import Site, StepCosts
from memserve.drawing import Logprobs, Sampling
from memserve.errors import PeerError, PeerFull, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.messages import (
    Cancel,
    Cluster,
    Failed,
    Member,
    Request,
    Submit,
    Tokens,
    TokenUpdate,
    decode,
    encode,
)
from memserve.settings.network import KeyPair


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory that only its owner can enter."""
    tmp_path.chmod(0o700)
    return tmp_path


@asynccontextmanager
async def inbox_of(senders: int, high_water: int) -> AsyncIterator[tuple[Inbox, list[zmq.Socket[bytes]]]]:
    """An inbox that holds ``high_water`` messages a sender, and sockets that are connected to it."""
    context = zmq.Context()
    inbox, *others = [context.socket(kind) for kind in (zmq.ROUTER, *([zmq.DEALER] * senders))]
    for socket in (inbox, *others):
        socket.setsockopt(zmq.SNDHWM, high_water)
        socket.setsockopt(zmq.RCVHWM, high_water)
        socket.setsockopt(zmq.LINGER, 0)
    inbox.bind("inproc://inbox")
    for socket in others:
        socket.connect("inproc://inbox")
    yield Inbox(inbox), others
    for socket in (inbox, *others):
        socket.close()
    context.term()


async def test_a_message_that_comes_while_the_inbox_is_read_is_not_slept_over() -> None:
    """Messages that arrive while others are read are received too, though ZeroMQ's descriptor signals them only once."""
    async with inbox_of(1, 100) as (inbox, [sender]):
        for round_ in range(3):
            for number in range(5):
                sender.send_multipart([b"%d" % (round_ * 5 + number)])
            time.sleep(0.02)  # noqa: ASYNC251 - all of them have landed when the first is taken
            got: list[bytes] = []
            with trio.fail_after(2):
                while len(got) < 5:
                    got += [frames[1] for frames in await inbox.receive(2)]
            assert got == [b"%d" % (round_ * 5 + number) for number in range(5)]


def _send_numbered(socket: zmq.Socket[bytes], total: int, rng: random.Random) -> None:
    for number in range(total):
        socket.send_multipart([b"%d" % number])
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.002)


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_receives_lose_and_double_nothing(seed: int) -> None:
    """Receives may be cancelled at any time: no message is lost or doubled, and the next receive wakes up."""
    rng = random.Random(seed)
    total, senders = 1500, 3
    got: dict[bytes, list[int]] = {}
    async with inbox_of(senders, 3) as (inbox, others), trio.open_nursery() as nursery:
        for index, one in enumerate(others):
            numbers = random.Random(seed * 100 + index)
            nursery.start_soon(trio.to_thread.run_sync, _send_numbered, one, total, numbers)
        with trio.fail_after(20):
            while sum(map(len, got.values())) < total * senders:
                with trio.move_on_after(rng.choice([0, rng.random() * 0.002, 5])):
                    for sender, number in await inbox.receive(rng.randint(1, 8)):
                        got.setdefault(sender, []).append(int(number))
    assert list(got.values()) == [list(range(total))] * senders


async def test_a_busy_inbox_lets_other_tasks_run() -> None:
    """Other tasks run between receives even if the inbox always has a message."""
    async with inbox_of(1, 100) as (inbox, [sender]):
        for _ in range(20):
            sender.send_multipart([b"x"])
        time.sleep(0.02)  # noqa: ASYNC251 - all of them have landed
        ran = 0

        async def other() -> None:
            nonlocal ran
            while True:
                ran += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(20):
                await inbox.receive(1)
            nursery.cancel_scope.cancel()
        assert ran >= 10


@asynccontextmanager
async def zmq_links(private: Path, *names: str) -> AsyncIterator[list[ZmqLink]]:
    """Bound links, each of which knows how to reach all others."""
    async with trio.open_nursery() as nursery:
        done = trio.Event()

        async def hold(name: str, *, task_status: trio.TaskStatus[ZmqLink]) -> None:
            async with open_link(ActorId(name), f"ipc://{private}/{name}.sock") as link:
                task_status.started(link)
                await done.wait()

        links: list[ZmqLink] = [await nursery.start(hold, name) for name in names]
        for one in links:
            for other in links:
                one.connect(other.actor, other.endpoint)
        yield links
        done.set()


async def _exchange(a: Link, b: Link) -> None:
    request = Request("r", 0, a.actor, "", b"\1\0\0\0", 1, 3, (2,), Sampling())
    a.send(b.actor, Submit(request))
    with trio.fail_after(5):
        assert await b.receive() == [Received(a.actor, Submit(request))]
        b.send(a.actor, Cancel("r", 0))
        assert await a.receive() == [Received(b.actor, Cancel("r", 0))]


def test_rows_that_ask_for_nothing_carry_nothing() -> None:
    """A token update without log probabilities has no field for them on the wire, to save bytes and time."""
    update = TokenUpdate("r", 0, 9, b"\1\0\0\0", 0)
    known = attrs.evolve(update, logprobs=Logprobs(-0.5, b"\2\0\0\0", (-0.25,)))
    plain, full = (encode(Tokens((one,))) for one in (update, known))
    assert b"logprobs" not in plain[1] and b"logprobs" in full[1]
    assert decode(*plain) == Tokens((update,)) and decode(*full) == Tokens((known,))


async def test_messages_cross_a_zmq_link(private: Path) -> None:
    """A message sent over ZeroMQ is received with its sender's id."""
    async with zmq_links(private, "a.1", "b.2") as (a, b):
        await _exchange(a, b)


async def test_messages_cross_a_memory_link() -> None:
    """The in-memory bus, which most tests use, delivers messages in the same way."""
    bus = MemoryBus()
    a, b = bus.link(ActorId("a.1")), bus.link(ActorId("b.2"))
    a.connect(b.actor, b.endpoint)
    await _exchange(a, b)


async def test_a_stranger_can_be_answered(private: Path) -> None:
    """An actor can answer one that it has not connected to: a new worker calls its shard before it is announced."""
    async with zmq_links(private, "a.1") as (known,), zmq_links(private, "new.2") as (stranger,):
        stranger.connect(known.actor, known.endpoint)
        await _exchange(stranger, known)


@pytest.mark.parametrize("introduced", [False, True])  # as programs do with a shard of their own
async def test_programs_that_come_and_go_leave_no_connection(
    private: Path, monkeypatch: pytest.MonkeyPatch, introduced: bool
) -> None:
    """Connections to programs that have gone are closed, so that a shard does not run out of sockets."""
    monkeypatch.setattr("memserve.bus.GUEST_S", 0.0)
    async with zmq_links(private, "a.1", "friend.1") as (a, friend):
        friend.connect(a.actor, a.endpoint)
        await _exchange(friend, a)
        a.connect(friend.actor, friend.endpoint)  # announced: no guest
        a.introduce(friend.actor, "ipc:///nowhere")  # what is known counts for more than a program's word
        before = open_files()
        for number in range(12):
            async with zmq_links(private, f"guest.{number}") as (guest,):
                caller, callee = (a, guest) if introduced else (guest, a)
                caller.introduce(callee.actor, callee.endpoint)
                await _exchange(caller, callee)
        assert open_files() - before < 6
        await _exchange(friend, a)


async def test_a_guest_that_was_silent_is_answered_all_the_same(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that was silent for so long that its connection was closed is answered once it calls again."""
    monkeypatch.setattr("memserve.bus.GUEST_S", 0.0)
    async with zmq_links(private, "a.1") as (a,), zmq_links(private, "slow.1", "other.1") as (slow, other):
        for one in (slow, other):
            one.connect(a.actor, a.endpoint)
            await _exchange(one, a)
        await trio.sleep(0.1)
        with trio.fail_after(10):
            await _answered(slow, a)


async def _answered(caller: Link, callee: Link) -> None:
    """Repeat a call until it is answered: the callee's new connection may come before the end of its old one."""
    heard: list[Received] = []
    while not heard:
        caller.send(callee.actor, Cancel("r", 0))
        await callee.receive()
        callee.send(caller.actor, Cancel("r", 1))
        with trio.move_on_after(0.2):
            heard = await caller.receive()


async def test_a_hello_that_names_no_endpoint_harms_nobody(private: Path) -> None:
    """A hello with an invalid endpoint does not end the actor; its sender just cannot be answered."""
    async with zmq_links(private, "a.1") as (a,):
        context = zmq.Context()
        rogue = context.socket(zmq.DEALER)
        rogue.setsockopt(zmq.IDENTITY, b"rogue.1")
        rogue.connect(a.endpoint)
        rogue.send_multipart([HELLO, b"nowhere"])
        rogue.send_multipart(encode(Cancel("r", 0)))
        with trio.fail_after(5):
            (heard,) = await a.receive()
        with pytest.raises(PeerUnreachable):
            a.send(heard.sender, Cancel("r", 0))
        rogue.close(0)
        context.term()


def open_files() -> int:
    """The number of this process's open file descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_an_actor_with_two_ids_hears_both(private: Path) -> None:
    """Messages to an actor's name and to its id use one connection, and those to the name reach its successor after a
    restart."""
    seed, said = ActorId("b.seed"), [Cancel("r", number) for number in range(5)]
    async with zmq_links(private, "a.1") as (a,):
        async with zmq_links(private, "b.2") as (b,):
            endpoint = b.endpoint
            a.connect(seed, endpoint)
            a.connect(b.actor, endpoint)
            for number in range(4):
                a.send((seed, b.actor)[number % 2], said[number])
            heard: list[Received] = []
            with trio.fail_after(5):
                while len(heard) < 4:
                    heard += await b.receive()
            assert [one.message for one in heard] == said[:4]
        async with open_link(ActorId("b.3"), endpoint) as again:  # the next one of that name
            a.forget(ActorId("b.2"))
            a.send(seed, said[4])
            with trio.fail_after(5):
                assert said[4] in [one.message for one in await again.receive()]


async def test_unknown_and_full_peers_are_errors(private: Path) -> None:
    """Sending to an unknown peer, or to one whose queue is full, raises an error: callers must know what was not sent."""
    async with zmq_links(private, "a.1") as (a,):
        with pytest.raises(PeerUnreachable):
            a.send(ActorId("nobody.0"), Cancel("r", 0))
        a.connect(ActorId("absent.0"), f"ipc://{private}/absent.0.sock")
        with pytest.raises(PeerFull):
            for _ in range(20_000):
                a.send(ActorId("absent.0"), Cancel("r", 0))
        a.forget(ActorId("absent.0"))
        with pytest.raises(PeerUnreachable):
            a.send(ActorId("absent.0"), Cancel("r", 0))


async def test_garbage_is_counted_and_survived(private: Path) -> None:
    """Messages that do not decode are counted and skipped: a peer of another version must not end an actor."""
    async with zmq_links(private, "a.1", "b.2") as (a, b):
        context = zmq.Context()
        rogue = context.socket(zmq.DEALER)
        rogue.setsockopt(zmq.LINGER, 0)
        rogue.connect(b.endpoint)
        for frames in (
            [b"x"],
            [b"\1Nope", b""],
            [b"\2Submit", b"\x80"],
            [b"\1Submit", b"\xc1"],
            [b"\1Cancel", b"\x80"],
        ):
            rogue.send_multipart(frames)
        await trio.sleep(0.1)
        a.send(b.actor, Cancel("r", 0))
        with trio.fail_after(5):
            assert (await b.receive())[-1].message == Cancel("r", 0)
        assert b.refused == 5
        rogue.close()
        context.term()


def test_a_link_that_cannot_be_bound_says_so(tmp_path: Path) -> None:
    """A link that cannot be bound ends the program with an error at once, instead of hanging."""
    tmp_path.chmod(0o755)
    code = f"import trio; from memserve.bus import open_link; trio.run(open_link('a.1', 'ipc://{tmp_path}/a').__aenter__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1 and "and mode 0700" in done.stderr


def test_an_open_directory_is_refused(tmp_path: Path) -> None:
    """A socket directory that others can enter is refused: whoever reaches the socket controls the cluster."""
    tmp_path.chmod(0o755)
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        pytest.raises(PermissionError, match="0700"),
    ):
        bind_private(socket, f"ipc://{tmp_path}/x.sock")


def test_every_message_has_public_fields_only() -> None:
    """No message has private fields: msgspec would leave them out silently."""
    from memserve import messages

    for kind in messages._kinds:
        names = [field.name for field in kind.__attrs_attrs__]
        assert names, kind
        assert not [name for name in names if name.startswith("_")], kind


def test_codec_round_trip_and_refusals() -> None:
    """Nested values survive encoding; unknown kinds and wrong bodies raise errors that say what was wrong."""
    member = Member(
        ActorId("p0.1"), "PrefillWorker", "ipc://x", 1, "ready", "prefill", "s0", {"waiting_tokens": 2.0}
    )
    member = attrs.evolve(member, costs=StepCosts(((1.0, 0.1),)), site=Site("cores", 2, 2))
    for message in (Cluster(ActorId("s.1"), (member,)), Tokens(()), Failed("r", 1, "c", "m", 503, True, 1.5)):
        assert decode(*encode(message)) == message
    with pytest.raises(PeerError, match="unknown message kind"):
        decode(b"\x09Submit", b"")
    with pytest.raises(PeerError, match=r"Cancel does not decode: .*request"):
        decode(b"\x01Cancel", b"\x80")


@asynccontextmanager
async def far_links(keys: KeyPair, *names: str, address: str = "127.0.0.1") -> AsyncIterator[list[ZmqLink]]:
    """Links on TCP ports, each in its own ZeroMQ context, with the same keys."""
    async with AsyncExitStack() as held:
        opened = [open_link(ActorId(name), f"tcp://{address}:*", keys) for name in names]
        yield [await held.enter_async_context(one) for one in opened]


def key_pair() -> KeyPair:
    """The keys of a new cluster."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
async def test_between_hosts_who_has_the_key_is_heard_and_answered(address: str) -> None:
    """Links on TCP with the same keys exchange messages, and announce the port that they were given."""
    if "[" in address and not socket_module.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with far_links(key_pair(), "a.1", "b.1", address=address) as (a, b):
        assert a.endpoint.startswith(f"tcp://{address}:") and not a.endpoint.endswith("*")
        a.connect(b.actor, b.endpoint)
        await _exchange(a, b)


def _raw(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair | None, server: str) -> zmq.Socket[bytes]:
    """A sender that does not use ZmqLink, with the keys given."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, b"c.1")
    if keys:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        socket.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
    return socket


@pytest.mark.parametrize("stranger", ["without keys", "with others", "who knows the public key"])
async def test_without_the_key_nothing_arrives_and_nothing_breaks(stranger: str) -> None:
    """Messages from senders without the cluster's keys are dropped: the port is open to the whole network."""
    keys, others = key_pair(), key_pair()
    async with far_links(keys, "a.1", "b.1") as (a, b):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        own = None if stranger == "without keys" else others
        socket = _raw(context, own, keys.public if stranger == "who knows the public key" else others.public)
        socket.connect(b.endpoint)
        socket.send_multipart(encode(Cancel("theirs", 0)))
        with trio.move_on_after(0.5):
            raise AssertionError(f"{await b.receive()} came in")
        a.connect(b.actor, b.endpoint)
        await _exchange(a, b)
        assert b.refused == 0
        socket.close()
        context.term()


async def test_a_new_connection_of_a_peer_counts_though_its_old_one_seems_alive() -> None:
    """A peer's new connection is used even while the old one seems alive: only one end may have noticed a cut cable."""
    keys = key_pair()
    async with far_links(keys, "b.1") as (b,):
        contexts = [zmq.Context() for _ in range(2)]
        sockets = [_raw(context, keys, keys.public) for context in contexts]
        for number, socket in enumerate(sockets):
            socket.connect(b.endpoint)
            socket.send_multipart(encode(Cancel("r", number)))
            with trio.fail_after(5):
                assert await b.receive() == [Received(ActorId("c.1"), Cancel("r", number))]
        for socket, context in zip(sockets, contexts, strict=True):
            socket.close()
            context.term()


async def test_a_host_knocks_until_it_is_let_in_or_its_key_is_refused() -> None:
    """A joining host waits for a cluster that is still starting, and stops with an error if its key is wrong."""
    keys = key_pair()
    with trio.fail_after(10):
        place, said = f"tcp://127.0.0.1:{free_port()}", trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_head, place, keys, said.set)
            await said.wait()
            async with open_link(ActorId("s.1"), place, keys):
                while nursery.child_tasks:
                    await trio.sleep(0.05)
                with pytest.raises(UserError, match="does not take this key"):
                    await wait_for_head(place, key_pair(), said.set)


def free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket_module.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
