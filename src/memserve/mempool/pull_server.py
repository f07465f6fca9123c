"""Pages that a shard sends because another asks for them (Pull): those of a lease, or of its index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import attrs

from memserve.actions import Action, Send
from memserve.identity import ActorId
from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.grants import Grant
from memserve.mempool.pool import Pool
from memserve.mempool.pushing import Lending
from memserve.tokens import count, span
from memserve.transfer.actions import Order
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.values import TransferDone, TransferFailed
from memserve.transfer_messages import Failure, Granularity, Pull, PullRefused, Purpose

EXCHANGER = ActorId("exchange.0")
"""Owner of the leases under which a shard itself reads and fills pages for others."""
PULLS_REMEMBERED = 4096
"""Number of Pulls remembered, to recognize repeats."""
WARMING_MAX = 64
"""Maximum number of Pulls whose pages are brought in at a time; one more is refused."""


@attrs.define(eq=False)
class _Sending:
    to: ActorId
    pull: Pull
    lease: int
    pages: int = 0
    order: int = 0
    """Order number; 0 while the pages are brought in."""


@attrs.define
class Serving:
    """Pulls that are answered by transfers.

    ``outgoing`` makes the transfers; :meth:`reported` must be called when one has ended.
    """

    pool: Pool
    lending: Lending
    me: ActorId
    outgoing: Outgoing
    orders: Iterator[int]
    granularity: Granularity
    _pulls: OrderedDict[tuple[ActorId, int], None] = attrs.field(factory=OrderedDict, init=False)
    _warming: dict[int, _Sending] = attrs.field(factory=dict, init=False)
    """Pulls by lease, while their pages are brought into the device tier."""
    _sending: dict[int, _Sending] = attrs.field(factory=dict, init=False)
    """Pulls by order number, while their pages are sent."""
    _actions: list[Action] = attrs.field(factory=list, init=False)

    def take(self) -> list[Action]:
        """Refusals to send, returned once."""
        actions, self._actions = self._actions, []
        return actions

    def lent(self) -> Iterator[int]:
        """Every lease that is lent here, once for each mover."""
        return (one.lease for one in self._sending.values())

    def forget_dead(self, actors: set[ActorId]) -> None:
        """Forget the Pulls of these dead shards."""
        for key in [key for key in self._pulls if key[0] in actors]:
            del self._pulls[key]

    def pulled(self, sender: ActorId, pull: Pull, now: float) -> None:
        """Send the pages that are asked for, or refuse."""
        if (sender, pull.id) in self._pulls:
            return
        self._pulls[sender, pull.id] = None
        while len(self._pulls) > PULLS_REMEMBERED:
            self._pulls.popitem(last=False)
        held = self.pool.leases.find(pull.lease) if pull.lease else None
        if held is not None and held.owner == pull.owner and held.floor is None:
            pages = tuple(held.pages[pull.first_page : pull.first_page + pull.pages])
            self._send(_Sending(sender, pull, held.id), pages, now)
            return
        last = (pull.first_page + pull.pages) * self.pool.page_tokens
        tokens = span(pull.tokens, 0, min(last, count(pull.tokens)))
        room = len(self._warming) < WARMING_MAX
        grant = self.pool.lend_prefix(EXCHANGER, pull.scope, tokens, 0) if room else None
        if grant is None:
            self._refuse(sender, pull, Failure.RECEIVER_FULL, "no room to bring the prefix in")
            return
        one = _Sending(sender, pull, grant.lease)
        if grant.ready:
            self._lend(one, grant, now)
        else:
            self._warming[grant.lease] = one

    @property
    def warming(self) -> tuple[int, ...]:
        """The leases whose pages are being brought in for Pulls."""
        return tuple(self._warming)

    def warming_failed(self, lease: int) -> None:
        """Refuse a Pull whose pages were not brought in after all; their lease has ended."""
        one = self._warming.pop(lease)
        self._refuse(one.to, one.pull, Failure.REFUSED, "the pages could not be brought in")

    def warm(self, grant: Grant, now: float) -> None:
        """Send the pages of one of EXCHANGER's leases, which are all in the device tier now."""
        self._lend(self._warming.pop(grant.lease), grant, now)

    def _lend(self, one: _Sending, grant: Grant, now: float) -> None:
        self._send(one, grant.pages[one.pull.first_page :], now)
        self.pool.free_mem(EXCHANGER, grant.lease)  # lent by now, or not needed

    def _send(self, one: _Sending, pages: tuple[int, ...], now: float) -> None:
        if not pages or any(tier_of(page) != Tier.DEVICE for page in pages):
            self._refuse(one.to, one.pull, Failure.REFUSED, "none of the pages is here")
            return
        one.order, one.pages = next(self.orders), len(pages)
        self.lending.lend(one.lease)
        self._sending[one.order] = one
        purpose = Purpose(private=one.pull.id.to_bytes(8, "little"))
        order = Order(one.to, one.order, pages, now + one.pull.remaining_s, self.granularity, purpose=purpose)
        self.outgoing.receive(self.me, order, now)

    def _refuse(self, to: ActorId, pull: Pull, failure: Failure, text: str) -> None:
        self._actions.append(Send(to, PullRefused(pull.id, failure, text)))

    def reported(self, result: TransferDone | TransferFailed) -> None:
        """End an order; if it failed, its asker gets a refusal."""
        one = self._sending.pop(result.id)
        self.lending.take_back(one.lease)
        if isinstance(result, TransferFailed):
            self._refuse(one.to, one.pull, result.failure, result.message)
