"""The bus between hosts: who has the key is heard, nobody else is, and a new connection replaces an old one."""

from __future__ import annotations

import socket as socket_module
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import zmq

from memserve.bus import Received, ZmqLink, knock, open_link
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.messages import Cancel, encode
from memserve.settings.network import KeyPair
from test_bus import exchange


@asynccontextmanager
async def far_links(keys: KeyPair, *names: str, address: str = "127.0.0.1") -> AsyncIterator[list[ZmqLink]]:
    """Links on TCP ports of their own, each in a ZeroMQ context of its own, with the same keys."""
    async with AsyncExitStack() as held:
        opened = [open_link(ActorId(name), f"tcp://{address}:*", keys) for name in names]
        yield [await held.enter_async_context(one) for one in opened]


def key_pair() -> KeyPair:
    """Of a cluster of its own."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
async def test_between_hosts_who_has_the_key_is_heard_and_answered(address: str) -> None:
    """If the keys of one cluster did not fit each other, or no port were announced, no host could join."""
    if "[" in address and not socket_module.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with far_links(key_pair(), "a.1", "b.1", address=address) as (a, b):
        assert a.endpoint.startswith(f"tcp://{address}:") and not a.endpoint.endswith("*")
        a.connect(b.actor, b.endpoint)
        await exchange(a, b)


def _raw(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair | None, server: str) -> zmq.Socket[bytes]:
    """A sender as somebody else would write it."""
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
    """The port is open to the whole network: whoever finds it could place requests and read what others ask."""
    keys, others = key_pair(), key_pair()
    async with far_links(keys, "a.1", "b.1") as (a, b):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        told = None if stranger == "without keys" else others
        socket = _raw(context, told, keys.public if stranger == "who knows the public key" else others.public)
        socket.connect(b.endpoint)
        socket.send_multipart(encode(Cancel("theirs", 0)))
        with trio.move_on_after(0.5):
            raise AssertionError(f"{await b.receive()} came in")
        a.connect(b.actor, b.endpoint)
        await exchange(a, b)
        assert b.refused == 0
        socket.close()
        context.term()


async def test_a_new_connection_of_a_peer_counts_though_its_old_one_seems_alive() -> None:
    """A cut cable is noticed by one end first: what it sends on a new connection must not be passed over by the other."""
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


async def test_a_host_knocks_until_it_is_let_in_or_told_that_its_key_is_wrong() -> None:
    """A host that joins would wait for ever for a cluster that does not take it, or give up on one that is starting."""
    keys = key_pair()
    with trio.fail_after(10):
        place, said = f"tcp://127.0.0.1:{free_port()}", trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock, place, keys, said.set)
            await said.wait()
            async with open_link(ActorId("s.1"), place, keys):
                while nursery.child_tasks:
                    await trio.sleep(0.05)
                with pytest.raises(UserError, match="does not take this key"):
                    await knock(place, key_pair(), said.set)


def free_port() -> int:
    """A port that nobody has at present."""
    with socket_module.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
