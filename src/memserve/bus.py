"""ZeroMQ under trio, and its in-memory twin.

On one host over Unix sockets that only their user can open; between hosts over TCP with CURVE, where the cluster's key is
what lets a connection in and encrypts it. Every actor binds one ROUTER, its inbox, and sends through one DEALER a peer, so that a slow peer fills its own
bounded queue and nobody else's. Messages are one-way values (:mod:`memserve.messages`); an answer is a message
the other way. Delivery is at most once and in order a pair; what must arrive is repeated or checked for gaps
by the cores.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict, deque
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

if TYPE_CHECKING:
    from zmq.auth import Authenticator

INBOX_MESSAGES = 10_000
"""Receive high-water mark of an inbox; beyond it senders' own queues fill."""
PEER_MESSAGES = 10_000
"""Send high-water mark a peer; beyond it ``send`` raises PeerFull."""
BATCH_MESSAGES = 64
"""Messages taken from the inbox between two checkpoints."""
HELLO = bytes([PROTOCOL_VERSION]) + b"hello"
"""Kind of a connection's first message: the sender's own endpoint, so that it can be answered before it is announced."""
FRAME_BYTES_MAX = 64 << 20
"""Longest frame accepted; a longer one disconnects its sender."""
LINGER_MS = 300
"""How long unsent replies outlive their socket. Never -1: a socket with an unreachable peer would hang the exit."""
HEARTBEAT_MS, CUT_MS = 1_000, 5_000
"""Over TCP: how often a connection is tried, and the silence after which it is cut. As long as the scheduler bears silence
(DEAD_AFTER_S), so that what TCP would still deliver is not lost to a shorter pause."""
CONNECT_MS = 2_000
"""Longest wait for a TCP connection; the system itself would wait minutes for a host that has vanished."""
RECONNECT_MS, RECONNECT_MS_MAX = 100, 2_000
"""First and longest pause between two tries."""
GUEST_S = 60.0
"""Silence after which the connection to an actor that only said hello is closed. Far longer than any lease lives without a call."""
GUESTS_MAX = 10_000
"""Such actors remembered; of more, the longest silent can no longer be answered."""
LATE_S = 1.0
"""After so long without an answer, a host that joins says that it waits."""
REFUSALS = 3
"""Connections that are broken off before one is let in: then it is the key. Fewer may be a scheduler that just ended."""


class Inbox:
    """Receives on one pyzmq socket under trio.

    A ZeroMQ descriptor is edge-triggered, and *every* call on the socket (send, receive, reading EVENTS) may eat the
    edge that a waiting task needs. So one task receives and nobody else calls anything: it waits only after a receive
    found nothing, which leaves the descriptor readable by whatever comes next.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._descriptor = socket.FD
        self._empty = False
        """The last receive found nothing more."""

    async def receive(self, limit: int = BATCH_MESSAGES) -> list[list[bytes]]:
        """Wait for a multipart message; up to ``limit`` that are there. Cancelled it has taken none."""
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
    """A message and who sent it."""

    sender: ActorId
    message: Message


class Link(Protocol):
    """What an actor needs of the bus; :class:`ZmqLink` and :class:`MemoryLink` are the two kinds."""

    actor: ActorId
    endpoint: str
    refused: int
    """Frames dropped because they were not messages of ours."""

    def connect(self, actor: ActorId, endpoint: str) -> None:
        """From now on ``send`` reaches ``actor``. Repeating it with the same endpoint does nothing."""

    def forget(self, actor: ActorId) -> None:
        """Drop the connection and what is queued on it. An unknown actor is no error."""

    def send(self, to: ActorId, message: Message) -> None:
        """Queue a message. Raises PeerUnreachable without a connection and PeerFull at the limit."""

    async def receive(self) -> list[Received]:
        """Wait for at least one message; take what else is there."""


class ZmqLink:
    """A bound inbox and one outgoing connection an endpoint. :func:`open_link` makes one.

    An actor may go by two ids, as a scheduler does, which has a name that outlives it. Its inbox passes over the second of
    two connections of one sender without a word, so both ids share one.
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
        """With the port that the system chose."""
        self._inbox = Inbox(inbox)
        self._directory: dict[ActorId, str] = {}
        self._guests: OrderedDict[ActorId, float] = OrderedDict()
        """Known by nothing but their own hello, such as programs that use the pool; when each was last heard, the longest
        silent first. No message will say that they are gone."""
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        """By endpoint."""

    def _make_inbox(self, endpoint: str) -> zmq.Socket[bytes]:
        inbox = self._context.socket(zmq.ROUTER)
        try:
            self._bind(inbox, endpoint)
        except BaseException:
            inbox.close()  # a context with an open socket would never end
            raise
        return inbox

    def _bind(self, inbox: zmq.Socket[bytes], endpoint: str) -> None:
        inbox.setsockopt(zmq.LINGER, 0)
        inbox.setsockopt(zmq.ROUTER_MANDATORY, 1)
        inbox.setsockopt(zmq.RCVHWM, INBOX_MESSAGES)
        inbox.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        if self._keys:
            over_network(inbox, self._keys, endpoint)
            inbox.setsockopt(zmq.CURVE_SERVER, 1)
            # A peer whose connection broke comes back before this side has noticed: its new connection counts.
            inbox.setsockopt(zmq.ROUTER_HANDOVER, 1)
        bind_private(inbox, endpoint)

    def connect(self, actor: ActorId, endpoint: str) -> None:
        self._guests.pop(actor, None)
        if self._directory.get(actor) != endpoint:
            self.forget(actor)
            self._directory[actor] = endpoint

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
        except zmq.ZMQError as error:  # of a first message: no socket is left, or the hello named no endpoint
            raise PeerUnreachable(to) from error

    def _dial(self, endpoint: str) -> zmq.Socket[bytes]:
        """Open the connection at the first message, and say first where an answer goes. Raises zmq.ZMQError."""
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
        """Connections to programs that ended would pile up. One that was only silent is called again at its next message."""
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
                self._hear_hello(sender, body.decode())
                return None
            if sender in self._guests:
                self._heard(sender)
            return Received(sender, decode(kind, body))
        except (ValueError, PeerError):
            self.refused += 1
            return None

    def _hear_hello(self, sender: ActorId, endpoint: str) -> None:
        if sender in self._directory:
            return
        self._directory[sender] = endpoint
        self._heard(sender)
        if len(self._guests) > GUESTS_MAX:
            self.forget(next(iter(self._guests)))

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
    """A bound link; on leaving, queued replies get LINGER_MS, then everything is closed.

    With ``keys`` every connection is by CURVE, and only who has the same keys is let in.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
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
    """Give a socket for ``endpoint`` the cluster's keys, and let it notice when the other host is gone."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    if (
        "[" in endpoint
    ):  # else an IPv4 address would be announced as IPv6 has it, which not every host can reach
        socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, CUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, CUT_MS)


def as_client(socket: zmq.Socket[bytes], keys: KeyPair, endpoint: str) -> None:
    """The same for a socket that connects."""
    over_network(socket, keys, endpoint)
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)


async def knock(head: str, keys: KeyPair, late: Callable[[], None]) -> None:
    """Wait until the inbox at ``head`` lets in who has ``keys``. ``late`` is called when nobody answers there yet.

    Raises UserError when it does not.
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
            await _let_in(events, head)
        if in_time.cancelled_caught:
            late()
            await _let_in(events, head)
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close()
        context.term()


async def _let_in(events: Inbox, head: str) -> None:
    """Follow a connection's tries. One that is made and then broken off, again and again, is refused for its key."""
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
    """Within it, the context's servers let in who has the public key of ``keys``, and nobody else.

    ZeroMQ asks a socket of the context about every connection (ZAP), and waits for its answer.
    """
    from zmq.auth import Authenticator

    authenticator = Authenticator(context)
    authenticator.configure_curve_callback(credentials_provider=_Members(keys.public))
    authenticator.start()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_for_ever, authenticator)
            yield
            nursery.cancel_scope.cancel()
    finally:
        authenticator.stop()


@attrs.frozen
class _Members:
    """What pyzmq's authenticator asks."""

    public: str

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self.public.encode()


async def _answer_for_ever(authenticator: Authenticator) -> None:
    questions = Inbox(authenticator.zap_socket)
    while True:
        # One at a time: a REP socket takes no second question before it has answered the first.
        for question in await questions.receive(1):
            await authenticator.handle_zap_message(question)


def bind_private(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Bind; an ipc socket must lie in a directory that only its owner can enter (mode 0700)."""
    if endpoint.startswith("ipc://"):
        mode = os.stat(Path(endpoint.removeprefix("ipc://")).parent).st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise PermissionError(f"{endpoint}: its directory has mode {stat.S_IMODE(mode):o}, must be 0700")
    socket.bind(endpoint)


class MemoryBus:
    """An in-memory bus for tests: same rules as ZeroMQ (bounded, in order a pair, lost when the peer is gone)."""

    def __init__(self, limit: int = INBOX_MESSAGES) -> None:
        self.limit = limit
        self._inboxes: dict[str, MemoryLink] = {}

    def link(self, actor: ActorId) -> MemoryLink:
        """A link bound at ``memory://<actor>``."""
        link = MemoryLink(self, actor)
        self._inboxes[link.endpoint] = link
        return link

    def endpoint_of(self, actor: ActorId) -> str | None:
        """Where ``actor`` is bound: what a hello would say."""
        endpoint = f"memory://{actor}"
        return endpoint if endpoint in self._inboxes else None

    def unbind(self, link: MemoryLink) -> None:
        """What is sent to it from now on is lost, as to a dead process."""
        self._inboxes.pop(link.endpoint, None)

    def deliver(self, endpoint: str, received: Received) -> None:
        """Put a message into the inbox at ``endpoint``. Raises PeerFull."""
        inbox = self._inboxes.get(endpoint)
        if inbox is not None:
            inbox.put(received)


class MemoryLink:
    """The in-memory Link. Messages still pass through the codec, so that tests see what the wire would carry."""

    def __init__(self, bus: MemoryBus, actor: ActorId) -> None:
        self.actor = actor
        self.endpoint = f"memory://{actor}"
        self.refused = 0
        self._bus = bus
        self._peers: dict[ActorId, str] = {}
        self._waiting: deque[Received] = deque()
        self._arrived = trio.lowlevel.ParkingLot()

    def connect(self, actor: ActorId, endpoint: str) -> None:
        self._peers[actor] = endpoint

    def forget(self, actor: ActorId) -> None:
        self._peers.pop(actor, None)

    def send(self, to: ActorId, message: Message) -> None:
        endpoint = self._peers.get(to)
        if endpoint is None:
            raise PeerUnreachable(to)
        self._bus.deliver(endpoint, Received(self.actor, decode(*encode(message))))

    def put(self, received: Received) -> None:
        """Called by the bus."""
        if len(self._waiting) >= self._bus.limit:
            raise PeerFull(self.actor)
        sender = self._bus.endpoint_of(received.sender)
        if sender is not None:
            self._peers.setdefault(received.sender, sender)
        self._waiting.append(received)
        self._arrived.unpark_all()

    async def receive(self) -> list[Received]:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            await self._arrived.park()
        return [self._waiting.popleft() for _ in range(min(BATCH_MESSAGES, len(self._waiting)))]
