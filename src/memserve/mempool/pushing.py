"""The paper's ``transfer`` and ``transfer_with_insert``: pages that their owner sends to another shard.

At the sender, a Transfer lends the leases that hold its pages to one order of the transfer core, and is
answered with the result of that order. At the receiver, the pages are granted to the *owner* that the offer
names::

    the owner named pages of its own    they stay under its lease
    the shard allocates pages           they get a new lease of the owner's, which it must claim: it may
                                        never have heard of the lease, because the answer to its call is
                                        lost if the sender dies

A lease that is not claimed within the pool's ``lease_s`` ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Tier, tier_of
from memserve.mempool.answers import Answer
from memserve.mempool.demands import check_private
from memserve.mempool.leases import LENDER, Lease
from memserve.mempool.pool import Pool
from memserve.pool_messages import Arrival, NextArrival, PoolRefused, Transfer, Transferred
from memserve.tokens import count
from memserve.transfer.actions import Order
from memserve.transfer.incoming import Key, ReceiveRefused
from memserve.transfer.values import TransferDone, TransferFailed
from memserve.transfer_messages import Failure, Granularity, Purpose, TransferOffer

CODES = {
    Failure.RECEIVER_FULL: PoolError.QUEUE_FULL,
    Failure.PEER_GONE: PoolError.PEER_GONE,
    Failure.CUT: PoolError.CUT,
    Failure.DEADLINE: PoolError.DEADLINE,
    Failure.REFUSED: PoolError.NO_PATH,
    Failure.CHECKSUM: PoolError.CHECKSUM,
    Failure.WITHDRAWN: PoolError.CUT,
}
"""Codes for callers whose transfer failed for another reason than a refusal by the receiver's pool."""
Answered = tuple[ActorId, Answer]


@attrs.define
class Lending:
    """Leases whose pages movers read or fill: the pages stay as they are, even if the lease is ended."""

    pool: Pool

    def lend(self, lease: int) -> None:
        """Count one more mover of a lease's pages."""
        held = self.pool.leases.find(lease)
        assert held is not None, f"lease {lease} is lent after its end"
        held.lent += 1

    def take_back(self, lease: int) -> None:
        """Count one mover less; after the last, end the lease if its owner has ended it already."""
        held = self.pool.leases.find(lease)
        assert held is not None and held.lent, f"lease {lease} was not lent"
        held.lent -= 1
        if not held.lent and held.owner == LENDER:
            self.pool.free_mem(LENDER, lease)


@attrs.define
class _Push:
    sender: ActorId
    call: int
    """0 when no answer is waited for any more."""
    leases: tuple[int, ...]


@attrs.define
class _Arrived:
    """Pages that their owner has not claimed yet."""

    purpose: Purpose
    until: float


@attrs.define
class Pushing:
    """Both ends of pushes, for one shard. ``order`` begins a push; the caller owns the transfer cores."""

    pool: Pool
    lending: Lending
    default: Granularity
    """Granularity of calls that do not name one."""
    _pushes: dict[int, _Push] = attrs.field(factory=dict, init=False)
    """Pushes by order number."""
    _receiving: dict[Key, Lease] = attrs.field(factory=dict, init=False)
    _arrived: dict[int, _Arrived] = attrs.field(factory=dict, init=False)
    """Arrivals by lease."""
    _waiting: dict[tuple[ActorId, int], None] = attrs.field(factory=dict, init=False)
    """Unanswered NextArrivals, by (sender, call)."""
    _answers: list[Answered] = attrs.field(factory=list, init=False)

    # ---- the sender's side ---------------------------------------------------------------------------------

    def order(self, number: int, sender: ActorId, call: Transfer, now: float) -> Order:
        """Begin a call of ``sender`` as the order with this number.

        Raises PoolError (BAD_COUNT, FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, UNKNOWN_LEASE, NOT_OWNER,
        MOVING, BAD_TIER, NOT_WHOLE_PAGES, DOES_NOT_FIT).
        """
        if not 0 < call.deadline_s < math.inf:
            raise PoolError(PoolError.BAD_COUNT, f"a deadline of {call.deadline_s} s: expected more than 0")
        source = self._source(sender, call)
        self._check_sizes(call)
        push = self._pushes[number] = _Push(sender, call.call, tuple(dict.fromkeys(call.leases)))
        for lease in push.leases:
            self.lending.lend(lease)
        purpose = Purpose(
            destination=call.destination,
            into=call.into,
            owner=call.owner or sender,
            caller=sender,
            scope=call.scope,
            tokens=call.tokens,
            private=call.private,
        )
        granularity = Granularity(call.granularity) if call.granularity else self.default
        return Order(call.to, number, source, now + call.deadline_s, granularity, purpose=purpose)

    def _source(self, sender: ActorId, call: Transfer) -> tuple[int, ...]:
        """Slots of the pages to send, if the sender holds them and they can be sent."""
        slots = self.pool.home.slots(Address(address) for address in call.addresses)
        held = [self.pool.leases.get(sender, lease) for lease in dict.fromkeys(call.leases)]
        mine = {page for lease in held for page in lease.pages}
        if not slots or len(set(slots)) < len(slots) or not mine.issuperset(slots):
            raise PoolError(
                PoolError.NOT_HELD, "the named leases do not hold all of these pages, or not twice"
            )
        if any(tier_of(slot) != Tier.DEVICE for slot in slots):
            raise PoolError(PoolError.BAD_TIER, "only pages of the device tier are sent: swap_in first")
        return tuple(slots)

    def _check_sizes(self, call: Transfer) -> None:
        pages, tokens = len(call.addresses), count(call.tokens)
        if len(call.tokens) % self.pool.tree.page_bytes:
            text = f"{len(call.tokens)} bytes of tokens are not whole pages of {self.pool.page_tokens} tokens"
            raise PoolError(PoolError.NOT_WHOLE_PAGES, text)
        if tokens and tokens != pages * self.pool.page_tokens:
            text = f"{tokens} tokens do not fill {pages} pages of {self.pool.page_tokens}"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        if call.destination and len(call.destination) != pages:
            text = f"{pages} pages do not fit into {len(call.destination)}"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        if len(set(call.destination)) < len(call.destination):
            raise PoolError(PoolError.NOT_HELD, "a destination page is named twice")
        check_private(call.private)
        if call.granularity not in ("", *Granularity):
            text = f"granularity {call.granularity!r}: expected one of {', '.join(Granularity)}"
            raise PoolError(PoolError.BAD_COUNT, text)

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call is under way."""
        pushes = self._pushes.values()
        return (sender, call) in self._waiting or any(
            one.sender == sender and one.call == call for one in pushes
        )

    def reported(self, result: TransferDone | TransferFailed) -> bool:
        """Answer the call whose order has ended; False if the order is not one of :meth:`order`."""
        one = self._pushes.pop(result.id, None)
        if one is None:
            return False
        for lease in one.leases:
            self.lending.take_back(lease)
        answer: Answer
        if isinstance(result, TransferDone):
            answer = Transferred(one.call, result.lease, result.pages, result.nbytes)
        else:
            answer = PoolRefused(one.call, result.code or CODES[result.failure], result.message)
        self._answers += [(one.sender, answer)] if one.call else []
        return True

    # ---- the receiver's side -------------------------------------------------------------------------------

    def grant(self, key: Key, offer: TransferOffer, now: float) -> tuple[int, ...]:
        """Pages that the owner named, or new ones for it. Raises ReceiveRefused."""
        try:
            lease, pages = (
                self._given(offer.purpose) if offer.purpose.destination else self._allocated(offer, now)
            )
        except PoolError as refused:
            raise ReceiveRefused(Failure.REFUSED, refused.message, refused.code) from refused
        self.lending.lend(lease.id)
        self._receiving[key] = lease
        return pages

    def _given(self, purpose: Purpose) -> tuple[Lease, tuple[int, ...]]:
        """Pages that their owner named. Retired pages are refused, because others may read them."""
        slots = self.pool.home.slots(Address(address) for address in purpose.destination)
        lease = self.pool.leases.unlent(purpose.owner, purpose.into)
        retired = lease.retired_tokens // self.pool.page_tokens
        if (purpose.tokens and retired) or not set(slots).isdisjoint(lease.pages[:retired]):
            raise PoolError(PoolError.RETIRED, f"lease {lease.id} has retired pages, which cannot be written")
        if len(set(slots)) < len(slots) or not set(slots).issubset(lease.pages):
            raise PoolError(
                PoolError.NOT_HELD, f"lease {lease.id} does not hold all of these pages, or not twice"
            )
        if any(tier_of(slot) != Tier.DEVICE for slot in slots):
            raise PoolError(PoolError.BAD_TIER, "pages are received in the device tier only")
        return lease, tuple(slots)

    def _allocated(self, offer: TransferOffer, now: float) -> tuple[Lease, tuple[int, ...]]:
        grant = self.pool.alloc_new(offer.purpose.owner, offer.purpose.scope, offer.pages, Tier.DEVICE, now)
        lease = self.pool.leases.find(grant.lease)
        assert lease is not None
        return lease, grant.pages

    def fills(self, lease: int) -> bool:
        """Whether a transfer fills pages of this lease."""
        return any(one.id == lease for one in self._receiving.values())

    def commit(self, key: Key, offer: TransferOffer, pages: tuple[int, ...], now: float) -> int:
        """Accept complete pages, insert their tokens if there are any, and return their lease.

        Raises ReceiveRefused.
        """
        lease, purpose = self._receiving[key], offer.purpose
        if lease.owner != purpose.owner:
            raise ReceiveRefused(Failure.REFUSED, "its owner has ended the lease", PoolError.UNKNOWN_LEASE)
        if purpose.tokens:
            named = self.pool.home.addresses(pages)
            try:
                self.pool.insert(purpose.owner, lease.id, 0, purpose.tokens, named)
            except PoolError as refused:
                raise ReceiveRefused(Failure.REFUSED, refused.message, refused.code) from refused
        del self._receiving[key]
        self.lending.take_back(lease.id)
        if not purpose.destination:
            self._arrived[lease.id] = _Arrived(purpose, now + self.pool.leases.lease_s)
            self._announce()
        return lease.id

    def release(self, key: Key, offer: TransferOffer) -> None:
        """Let go of pages that are not complete and that nothing writes to any more."""
        lease = self._receiving.pop(key)
        if not offer.purpose.destination and lease.owner == offer.purpose.owner:
            self.pool.free_mem(lease.owner, lease.id)  # lent, so it passes to LENDER
        self.lending.take_back(lease.id)

    # ---- claims --------------------------------------------------------------------------------------------

    def wait(self, sender: ActorId, call: NextArrival) -> None:
        """Answer with pages that others have sent to ``sender``, now or when some arrive."""
        self._waiting[sender, call.call] = None
        self._announce()

    def claimed(self, lease: int) -> None:
        """Record that the lease's owner knows of it, and will end it itself."""
        self._arrived.pop(lease, None)

    def _announce(self) -> None:
        for (sender, call), _ in list(self._waiting.items()):
            lease = self._next_for(sender)
            if lease is not None:
                one = self._arrived.pop(lease.id)
                del self._waiting[sender, call]
                pages, tokens = tuple(lease.pages), lease.retired_tokens
                caller, private = one.purpose.caller, one.purpose.private
                answer = Arrival(call, lease.id, pages, tokens, caller, private)
                self._answers.append((sender, answer))

    def _next_for(self, owner: ActorId) -> Lease | None:
        """The lease of the oldest arrival that another actor sent to ``owner``."""
        for number, one in self._arrived.items():
            lease = self.pool.leases.find(number)
            if (
                one.purpose.owner == owner != one.purpose.caller
                and lease is not None
                and lease.owner == owner
            ):
                return lease
        return None

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next."""
        return min((one.until for one in self._arrived.values()), default=math.inf)

    def advance(self, now: float) -> None:
        """End the leases that were not claimed in time."""
        for number, one in list(self._arrived.items()):
            if now >= one.until:
                del self._arrived[number]
                if self.pool.owner_of(number) == one.purpose.owner:
                    self.pool.free_mem(one.purpose.owner, number)

    def excuse(self, now: float) -> None:
        """Give every arrival the whole time to be claimed, because it was this shard that heard nothing."""
        for one in self._arrived.values():
            one.until = now + self.pool.leases.lease_s

    def forget(self, sender: ActorId, call: int | None = None) -> list[int]:
        """Drop a sender's calls, or one of them, which are no longer waited for.

        Returns the orders to withdraw.
        """
        for key in [key for key in self._waiting if key[0] == sender and call in (None, key[1])]:
            del self._waiting[key]
        mine = [number for number, one in self._pushes.items() if one.sender == sender and one.call]
        ended = [number for number in mine if call in (None, self._pushes[number].call)]
        for number in ended:
            self._pushes[number].call = 0
        return ended

    def take_answers(self) -> list[Answered]:
        """Answers to calls that had to wait, returned once."""
        answers, self._answers = self._answers, []
        return answers

    # ---- accounts ------------------------------------------------------------------------------------------

    def lent(self) -> Iterator[int]:
        """Every lease that is lent here, once for each mover."""
        for push in self._pushes.values():
            yield from push.leases
        for lease in self._receiving.values():
            yield lease.id

    @property
    def receiving(self) -> int:
        """Number of incoming pushes."""
        return len(self._receiving)

    def __len__(self) -> int:
        """Number of unanswered calls."""
        return len(self._pushes) + len(self._waiting)
