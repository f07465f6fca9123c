"""The bus: nothing lost, nothing doubled, nobody left asleep, every queue bounded."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
import zmq

from memserve.bus import Link, MemoryBus, Received, ZmqLink, ZSocket, bind_private, open_link
from memserve.costs import Site, StepCosts
from memserve.errors import PeerError, PeerFull, PeerUnreachable
from memserve.messages import (
    ActorId,
    Cancel,
    Cluster,
    Failed,
    Member,
    Request,
    Sampling,
    Submit,
    Tokens,
    decode,
    encode,
)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory that only its owner can enter."""
    tmp_path.chmod(0o700)
    return tmp_path


@asynccontextmanager
async def pair(high_water: int) -> AsyncIterator[tuple[ZSocket, ZSocket]]:
    """Two connected ZSockets with their pumps running."""
    context = zmq.Context()
    sockets = [context.socket(zmq.PAIR) for _ in range(2)]
    for socket in sockets:
        socket.setsockopt(zmq.SNDHWM, high_water)
        socket.setsockopt(zmq.RCVHWM, high_water)
        socket.setsockopt(zmq.LINGER, 0)
    sockets[0].bind("inproc://pair")
    sockets[1].connect("inproc://pair")
    left, right = map(ZSocket, sockets)
    async with trio.open_nursery() as nursery:
        await nursery.start(left.run)
        await nursery.start(right.run)
        yield left, right
        nursery.cancel_scope.cancel()
    for socket in sockets:
        socket.close()
    context.term()


async def test_a_send_does_not_put_a_parked_receiver_to_sleep_for_ever() -> None:
    """A send eats the descriptor's edge; without serving the parked tasks after it, the receiver would hang."""
    async with pair(100) as (left, right), trio.open_nursery() as nursery:
        got: list[list[bytes]] = []

        async def receive() -> None:
            got.append(await left.receive())

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        right.socket.send_multipart([b"edge"])
        time.sleep(0.05)  # noqa: ASYNC251 - the loop must be busy while the message lands
        left.send_nowait([b"eats the edge"])
        with trio.fail_after(2):
            while not got:
                await trio.sleep(0.001)
        assert got == [[b"edge"]]


async def _send_numbered(socket: ZSocket, numbers: list[int], rng: random.Random) -> None:
    for number in numbers:
        sent = False
        while not sent:
            with trio.move_on_after(rng.random() * 0.002 if rng.random() < 0.3 else 5):
                await socket.send([str(number).encode()])
                sent = True


async def _receive_some(socket: ZSocket, into: list[int], total: int, rng: random.Random) -> None:
    while len(into) < total:
        with trio.move_on_after(rng.random() * 0.002 if rng.random() < 0.3 else 0.05):
            into += [int(frames[0]) for frames in await socket.receive_batch(rng.randint(1, 8))]


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_operations_lose_and_double_nothing(seed: int) -> None:
    """Timeouts round a send or a receive are everywhere; a message must not vanish in one, or go out twice."""
    rng = random.Random(seed)
    total, senders = 1500, 4
    async with pair(3) as (left, right):
        results: list[list[int]] = [[], []]
        async with trio.open_nursery() as nursery:
            for direction, (source, target) in enumerate([(left, right), (right, left)]):
                for part in range(senders):
                    nursery.start_soon(_send_numbered, source, list(range(part, total, senders)), rng)
                for _ in range(3):
                    nursery.start_soon(_receive_some, target, results[direction], total, rng)
        assert [sorted(one) for one in results] == [list(range(total))] * 2


@asynccontextmanager
async def zmq_links(private: Path, *names: str) -> AsyncIterator[list[ZmqLink]]:
    """Bound links, each knowing how to reach all others."""
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


async def test_messages_cross_a_zmq_link(private: Path) -> None:
    """What one actor says, the other hears, with the sender's id."""
    async with zmq_links(private, "a.1", "b.2") as (a, b):
        await _exchange(a, b)


async def test_messages_cross_a_memory_link() -> None:
    """The twin that most tests run on keeps the same contract."""
    bus = MemoryBus()
    a, b = bus.link(ActorId("a.1")), bus.link(ActorId("b.2"))
    a.connect(b.actor, b.endpoint)
    await _exchange(a, b)


async def test_a_stranger_can_be_answered(private: Path) -> None:
    """A new worker's first call reaches the shard before the scheduler has announced the worker."""
    async with zmq_links(private, "a.1") as (known,), zmq_links(private, "new.2") as (stranger,):
        stranger.connect(known.actor, known.endpoint)
        await _exchange(stranger, known)


async def test_an_actor_with_two_ids_hears_both(private: Path) -> None:
    """A shard's answers to a scheduler, and its heartbeats to the scheduler's name, would go on two connections: one is passed
    over, and after a restart it may be that of the heartbeats, for good."""
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
    """A message that cannot be sent must be known to be unsent: the caller has a policy for that."""
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
    """A peer of another version must not take an actor down."""
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


def test_an_open_directory_is_refused(tmp_path: Path) -> None:
    """Whoever can reach an ipc socket controls the cluster, so its directory must be closed to others."""
    tmp_path.chmod(0o755)
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        pytest.raises(PermissionError, match="0700"),
    ):
        bind_private(socket, f"ipc://{tmp_path}/x.sock")


def test_every_message_has_public_fields_only() -> None:
    """msgspec drops private fields silently when it encodes; a default would fill in at the other end."""
    from memserve import messages

    for kind in messages._kinds:
        names = [field.name for field in kind.__attrs_attrs__]
        assert names, kind
        assert not [name for name in names if name.startswith("_")], kind


def test_codec_round_trip_and_refusals() -> None:
    """Nested values survive the wire; wrong kinds, versions and bodies are PeerErrors that say what was wrong."""
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
