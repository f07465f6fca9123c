"""The receiver's side of transfers: grant pages, let the bytes in, insert, and only then acknowledge.

A transfer owns its pages from the grant to its end. How it ends decides when they may be used for others::

    every byte is there        when the pool commits them: from then on the pool owns them
    tcp: cut, late             once this process has stopped reading into them
    mapped, cuda, nixl: late   once the sender says that it has stopped writing (TransferWithdrawn, TransferSent)
    mapped, cuda: sender dead  once its process is killed for good: a paused one would write on when it wakes. One
                               whose death nobody announces is found by the shell (Probe)
    nixl: sender dead          after QUARANTINE_S, when no network card still has a write of it under way

Ended transfers are remembered: a late or repeated message gets the same answer and never a second grant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import attrs

from memserve.actions import Kill
from memserve.identity import ActorId
from memserve.messages import Gone
from memserve.transfer.actions import (
    Expect,
    IncomingAction,
    Post,
    Probe,
    Received,
    ReceiveFailed,
    StopReceiving,
)
from memserve.transfer.values import ON_ONE_HOST, WRITTEN_BY_SENDER, Geometry
from memserve.transfer_messages import (
    Failure,
    ToReceiver,
    TransferArrived,
    TransferGranted,
    TransferMessage,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
    Way,
)

STOP_REPEAT_S = 0.2
"""First pause before an unanswered TransferStop is repeated; it doubles up to STOP_REPEAT_MAX_S."""
STOP_REPEAT_MAX_S = 5.0
QUARANTINE_S = 30.0
"""How long a dead nixl sender's pages stay taken: longer than a network card retries an unanswered write."""

GONE_REMEMBERED = 1024
"""How many dead senders are remembered, because their last messages may still be on their way."""

Key = tuple[ActorId, int]
"""A transfer's key: its sender and its id."""
Ended = TransferArrived | TransferRefused


@attrs.frozen
class ReceiveRefused(Exception):
    """The pool refuses to grant or to commit the pages."""

    failure: Failure
    message: str
    code: str = ""
    """The PoolError's code, if the refusal comes from one."""

    def __str__(self) -> str:
        return f"{self.failure}: {self.message}"


class ReceivingPool(Protocol):
    """The owner of the pages that receive the bytes: the shard's pool.

    Called in the core's turn; nothing blocks.
    """

    def grant(self, key: Key, offer: TransferOffer) -> tuple[int, ...]:
        """Grant ``offer.pages`` pages to this transfer alone: those of its destination if it names any.

        Raises ReceiveRefused; all pages are granted, or none.
        """

    def commit(self, key: Key, offer: TransferOffer, pages: tuple[int, ...]) -> int:
        """The pages are complete: insert their tokens, if any, and give the pages to their owner.

        Returns the lease that holds them. Raises ReceiveRefused without having taken any; ``release``
        follows.
        """

    def release(self, key: Key, offer: TransferOffer, pages: tuple[int, ...]) -> None:
        """The pages are incomplete and no longer written to: free them."""


@attrs.define(eq=False)
class _Receiving:
    offer: TransferOffer
    pages: tuple[int, ...]
    way: Way
    deadline: float
    failed: TransferRefused | None = None
    """Set once the transfer can no longer succeed and only waits for its writer to stop."""
    repeat_at: float = math.inf
    pause_s: float = STOP_REPEAT_S
    release_at: float = math.inf
    """When the pages of a quarantined transfer are released."""

    @property
    def written_here(self) -> bool:
        """Whether this process writes the bytes into the pages, and can therefore stop writing."""
        return self.way.path not in WRITTEN_BY_SENDER


@attrs.define
class _Memory:
    """How one sender's latest transfers ended. A sender's ids only grow."""

    limit: int
    _ended: dict[int, Ended] = attrs.field(factory=dict, init=False)
    _forgotten: int = attrs.field(default=0, init=False)

    def answer(self, number: int) -> Ended | None:
        """How a transfer ended; None for a new one."""
        if number <= self._forgotten and number not in self._ended:
            return TransferRefused(number, Failure.REFUSED, f"transfer {number} is too old to be remembered")
        return self._ended.get(number)

    def put(self, ended: Ended) -> None:
        """Remember how a transfer ended; beyond the limit, forget the oldest."""
        self._ended.setdefault(ended.id, ended)
        if len(self._ended) > self.limit:
            oldest = next(iter(self._ended))
            del self._ended[oldest]
            self._forgotten = max(self._forgotten, oldest)


@attrs.define
class Incoming:
    """All transfers into this shard.

    Verbs: receive, advance, take, deadline, check. ``receive`` takes :data:`ToReceiver` from other shards,
    Gone, and Received, ReceiveFailed from this one.
    """

    geometry: Geometry
    host: str
    pool: ReceivingPool
    ways: tuple[Way, ...]
    """Ways to this shard's arena, best first."""
    receiving_max: int = 64
    """Maximum number of transfers under way; one more is refused with RECEIVER_FULL."""
    remembered_max: int = 1024
    """How many ended transfers are remembered per sender."""
    _receiving: dict[Key, _Receiving] = attrs.field(factory=dict, init=False)
    _memories: dict[ActorId, _Memory] = attrs.field(factory=dict, init=False)
    _gone: dict[ActorId, None] = attrs.field(factory=dict, init=False)
    """Dead senders, oldest first. An offer of theirs would never end: no sender is left to withdraw it."""
    _actions: list[IncomingAction] = attrs.field(factory=list, init=False)

    # ---- verbs -----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nothing is under way."""
        return min((_due(one) for one in self._receiving.values()), default=math.inf)

    def receive(
        self, sender: ActorId, message: ToReceiver | Gone | Received | ReceiveFailed, now: float
    ) -> None:
        """Handle one message. A late or repeated one is answered as before."""
        match message:
            case TransferOffer():
                self._offered((sender, message.id), message, now)
            case TransferSent(number):
                self._sent((sender, number))
            case TransferWithdrawn(number):
                self._withdrawn((sender, number), now)
            case Received(source, number):
                self._received((source, number))
            case ReceiveFailed(source, number, failure, text):
                self._receive_failed((source, number), failure, text)
            case Gone(actors):
                self._end_all_of(actors, now)

    def advance(self, now: float) -> None:
        """Fail transfers past their deadline, end quarantines, and repeat unanswered TransferStops."""
        for key, one in list(self._receiving.items()):
            if now >= one.release_at:
                self._release(key)
            elif one.failed is None and now >= one.deadline:
                self._fail(key, Failure.DEADLINE, "not complete in time", now)
            elif now >= one.repeat_at:
                self._ask_to_stop(key, one, now)

    def take(self) -> list[IncomingAction]:
        """The actions to perform; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._receiving) <= self.receiving_max
        held = [page for one in self._receiving.values() for page in one.pages]
        assert len(held) == len(set(held)), "two transfers hold one page"
        for (sender, number), one in self._receiving.items():
            assert len(one.pages) == one.offer.pages
            memory = self._memories.get(sender)
            assert memory is None or memory.answer(number) is None, f"transfer {number} ended and goes on"
        assert not self._gone.keys() & self._memories.keys()
        assert len(self._gone) <= GONE_REMEMBERED

    def __len__(self) -> int:
        """Transfers that hold pages, including those that only wait for their writer to stop."""
        return len(self._receiving)

    @property
    def filling(self) -> Iterator[tuple[int, ...]]:
        """The pages of each transfer."""
        return (one.pages for one in self._receiving.values())

    @property
    def writers(self) -> tuple[ActorId, ...]:
        """Senders whose failed transfers hold pages until they stop writing or are announced dead."""
        return tuple(
            dict.fromkeys(
                key[0] for key, one in self._receiving.items() if one.failed and not one.written_here
            )
        )

    # ---- messages --------------------------------------------------------------------------------------------

    def _offered(self, key: Key, offer: TransferOffer, now: float) -> None:
        sender, number = key
        one = self._receiving.get(key)
        ended = self._answer(key)
        if ended is not None:
            self._post(sender, ended)
        elif one is None:
            self._grant(key, offer, now)
        elif one.failed is None:
            self._post(sender, TransferGranted(number, one.pages, one.way))
        elif not one.written_here:
            self._post(sender, TransferStop(number))

    def _grant(self, key: Key, offer: TransferOffer, now: float) -> None:
        try:
            way = self._way(offer)
            pages = self.pool.grant(key, offer)
        except ReceiveRefused as refused:
            self._end(key, TransferRefused(offer.id, refused.failure, refused.message, refused.code))
            return
        deadline = now + offer.remaining_s
        one = self._receiving[key] = _Receiving(offer, pages, way, deadline)
        if one.written_here:
            self._actions.append(Expect(*key, pages, offer.granularity, deadline))
        self._post(key[0], TransferGranted(offer.id, pages, way))

    def _way(self, offer: TransferOffer) -> Way:
        """The best way that this sender can take. Raises ReceiveRefused."""
        if len(self._receiving) >= self.receiving_max:
            raise ReceiveRefused(
                Failure.RECEIVER_FULL, f"{self.receiving_max} transfers are under way already"
            )
        theirs = Geometry(offer.page_bytes, offer.layers) if _divides(offer) else None
        if theirs != self.geometry or offer.pages < 1:
            raise ReceiveRefused(
                Failure.REFUSED,
                f"{offer.pages} pages of {offer.page_bytes} bytes in {offer.layers} layers: "
                f"they must have {self.geometry.page_bytes} bytes in {self.geometry.layers} layers",
            )
        for way in self.ways:
            if way.path in offer.paths and (way.path not in ON_ONE_HOST or offer.host == self.host):
                return way
        mine = ", ".join(way.path for way in self.ways)
        raise ReceiveRefused(
            Failure.REFUSED,
            f"no common path: {', '.join(offer.paths)} there, {mine} here; see path in their TransferSettings",
        )

    def _sent(self, key: Key) -> None:
        sender, number = key
        one = self._receiving.get(key)
        if one is None:
            unknown = TransferRefused(number, Failure.REFUSED, f"transfer {number} is not known here")
            self._post(sender, self._answer(key) or unknown)
        elif one.failed is not None and not one.written_here:
            self._release(key)  # too late to succeed, but the sender has stopped writing
        elif not one.written_here:
            self._commit(key)
        # Over tcp this process writes the pages: Received says when they are complete, not the sender.

    def _withdrawn(self, key: Key, now: float) -> None:
        one = self._receiving.get(key)
        if one is None:
            # Remembered, so that an offer that arrives after its own withdrawal is not granted.
            self._remember(key, _refused(key, Failure.WITHDRAWN, "the sender withdrew it"))
            return
        if one.failed is None:
            self._fail(key, Failure.WITHDRAWN, "the sender withdrew it", now)
        if not one.written_here:
            self._release(key)

    def _end_all_of(self, actors: Iterable[ActorId], now: float) -> None:
        for actor in actors:
            mine = [key for key in self._receiving if key[0] == actor]
            here = [key for key in mine if self._receiving[key].way.path in ON_ONE_HOST]
            if here:
                # The Kill precedes every release, and actions are performed in order: the process is dead
                # before its pages are granted again.
                self._actions.append(Kill(actor, self._receiving[here[0]].offer.pid))
            self._gone[actor] = None
            self._memories.pop(actor, None)
            for key in mine:
                self._end_one(key, now)
        while len(self._gone) > GONE_REMEMBERED:
            del self._gone[next(iter(self._gone))]

    def _end_one(self, key: Key, now: float) -> None:
        one = self._receiving[key]
        if one.failed is None:
            self._fail(key, Failure.PEER_GONE, f"{key[0]} is gone", now)
        if one.way.path in ON_ONE_HOST:
            self._release(key)
        elif not one.written_here:
            one.repeat_at, one.release_at = math.inf, min(one.release_at, now + QUARANTINE_S)

    # ---- this process's own reading --------------------------------------------------------------------------

    def _received(self, key: Key) -> None:
        one = self._receiving.get(key)
        if one is None:
            return
        if one.failed is None:
            self._commit(key)
        else:
            self._release(key)

    def _receive_failed(self, key: Key, failure: Failure, text: str) -> None:
        one = self._receiving.get(key)
        if one is None:
            return
        if one.failed is None:
            one.failed = _refused(key, failure, text)
        self._release(key)

    # ---- ends ------------------------------------------------------------------------------------------------

    def _commit(self, key: Key) -> None:
        """Insert, then acknowledge: the sender must not count on pages that cannot be matched yet."""
        one = self._receiving[key]
        try:
            lease = self.pool.commit(key, one.offer, one.pages)
        except ReceiveRefused as refused:
            one.failed = TransferRefused(key[1], refused.failure, refused.message, refused.code)
            self._release(key)
            return
        del self._receiving[key]
        self._end(key, TransferArrived(key[1], lease))

    def _fail(self, key: Key, failure: Failure, text: str, now: float) -> None:
        """Mark a transfer as failed; its pages stay taken until its writer has stopped."""
        one = self._receiving[key]
        one.failed = _refused(key, failure, text)
        if one.written_here:
            self._actions.append(StopReceiving(*key))
        else:
            self._ask_to_stop(key, one, now)

    def _ask_to_stop(self, key: Key, one: _Receiving, now: float) -> None:
        self._post(key[0], TransferStop(key[1]))
        if one.way.path in ON_ONE_HOST:  # nobody may announce its death, if it is a program's own shard
            self._actions.append(Probe(key[0], one.offer.pid))
        one.repeat_at = now + one.pause_s
        one.pause_s = min(2 * one.pause_s, STOP_REPEAT_MAX_S)

    def _release(self, key: Key) -> None:
        one = self._receiving.pop(key)
        assert one.failed is not None, f"{key} is released without a reason"
        self.pool.release(key, one.offer, one.pages)
        self._end(key, one.failed)

    def _end(self, key: Key, ended: Ended) -> None:
        self._remember(key, ended)
        self._post(key[0], ended)

    def _answer(self, key: Key) -> Ended | None:
        """How a transfer ended, or why it must not begin; None for a new one."""
        sender, number = key
        if sender in self._gone:
            return _refused(key, Failure.PEER_GONE, f"{sender} was declared gone here")
        memory = self._memories.get(sender)
        return memory.answer(number) if memory else None

    def _remember(self, key: Key, ended: Ended) -> None:
        if key[0] not in self._gone:
            self._memories.setdefault(key[0], _Memory(self.remembered_max)).put(ended)

    def _post(self, to: ActorId, message: TransferMessage) -> None:
        self._actions.append(Post(to, message))


def _due(one: _Receiving) -> float:
    if one.failed is None:
        return one.deadline
    return min(one.repeat_at, one.release_at)


def _divides(offer: TransferOffer) -> bool:
    return offer.page_bytes > 0 and offer.layers > 0 and offer.page_bytes % (2 * offer.layers) == 0


def _refused(key: Key, failure: Failure, text: str) -> TransferRefused:
    return TransferRefused(key[1], failure, text)
