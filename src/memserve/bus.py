"""ZeroMQ under trio.

On one host, messages go over Unix sockets that only their user can open. Between hosts, they go over TCP with
CURVE: the cluster's key admits a connection and encrypts it. Every actor binds one ROUTER, its inbox, and
sends through one DEALER per peer, so that a slow peer fills only its own bounded queue.

Messages are one-way values (:mod:`memserve.messages`); an answer is a message in the other direction.
Delivery is at-most-once, and in order for each pair of actors. The cores repeat what must arrive, or check
for gaps.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs
import trio
import zmq
from zmq.utils.monitor import parse_monitor_message

from memserve.errors import PeerError, PeerFull, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.messages import PROTOCOL_VERSION, Message, decode, encode
from memserve.settings.network import KeyPair
from memserve.settings.rules import why_not_private

if TYPE_CHECKING:
    from zmq.auth import Authenticator

INBOX_MESSAGES = 10_000
"""Receive high-water mark of an inbox; beyond it the senders' own queues fill."""
PEER_MESSAGES = 10_000
"""Send high-water mark per peer; beyond it ``send`` raises PeerFull."""
BATCH_MESSAGES = 64
"""Most messages taken from the inbox between two checkpoints."""
HELLO = bytes([PROTOCOL_VERSION]) + b"hello"
"""Kind of a connection's first message: the sender's endpoint, so that it can be answered at once."""
FRAME_BYTES_MAX = 64 << 20
"""Longest frame accepted; a longer one disconnects its sender."""
LINGER_MS = 300
"""How long unsent replies outlive their socket.

Never -1: a socket with an unreachable peer would block the exit.
"""
HEARTBEAT_MS, CUT_MS = 1_000, 5_000
"""Heartbeat interval of a TCP connection, and the silence after which it is cut.

The latter is the silence that the scheduler tolerates (DEAD_AFTER_S): after a shorter pause TCP still
delivers everything.
"""
CONNECT_MS = 2_000
"""Longest wait for a TCP connection; the system itself would wait minutes for a host that has vanished."""
RECONNECT_MS, RECONNECT_MS_MAX = 100, 2_000
"""First and longest pause between two attempts to connect."""
GUEST_S = 60.0
"""Silence after which the connection to an actor that was only introduced is closed; its leases have long expired."""
GUESTS_MAX = 10_000
"""Such actors remembered, at most. If there are more, the longest silent one can no longer be answered."""
PEERS_MAX = 16_384
"""Connections of one link, at most. ZeroMQ's own limit is 1,023: fewer than the members of a large cluster."""
LATE_S = 1.0
"""Time without an answer after which a host that joins reports that it waits."""
REFUSALS = 3
"""Dropped connections after which the key is presumed wrong.

Fewer may come from a scheduler that has just ended.
"""


class Inbox:
    """Receives on one pyzmq socket under trio.

    A ZeroMQ descriptor is edge-triggered, and *every* call on the socket (send, receive, reading EVENTS) may
    consume the edge that a waiting task needs. So one task receives, and no other task makes any call. It
    waits only after a receive found nothing, which leaves the descriptor readable by whatever comes next.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._descriptor = socket.FD
        self._empty = False
        """Whether the last receive emptied the socket."""

    async def receive(self, limit: int = BATCH_MESSAGES) -> list[list[bytes]]:
        """Wait for a multipart message, and take all that have arrived, up to ``limit``.

        If cancelled, it has taken none.
        """
        if not self._empty:
            await trio.lowlevel.checkpoint_if_cancelled()
            if batch := self._take(limit):
                await trio.lowlevel.cancel_shielded_checkpoint()
                return batch
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            if batch := self._take(limit):
                return batch

    def _take(self, limit: int) -> list[list[bytes]]:
        batch: list[list[bytes]] = []
        self._empty = False
        try:
            while len(batch) < limit:
                batch.append(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            self._empty = True
        return batch


@attrs.frozen
class Received:
    """A message and its sender."""

    sender: ActorId
    message: Message


class Link(Protocol):
    """What an actor needs of the bus. :class:`ZmqLink` implements it; tests have a link in memory."""

    actor: ActorId
    endpoint: str
    refused: int
    """Frames dropped because they were not memserve's messages."""

    def connect(self, actor: ActorId, endpoint: str) -> None:
        """Let ``send`` reach ``actor`` from now on. Repeating it with the same endpoint does nothing."""

    def introduce(self, actor: ActorId, endpoint: str) -> None:
        """Let ``send`` reach an actor whose end nobody will announce, unless another endpoint is known for it."""

    def forget(self, actor: ActorId) -> None:
        """Drop the connection and the messages queued on it. An unknown actor is not an error."""

    def send(self, to: ActorId, message: Message) -> None:
        """Queue a message. Raises PeerUnreachable without a connection and PeerFull at the limit."""

    async def receive(self) -> list[Received]:
        """Wait for at least one message, and take further ones that have arrived."""


class ZmqLink:
    """A bound inbox and one outgoing connection per endpoint. Made by :func:`open_link`.

    An actor may have two ids, like a scheduler, whose well-known name outlives it. Of two connections from the
    same sender an inbox serves only the later one, so both ids share one connection.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        actor: ActorId,
        endpoint: str,
        keys: KeyPair | None = None,
    ) -> None:
        self.actor = actor
        self.refused = 0
        self._context = context
        self._keys = keys
        inbox = self._make_inbox(endpoint)
        self.endpoint = inbox.getsockopt_string(zmq.LAST_ENDPOINT) if keys else endpoint
        """The inbox's endpoint, with the port that the system chose."""
        self._inbox = Inbox(inbox)
        self._directory: dict[ActorId, str] = {}
        self._guests: OrderedDict[ActorId, float] = OrderedDict()
        """When each actor was last heard that is known only by a hello or another's word, such as a program that uses
        the pool, or a shard of its own.

        The longest silent one is first. No message will announce their death.
        """
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        """The outgoing connections, by endpoint."""

    def _make_inbox(self, endpoint: str) -> zmq.Socket[bytes]:
        inbox = self._context.socket(zmq.ROUTER)
        try:
            self._bind(inbox, endpoint)
        except BaseException:
            inbox.close()  # with a socket open, the context would never terminate
            raise
        return inbox

    def _bind(self, inbox: zmq.Socket[bytes], endpoint: str) -> None:
        inbox.setsockopt(zmq.LINGER, 0)
        inbox.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer may connect again before this side has noticed the end of its last connection: without this, the
        # new connection would be ignored for good.
        inbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
        inbox.setsockopt(zmq.RCVHWM, INBOX_MESSAGES)
        inbox.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        if self._keys:
            over_network(inbox, self._keys, endpoint)
            inbox.setsockopt(zmq.CURVE_SERVER, 1)
        bind_private(inbox, endpoint)

    def connect(self, actor: ActorId, endpoint: str) -> None:
        self._guests.pop(actor, None)
        if self._directory.get(actor) != endpoint:
            self.forget(actor)
            self._directory[actor] = endpoint

    def introduce(self, actor: ActorId, endpoint: str) -> None:
        if actor in self._directory:
            return
        self._directory[actor] = endpoint
        self._heard(actor)
        if len(self._guests) > GUESTS_MAX:
            self.forget(next(iter(self._guests)))

    def forget(self, actor: ActorId) -> None:
        self._guests.pop(actor, None)
        endpoint = self._directory.pop(actor, None)
        if endpoint in self._peers and endpoint not in self._directory.values():
            self._peers.pop(endpoint).close()

    def send(self, to: ActorId, message: Message) -> None:
        endpoint = self._directory.get(to)
        if endpoint is None:
            raise PeerUnreachable(to)
        try:
            dealer = self._peers.get(endpoint) or self._dial(endpoint)
            dealer.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again as full:
            raise PeerFull(to) from full
        except zmq.ZMQError as error:
            # On a first message: no descriptor is left, or the hello named no endpoint.
            raise PeerUnreachable(to) from error

    def _dial(self, endpoint: str) -> zmq.Socket[bytes]:
        """Open the connection for the first message; its hello tells the peer where to send answers.

        Raises zmq.ZMQError.
        """
        self._hang_up_on_silent_guests()
        dealer = self._context.socket(zmq.DEALER)
        try:
            self._open(dealer, endpoint)
        except BaseException:
            dealer.close(0)
            raise
        self._peers[endpoint] = dealer
        return dealer

    def _open(self, dealer: zmq.Socket[bytes], endpoint: str) -> None:
        dealer.setsockopt(zmq.LINGER, LINGER_MS)
        dealer.setsockopt(zmq.SNDHWM, PEER_MESSAGES)
        dealer.setsockopt(zmq.IDENTITY, self.actor.encode())
        if self._keys:
            as_client(dealer, self._keys, endpoint)
        dealer.connect(endpoint)
        dealer.send_multipart([HELLO, self.endpoint.encode()], zmq.NOBLOCK)

    def _hang_up_on_silent_guests(self) -> None:
        """Close connections to programs that may have ended; they would pile up.

        A program that was only silent gets a new connection with its next answer.
        """
        silent_since = time.monotonic() - GUEST_S
        for guest in takewhile(lambda one: self._guests[one] < silent_since, self._guests):
            if (dealer := self._peers.pop(self._directory[guest], None)) is not None:
                dealer.close()

    async def receive(self) -> list[Received]:
        while True:
            received = [self._decoded(frames) for frames in await self._inbox.receive()]
            messages = [one for one in received if one is not None]
            if messages:
                return messages

    def _decoded(self, frames: list[bytes]) -> Received | None:
        try:
            identity, kind, body = frames
            sender = ActorId(identity.decode())
            if kind == HELLO:
                self.introduce(sender, body.decode())
                return None
            if sender in self._guests:
                self._heard(sender)
            return Received(sender, decode(kind, body))
        except (ValueError, PeerError):
            self.refused += 1
            return None

    def _heard(self, guest: ActorId) -> None:
        self._guests[guest] = time.monotonic()
        self._guests.move_to_end(guest)

    def close(self) -> None:
        """Close every socket; replies already queued get LINGER_MS to leave."""
        for dealer in self._peers.values():
            dealer.close()
        self._peers.clear()
        self._inbox.socket.close()


@asynccontextmanager
async def open_link(actor: ActorId, endpoint: str, keys: KeyPair | None = None) -> AsyncIterator[ZmqLink]:
    """A bound link for a ``with`` block. On leaving, queued replies get LINGER_MS, then everything is closed.

    With ``keys`` every connection uses CURVE, and only peers with the same keys are let in.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, PEERS_MAX)
    try:
        async with AsyncExitStack() as held:
            if keys:
                await held.enter_async_context(guarded(context, keys))
            link = ZmqLink(context, actor, endpoint, keys)
            held.callback(link.close)
            yield link
    finally:
        context.term()


# ---- over a network ------------------------------------------------------------------------------------------


def over_network(socket: zmq.Socket[bytes], keys: KeyPair, endpoint: str) -> None:
    """Give a socket for ``endpoint`` the cluster's keys, and heartbeats that notice a vanished host."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    # With this option, an IPv4 address would be announced in IPv6 form, which not every host can reach.
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, CUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, CUT_MS)


def as_client(socket: zmq.Socket[bytes], keys: KeyPair, endpoint: str) -> None:
    """Like :func:`over_network`, for a socket that connects."""
    over_network(socket, keys, endpoint)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)


async def wait_for_head(head: str, keys: KeyPair, on_no_answer: Callable[[], None]) -> None:
    """Wait until the inbox at ``head`` accepts a connection with ``keys``.

    Calls ``on_no_answer`` if there is no answer within LATE_S, and keeps waiting. Raises UserError when the key is
    refused.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    as_client(socket, keys, head)
    monitor = socket.get_monitor_socket()
    events = Inbox(monitor)
    try:
        socket.connect(head)
        with trio.move_on_after(LATE_S) as in_time:
            await _until_let_in(events, head)
        if in_time.cancelled_caught:
            on_no_answer()
            await _until_let_in(events, head)
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close()
        context.term()


async def _until_let_in(events: Inbox, head: str) -> None:
    """Follow a connection's attempts.

    If it is made and then dropped several times, the key is refused: raises UserError.
    """
    broken = 0
    while True:
        for frames in await events.receive():
            event = parse_monitor_message(frames)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            broken += event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_DISCONNECTED)
            if broken >= REFUSALS or event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise UserError(
                    f"cluster.key: what listens at {head} does not take this key: the file must be a copy of the one"
                    " that the scheduler's host was started with"
                )


@asynccontextmanager
async def guarded(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair) -> AsyncIterator[None]:
    """Within this context, the ZeroMQ context's servers let in only peers with the public key of ``keys``.

    ZeroMQ asks a socket of the context about every connection (ZAP), and waits for its answer.
    """
    from zmq.auth import Authenticator

    authenticator = Authenticator(context)
    authenticator.configure_curve_callback(credentials_provider=_Members(keys.public))
    authenticator.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_forever, authenticator)
            yield
            nursery.cancel_scope.cancel()
    finally:
        authenticator.stop()


@attrs.frozen
class _Members:
    """The check that pyzmq's authenticator calls."""

    public: str

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self.public.encode()


async def _answer_forever(authenticator: Authenticator) -> None:
    questions = Inbox(authenticator.zap_socket)
    while True:
        # One at a time: a REP socket accepts no second question before it has answered the first.
        for question in await questions.receive(1):
            await authenticator.handle_zap_message(question)


def bind_private(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind; the directory of an ipc socket must have mode 0700, so that only its owner can enter it."""
    path = endpoint.removeprefix("ipc://")
    if path != endpoint and (why := why_not_private(Path(path).parent.stat(), 0o700)):
        raise PermissionError(f"{endpoint}: its directory {why}")
    socket.bind(endpoint)
