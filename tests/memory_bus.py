"""The bus without ZeroMQ: links that deliver in memory, in virtual time."""

from __future__ import annotations

from collections import deque

import trio

from memserve.bus import BATCH_MESSAGES, INBOX_MESSAGES, Received
from memserve.errors import PeerFull, PeerUnreachable
from memserve.identity import ActorId
from memserve.messages import Message, decode, encode


class MemoryBus:
    """An in-memory bus for tests.

    It follows ZeroMQ's rules: bounded, in order per pair, lost when the peer is gone.
    """

    def __init__(self, limit: int = INBOX_MESSAGES) -> None:
        self.limit = limit
        self._inboxes: dict[str, MemoryLink] = {}

    def link(self, actor: ActorId) -> MemoryLink:
        """A link bound at ``memory://<actor>``."""
        link = MemoryLink(self, actor)
        self._inboxes[link.endpoint] = link
        return link

    def endpoint_of(self, actor: ActorId) -> str | None:
        """The endpoint at which ``actor`` is bound, as a hello would report it; None if it is not bound."""
        endpoint = f"memory://{actor}"
        return endpoint if endpoint in self._inboxes else None

    def unbind(self, link: MemoryLink) -> None:
        """Unbind a link: messages sent to it from now on are lost, as with a dead process."""
        self._inboxes.pop(link.endpoint, None)

    def deliver(self, endpoint: str, received: Received) -> None:
        """Put a message into the inbox at ``endpoint``. Raises PeerFull."""
        inbox = self._inboxes.get(endpoint)
        if inbox is not None:
            inbox.put(received)


class MemoryLink:
    """The in-memory Link. Messages pass through the codec, so that tests see what the wire would carry."""

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

    def introduce(self, actor: ActorId, endpoint: str) -> None:
        self._peers.setdefault(actor, endpoint)

    def forget(self, actor: ActorId) -> None:
        self._peers.pop(actor, None)

    def send(self, to: ActorId, message: Message) -> None:
        endpoint = self._peers.get(to)
        if endpoint is None:
            raise PeerUnreachable(to)
        self._bus.deliver(endpoint, Received(self.actor, decode(*encode(message))))

    def put(self, received: Received) -> None:
        """Add a message to the inbox; called by the bus. Raises PeerFull."""
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
