"""Pages that come from other shards and go to them: the work of a shard's pool and its two transfer cores.

A shard that is missing pages asks for them (Pull), and the one that has them sends: allocate, send, insert,
acknowledge. Until the transfer ends, the pages are held by leases::

    the pages being filled    the lease of the call that waits for them, which is not answered yet
    the pages being read      the lease that was named, or a lease of this shard's own on what its index holds

Both leases are *lent* to the transfer: if their owner ends them or dies, the pages stay as they are until the
mover has let go of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import attrs

from memserve.actions import Action, Kill, Log, MoverOrder, Send
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.grants import Grant
from memserve.mempool.pool import Pool
from memserve.mempool.pull_server import EXCHANGER, Serving
from memserve.mempool.pushing import Lending, Pushing
from memserve.messages import Gone
from memserve.pool_messages import Acquire, Source, Transfer
from memserve.tokens import count, pages_for, span
from memserve.transfer.actions import (
    Post,
    Received,
    ReceiveFailed,
    Report,
    Withdraw,
    WriteFailed,
    Wrote,
)
from memserve.transfer.incoming import Incoming, Key, ReceiveRefused
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.values import Geometry, TransferDone, TransferFailed
from memserve.transfer_messages import (
    Failure,
    Granularity,
    Pull,
    PullRefused,
    TransferArrived,
    TransferGranted,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
    Way,
)

PULL_REPEAT_S = 0.5
"""How long a Pull may stay unanswered before it is sent again."""

_TO_INCOMING = (TransferOffer, TransferSent, TransferWithdrawn, Received, ReceiveFailed)
_TO_OUTGOING = (TransferGranted, TransferArrived, TransferRefused, TransferStop, Wrote, WriteFailed)
HEARD = (*_TO_INCOMING, *_TO_OUTGOING, Pull, PullRefused)
"""Messages that :meth:`Exchange.receive` takes in addition to Gone."""


@attrs.define(eq=False)
class Fetch:
    """A call that waits for pages from another shard."""

    id: int
    sender: ActorId
    call: Acquire
    source: Source
    grant: Grant
    deadline: float
    repeat_at: float
    key: Key | None = None
    """The transfer that fills the pages, once it has been offered."""
    filled_tokens: int = 0
    """Tokens from position 0 that are present when the fetch ends."""
    nbytes: int = 0
    failed: bool = False

    def pull(self, page_tokens: int, now: float) -> Pull:
        """The message that asks the other shard for the pages."""
        first = self.grant.cached_tokens // page_tokens
        pages = pages_for(self.source.tokens, page_tokens) - first
        left, source = self.deadline - now, self.source
        return Pull(
            self.id, self.call.scope, self.call.tokens, first, pages, left, source.lease, source.owner
        )


@attrs.define
class Exchange:
    """Moves pages between this shard and others.

    Verbs: receive, advance, take, deadline, check. In addition, ``begin`` starts a fetch, and ``take_ended``
    returns those that have ended.
    """

    pool: Pool
    me: ActorId
    geometry: Geometry
    host: str
    pid: int
    granularity: Granularity = Granularity.AGGREGATED
    received_bytes: int = 0
    sent_bytes: int = 0
    handed_over_bytes: int = 0
    """Received bytes that belong to requests which were handed over."""
    returned_bytes: int = 0
    """Received bytes that came because a request had ended at the other shard."""
    failed_fetches: int = 0
    failed_returns: int = 0
    """Prefixes that no call waited for and that did not come."""
    lending: Lending = attrs.field(init=False)
    pushing: Pushing = attrs.field(init=False)
    serving: Serving = attrs.field(init=False)
    outgoing: Outgoing = attrs.field(init=False)
    incoming: Incoming = attrs.field(init=False)
    _fetches: dict[int, Fetch] = attrs.field(factory=dict, init=False)
    _ended: list[Fetch] = attrs.field(factory=list, init=False)
    _receiving: dict[Key, int] = attrs.field(factory=dict, init=False)
    """The lease that each incoming transfer of a fetch fills."""
    _orders: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    """Numbers of outgoing transfers."""
    _last: int = attrs.field(default=0, init=False)
    """Number of the latest fetch."""
    _now: float = attrs.field(default=0.0, init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.lending = Lending(self.pool)
        self.pushing = Pushing(self.pool, self.lending, self.granularity)
        self.outgoing = Outgoing(self.me, self.geometry, self.host, self.pid, ())
        self.serving = Serving(
            self.pool, self.lending, self.me, self.outgoing, self._orders, self.granularity
        )
        self.incoming = Incoming(self.geometry, self.host, self, ())

    @classmethod
    def closed(cls, pool: Pool) -> Exchange:
        """One that moves nothing, for a shard by itself."""
        return cls(pool, ActorId(""), Geometry(2, 1), "", 0)

    def open(self, paths: tuple[str, ...], ways: tuple[Way, ...]) -> None:
        """Allow transfers, now that the movers run: by ``paths`` to others, and by ``ways`` to this shard."""
        self.outgoing.paths, self.incoming.ways = paths, ways

    # ---- verbs ---------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nothing is under way."""
        fetches = min((min(one.deadline, one.repeat_at) for one in self._fetches.values()), default=math.inf)
        return min(fetches, self.outgoing.deadline, self.incoming.deadline, self.pushing.deadline)

    def receive(self, sender: ActorId, message: object, now: float) -> None:
        """Take in one message of HEARD, or Gone."""
        self._now = now
        match message:
            case Pull():
                self.serving.pulled(sender, message, now)
            case PullRefused(number, _, text):
                one = self._fetches.get(number)
                if one is not None and one.source.shard == sender:
                    self._fail(one, text)
            case Gone(actors):
                self.outgoing.receive(sender, message, now)
                self.incoming.receive(sender, message, now)
                self._forget_dead(set(actors))
            case _ if isinstance(message, _TO_INCOMING):
                self.incoming.receive(sender, message, now)
            case _ if isinstance(message, _TO_OUTGOING):
                self.outgoing.receive(sender, message, now)
        self._pass_on()

    def advance(self, now: float) -> None:
        """Give up late fetches, and repeat messages that are not answered."""
        self._now = now
        self.pushing.advance(now)
        self.outgoing.advance(now)
        self.incoming.advance(now)
        for one in list(self._fetches.values()):
            if now >= one.deadline:
                self._fail(one, "not there in time")
            elif now >= one.repeat_at:
                self._ask(one, now)
        self._pass_on()

    def take(self) -> list[Action]:
        """Actions to perform, returned once."""
        actions, self._actions = [*self.serving.take(), *self._actions], []
        return actions

    def take_ended(self) -> list[Fetch]:
        """Fetches that have ended, successfully or not, returned once."""
        ended, self._ended = self._ended, []
        return ended

    def gauges(self) -> dict[str, float]:
        """Figures for the heartbeat."""
        return {
            "fetches_under_way": len(self._fetches),
            "transfers_out_under_way": len(self.outgoing),
            "transfers_in_under_way": len(self.incoming),
            "transfer_in_bytes_total": self.received_bytes,
            "transfer_out_bytes_total": self.sent_bytes,
            "handoff_bytes_copied_total": self.handed_over_bytes,
            "returned_bytes_total": self.returned_bytes,
            "fetches_failed_total": self.failed_fetches,
            "returns_failed_total": self.failed_returns,
        }

    def check(self) -> None:
        """Assert every invariant."""
        self.outgoing.check()
        self.incoming.check()
        receiving = len(self._receiving) + self.pushing.receiving
        assert receiving == len(self.incoming), "pages that receive without a transfer, or the reverse"
        filled = {page for pages in self.incoming.filling for page in pages}
        assert filled.isdisjoint(self.pool.tree.all_pages()), "a transfer fills pages that can be matched"
        lent = [*self._receiving.values(), *self.pushing.lent(), *self.serving.lent()]
        for lease in self.pool.leases:
            assert lease.lent == lent.count(lease.id), f"lease {lease.id} is not lent as often as it is used"
        for one in self._fetches.values():
            assert self.pool.owner_of(one.grant.lease) == one.sender, f"fetch {one.id} has lost its lease"

    # ---- fetching ------------------------------------------------------------------------------------------

    def begin(self, sender: ActorId, call: Acquire, grant: Grant, now: float) -> bool:
        """Begin to fetch what a granted call is still missing; False when there is nothing to fetch."""
        source, page_tokens = call.source, self.pool.page_tokens
        if source is None or source.shard == self.me or not self.incoming.ways:
            return False
        least = 0 if source.lease else page_tokens - 1
        if source.tokens <= grant.cached_tokens + least or source.tokens > count(call.tokens):
            return False
        if any(tier_of(page) != Tier.DEVICE for page in grant.pages):
            return False
        self._last += 1
        one = Fetch(self._last, sender, call, source, grant, now + source.deadline_s, math.inf)
        self._fetches[one.id] = one
        self._ask(one, now)
        return True

    def fetch_of(self, sender: ActorId, call: int) -> Fetch | None:
        """The fetch that a call waits for; None when there is none."""
        mine = (one for one in self._fetches.values() if one.sender == sender and one.call.call == call)
        return next(mine, None)

    def calls_of(self, sender: ActorId) -> list[Acquire]:
        """A sender's calls that wait for other shards."""
        return [one.call for one in self._fetches.values() if one.sender == sender]

    def forget(self, sender: ActorId, call: int | None = None) -> None:
        """Drop a sender's fetches, or that of one call, which are no longer waited for.

        The caller must end the leases of the fetches.
        """
        for one in list(self._fetches.values()):
            if one.sender == sender and call in (None, one.call.call):
                del self._fetches[one.id]
        for order in self.pushing.forget(sender, call):
            self.outgoing.receive(self.me, Withdraw(order), self._now)
        self._pass_on()

    def unreachable(self, to: ActorId, message: object, now: float) -> None:
        """Handle a message of this core that could not be sent.

        The fetch of a Pull fails, and so does the transfer of an offer. Other messages are repeated, or asked
        for again.
        """
        text = f"{to} cannot be reached"
        if isinstance(message, Pull) and (one := self._fetches.get(message.id)) is not None:
            self._fail(one, text)
        elif isinstance(message, TransferOffer):
            self.outgoing.receive(to, TransferRefused(message.id, Failure.PEER_GONE, text), now)
            self._pass_on()

    def bring(self, scope: str, tokens: bytes) -> Grant | None:
        """Pages for a prefix that no call waits for, under a lease of this shard's own.

        None when pages are short.
        """
        pages = count(tokens) // self.pool.page_tokens
        if pages > self.pool.free_pages + self.pool.evictable_pages:
            return None
        return self.pool.lend_prefix(EXCHANGER, scope, tokens, pages)

    def __len__(self) -> int:
        """Number of calls that wait for other shards."""
        return len(self._fetches)

    def _ask(self, one: Fetch, now: float) -> None:
        self._actions.append(Send(one.source.shard, one.pull(self.pool.page_tokens, now)))
        one.repeat_at = now + PULL_REPEAT_S

    def _fail(self, one: Fetch, text: str) -> None:
        self.failed_fetches += 1
        one.failed = True
        data: dict[str, object] = {
            "request": one.source.request,
            "source": one.source.shard,
            "call": one.call.call,
            "reason": text,
        }
        self._actions.append(Log("warning", "fetch failed", data))
        self._finish(one)

    def _finish(self, one: Fetch) -> None:
        del self._fetches[one.id]
        self._ended.append(one)

    # ---- receiving (see ReceivingPool in transfer/incoming.py) ---------------------------------------------

    def grant(self, key: Key, offer: TransferOffer) -> tuple[int, ...]:
        """The pages of the fetch that asked for this transfer, or of the owner that the offer names."""
        if offer.purpose.owner:
            return self.pushing.grant(key, offer, self._now)
        one = self._fetches.get(int.from_bytes(offer.purpose.private, "little"))
        if one is None or one.key is not None or one.source.shard != key[0]:
            raise ReceiveRefused(Failure.REFUSED, "no fetch here waits for this transfer")
        first = one.grant.cached_tokens // self.pool.page_tokens
        pages = one.grant.pages[first : first + offer.pages]
        asked = pages_for(one.source.tokens, self.pool.page_tokens) - first
        if len(pages) != offer.pages or offer.pages > asked:
            raise ReceiveRefused(Failure.REFUSED, f"{offer.pages} pages are more than were asked for")
        one.key, one.repeat_at = key, math.inf
        self.lending.lend(one.grant.lease)
        self._receiving[key] = one.grant.lease
        return pages

    def commit(self, key: Key, offer: TransferOffer, pages: tuple[int, ...]) -> int:
        """Accept complete pages: insert them if asked to, and end the fetch that waits for them.

        Returns the lease that holds them; 0 if the fetch was given up.
        """
        if offer.purpose.owner:
            lease = self.pushing.commit(key, offer, pages, self._now)
            self.received_bytes += len(pages) * self.geometry.page_bytes
            return lease
        one = self._stop_receiving(key)
        nbytes = len(pages) * self.geometry.page_bytes
        self.received_bytes += nbytes
        if one is None:
            return 0  # the fetch was given up; the pages go with their lease
        there = one.grant.cached_tokens + len(pages) * self.pool.page_tokens
        one.filled_tokens, one.nbytes = min(there, one.source.tokens), nbytes
        self.handed_over_bytes += nbytes if one.source.lease else 0
        if one.source.insert:
            whole = one.filled_tokens // self.pool.page_tokens * self.pool.page_tokens
            start = one.grant.cached_tokens
            self.pool.insert(one.sender, one.grant.lease, start, span(one.call.tokens, start, whole))
        self._finish(one)
        return one.grant.lease

    def release(self, key: Key, offer: TransferOffer, pages: tuple[int, ...]) -> None:
        """Let go of pages that are not complete and that nothing writes to any more."""
        if offer.purpose.owner:
            self.pushing.release(key, offer)
            return
        one = self._stop_receiving(key)
        if one is not None:
            self._fail(one, "the transfer failed")

    def _stop_receiving(self, key: Key) -> Fetch | None:
        self.lending.take_back(self._receiving.pop(key))
        return next((one for one in self._fetches.values() if one.key == key), None)

    # ---- sending -------------------------------------------------------------------------------------------

    def push(self, sender: ActorId, call: Transfer, now: float) -> None:
        """Begin a Transfer; ``pushing`` reports how it ended. Raises PoolError."""
        if call.to == self.me or not self.outgoing.paths:
            raise PoolError(PoolError.NO_PATH, f"pages do not move from {self.me} to {call.to}")
        if len(self.outgoing) >= self.outgoing.sending_max:
            raise PoolError(PoolError.QUEUE_FULL, f"{len(self.outgoing)} transfers are under way already")
        order = self.pushing.order(next(self._orders), sender, call, now)
        self.outgoing.receive(self.me, order, now)
        self._pass_on()

    def warm(self, grant: Grant, now: float) -> None:
        """Send the pages that were brought in for a Pull."""
        self.serving.warm(grant, now)
        self._pass_on()

    def _reported(self, result: TransferDone | TransferFailed) -> None:
        if isinstance(result, TransferDone):
            self.sent_bytes += result.nbytes
        if not self.pushing.reported(result):
            self.serving.reported(result)

    # ---- inside --------------------------------------------------------------------------------------------

    def _forget_dead(self, actors: set[ActorId]) -> None:
        for one in [one for one in self._fetches.values() if one.source.shard in actors]:
            self._fail(one, f"{one.source.shard} is gone")
        self.serving.forget_dead(actors)

    def _pass_on(self) -> None:
        """Turn the actions of the transfer cores into actions of this shard."""
        while actions := [*self.outgoing.take(), *self.incoming.take()]:
            for action in actions:
                match action:
                    case Post(to, message):
                        self._actions.append(Send(to, message))
                    case Report(result):
                        self._reported(result)
                    case Kill():
                        self._actions.append(action)
                    case _:
                        self._actions.append(MoverOrder(action))
