"""The MemPoolShard's core: pool calls in, answers out, and the clock that ends leases of silent owners.

A call is identified by ``(sender, call)`` and acted on once. A repeat gets the same answer again (as long as
a granted lease lives) and never a second grant, which no caller would know to free.

What is not answered at once waits in :class:`~memserve.mempool.waiting_calls.WaitingCalls`, over the pool and
the :class:`~memserve.mempool.exchange.Exchange` that moves pages between this shard and others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from memserve.actions import Action, CopyDone, Kill, Log, Overslept, Send, Stop
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Tier
from memserve.mempool.answers import Answer, Granting, Replies
from memserve.mempool.audit import check_pool
from memserve.mempool.exchange import HEARD, Exchange
from memserve.mempool.gauges import pool_gauges
from memserve.mempool.grants import Reclaimed
from memserve.mempool.pool import Pool
from memserve.mempool.publishing import Publisher
from memserve.mempool.waiting_calls import WaitingCalls
from memserve.messages import Cluster, Gone, Load, Message
from memserve.pool_messages import (
    Acquire,
    Adopt,
    Adopted,
    Allocated,
    AllocMem,
    Delete,
    DescribePool,
    Evict,
    Freed,
    FreeMem,
    IndexWanted,
    Insert,
    Inserted,
    Match,
    Meet,
    NextArrival,
    PoolDescribed,
    PoolRefused,
    Prefetch,
    Return,
    Source,
    SwapIn,
    SwapOut,
    Transfer,
)
from memserve.tokens import count

RETURN_TRIES = 2
"""How often the pages of an answer are asked for.

If they do not come, they are computed in the next turn of the chat.
"""


@attrs.define
class ShardCore:
    """One shard's calls, over the :class:`Pool` that it owns.

    Verbs: receive, advance, take, deadline, check.
    """

    pool: Pool
    waiting_max: int = 1024
    """Maximum number of calls that wait for pages or copies; one more is refused with QUEUE_FULL."""
    remembered_max: int = 1024
    """Number of answers remembered for each sender.

    A repeat of an older call is refused with UNKNOWN_LEASE.
    """
    schedulers: tuple[ActorId, ...] = ()
    """Schedulers that get the events of the index."""
    page_bytes: int = 0
    arenas: tuple[str, ...] = ()
    """Sockets by which clients map the memory of each tier; empty for one that cannot be mapped."""
    exchange: Exchange = attrs.field(
        default=attrs.Factory(lambda self: Exchange.closed(self.pool), takes_self=True)
    )
    """Moves pages between this shard and others; one that is not given moves none."""
    _waiting: WaitingCalls = attrs.field(init=False)
    _replies: Replies = attrs.field(init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)
    _pids: dict[ActorId, int] = attrs.field(factory=dict, init=False)
    """PIDs of the processes that report here: those that map the arena."""
    _publisher: Publisher = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._publisher = Publisher(self.pool.tree, self.schedulers)
        self._replies = Replies(self.remembered_max)
        self._waiting = WaitingCalls(self.pool, self.exchange, self.waiting_max)

    @property
    def me(self) -> ActorId:
        """The name by which other shards know this one, and by which it learns that it is presumed dead."""
        return self.exchange.me

    # ---- verbs ---------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nothing is due."""
        return min(self.pool.deadline, self._publisher.deadline, self.exchange.deadline)

    def receive(self, sender: ActorId, message: Message | CopyDone | object, now: float) -> None:
        """Take in one message, from others or from this shard's copies and movers.

        A heartbeat counts for the member it names, whichever actor passed it on.
        """
        match message:
            case FreeMem():
                self._free(sender, message, now)
            case CopyDone():
                self._waiting.copied(message, now)
            case Prefetch(scope, tokens, source):
                self._waiting.prefetch(scope, tokens, source, now)
            case Return(scope, tokens, to, deadline_s, request, ahead):
                tries = 1 if ahead else RETURN_TRIES
                source = Source(self.me, count(tokens), deadline_s, request=request, tries=tries, ahead=ahead)
                self._actions.append(Send(to, Prefetch(scope, tokens, source)))
            case Load(member):
                self._pids[member.id] = member.pid
                self.pool.renew(member.id, now)
            case Gone(actors):
                self._free_all_of(actors)
                self.exchange.receive(sender, message, now)
            case Overslept():
                self.pool.leases.excuse(now)
                self.exchange.pushing.excuse(now)
            case IndexWanted():
                self._actions += self._publisher.snapshot(sender)
            case Cluster() | Meet():
                pass  # the shell has handled it
            case _ if isinstance(message, HEARD):
                self.exchange.receive(sender, message, now)
                self._waiting.warmed()
            case _ if type(message) in _CALLS:
                self._call(sender, message, now)
            case _:
                data: dict[str, object] = {"sender": sender, "kind": type(message).__name__}
                self._actions.append(Log("warning", "unexpected message", data))
        self._proceed(now)

    def advance(self, now: float) -> None:
        """Let time pass: for transfers, for index events that are due, and for owners that fell silent.

        Their leases end whether or not a call waits for their pages.
        """
        if now >= self.exchange.deadline:
            self.exchange.advance(now)
            self._proceed(now)
        self._actions += self._publisher.advance(now)
        if now < self.pool.deadline:
            return
        for reclaimed in self.pool.expire(now):
            self._fence(reclaimed.owner)
            self._log_reclaimed("lease expired", reclaimed, self._forget(reclaimed.owner))
        self._proceed(now)

    def take(self) -> list[Action]:
        """Actions to perform, returned once.

        Whoever must be killed is, before another shard hears of its pages; then movers stop that must.
        """
        own, self._actions = self._actions, []
        return sorted([*self.exchange.take(), *own], key=lambda action: not isinstance(action, Kill))

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Handle a message that the shell could not send.

        A fetch from its receiver ends at once. A caller that is gone loses what it was granted by its silence.
        """
        data: dict[str, object] = {"to": to, "kind": type(message).__name__}
        self._actions.append(Log("warning", "message undeliverable", data))
        self.exchange.unreachable(to, message, now)
        self._proceed(now)

    def gauges(self) -> dict[str, float]:
        """The shard's figures for its heartbeat, with units in the names.

        ``_total`` figures only grow, except the sizes of the tiers.
        """
        return {
            **pool_gauges(self.pool),
            "index_published_total": self._publisher.published,
            **self._waiting.gauges(),
            **self.exchange.gauges(),
        }

    def needs(self) -> tuple[ActorId, ...]:
        """Actors that may still write to pages here."""
        return self.exchange.incoming.writers

    def check(self) -> None:
        """Assert every invariant of the shard and of its pool; walks all of it."""
        check_pool(self.pool)
        self._waiting.check()
        for sender, call in self._waiting.queued:
            assert not self._replies.remembers(sender, call), f"call {call} of {sender} is answered and waits"
        self._replies.check()
        self.exchange.check()

    # ---- calls ---------------------------------------------------------------------------------------------

    def _call(self, sender: ActorId, call: Any, now: float) -> None:
        self.pool.renew(sender, now)
        if self._waiting.has(sender, call.call):
            return  # a repeat, not yet answered
        if call.call in self._replies.of(sender):
            again = self._replies.again(sender, call.call, self.pool.owner_of)
            self._actions += [Send(sender, again)] if again is not None else []
            return
        try:
            answer = _CALLS[type(call)](self, sender, call, now)
        except PoolError as refused:
            answer = PoolRefused(call.call, refused.code, refused.message)
        if answer is not None:
            self._reply(sender, answer)

    def _take_in(self, sender: ActorId, call: Acquire | Match, now: float) -> Answer | None:
        return self._waiting.take_in(sender, call, now)

    def _alloc_mem(self, sender: ActorId, call: AllocMem, now: float) -> Answer | None:
        return self._waiting.alloc(sender, call, now)

    def _insert(self, sender: ActorId, call: Insert, now: float) -> Answer:
        if self.exchange.pushing.fills(call.lease):
            raise PoolError(PoolError.MOVING, f"pages of lease {call.lease} are filled by a transfer")
        addresses = [Address(address) for address in call.addresses]
        already = self.pool.insert(sender, call.lease, call.start, call.tokens, addresses)
        return Inserted(call.call, already)

    def _adopt(self, sender: ActorId, call: Adopt, now: float) -> Answer:
        self.pool.adopt(sender, call.lease, call.previous, now)
        self.exchange.pushing.claimed(call.lease)
        return Adopted(call.call)

    def _delete(self, sender: ActorId, call: Delete, now: float) -> Answer:
        return Freed(call.call, self.pool.delete(call.scope, call.tokens))

    def _evict(self, sender: ActorId, call: Evict, now: float) -> Answer:
        return Freed(call.call, self.pool.evict(call.pages, call.tier))

    def _swap_out(self, sender: ActorId, call: SwapOut, now: float) -> Answer | None:
        return self._waiting.copies.swap_out(sender, call)

    def _swap_in(self, sender: ActorId, call: SwapIn, now: float) -> Answer | None:
        return self._waiting.swap_in(sender, call, now)

    def _transfer(self, sender: ActorId, call: Transfer, now: float) -> None:
        self._waiting.check_room()
        self.exchange.push(sender, call, now)

    def _next_arrival(self, sender: ActorId, call: NextArrival, now: float) -> None:
        self._waiting.check_room()
        self.exchange.pushing.wait(sender, call)

    def _describe(self, sender: ActorId, call: DescribePool, now: float) -> Answer:
        pool, home = self.pool, self.pool.home
        pages = tuple(pool.room.total(tier) for tier in Tier)
        sizes = (pool.page_tokens, self.page_bytes, pages, self.arenas, self.me, pool.leases.lease_s)
        return PoolDescribed(call.call, home.shard, home.incarnation, *sizes)

    def _proceed(self, now: float) -> None:
        """After every change: answer what can be answered, keep some pages free, begin the copies needed."""
        self._waiting.go_on(now)
        self._actions += self._waiting.take_logs()
        for sender, answer in self._waiting.take_answers():
            self._reply(sender, answer)
        self.pool.room.balance()
        self._actions += self.pool.take_copies()
        self._publisher.changed(now)

    # ---- giving back ---------------------------------------------------------------------------------------

    def _free(self, sender: ActorId, message: FreeMem, now: float) -> None:
        self.pool.renew(sender, now)
        if not message.lease:
            self._withdraw(sender, message.call)
        elif message.call:
            self._call(sender, message, now)
        else:
            try:
                self._free_mem(sender, message, now)
            except PoolError as refused:
                # A second free, or one that crossed an expiry: harmless, but worth a log line.
                data: dict[str, object] = {"sender": sender, "lease": message.lease, "code": refused.code}
                self._actions.append(Log("warning", "free refused", data))

    def _free_mem(self, sender: ActorId, call: FreeMem, now: float) -> Answer:
        addresses = [Address(address) for address in call.addresses]
        pages = self.pool.free_mem(sender, call.lease, addresses)
        if self.pool.owner_of(call.lease) is None:
            self._waiting.ended(call.lease)
        return Freed(call.call, pages)

    def _withdraw(self, sender: ActorId, number: int) -> None:
        """Withdraw a call that its sender no longer waits for.

        Its answer may have crossed the withdrawal: then the lease that it granted ends here, and the pages
        that it added to a lease come free.
        """
        memory = self._replies.of(sender)
        answer = memory.answer(number)
        if isinstance(answer, Allocated):
            with contextlib.suppress(PoolError):
                self.pool.shrink(sender, answer.lease, answer.pages)
        elif isinstance(answer, Granting) and self.pool.owner_of(answer.lease) == sender:
            self.pool.free_mem(sender, answer.lease)
            self._waiting.ended(answer.lease)
        self._waiting.withdraw(sender, number)
        memory.put(number, None)
        self._actions.append(Send(sender, Freed(number, 0)))

    # ---- senders -------------------------------------------------------------------------------------------

    def _reply(self, sender: ActorId, answer: Answer) -> None:
        self._replies.of(sender).put(answer.call, answer)
        self._actions.append(Send(sender, answer))

    def _forget(self, owner: ActorId) -> int:
        """Drop an owner's calls and the answers it was sent; returns how many calls waited for pages."""
        self._replies.forget(owner)
        return self._waiting.forget(owner)

    def _free_all_of(self, actors: Iterable[ActorId]) -> None:
        """Free what dead actors owned.

        An actor that comes back after all is heard again, but its old leases are unknown.
        """
        if self.me in actors:  # its workers have left, and no scheduler places anything here
            self._actions.append(Stop("fenced off: the cluster presumes this shard dead"))
        for actor in actors:
            self._fence(actor)
            reclaimed = self.pool.drop_owner(actor)
            self._log_reclaimed("owner gone", reclaimed, self._forget(actor))

    def _fence(self, owner: ActorId) -> None:
        """Make sure that an owner never writes to its pages again.

        It may only be paused in the middle of a step. The kill comes before every grant of, and copy into,
        the pages freed here, because actions are performed in order.
        """
        pid = self._pids.pop(owner, None)
        if pid is not None:
            self._actions.append(Kill(owner, pid))

    def _log_reclaimed(self, event: str, reclaimed: Reclaimed, waited: int) -> None:
        if reclaimed.leases or waited:
            freed = {"leases": reclaimed.leases, "pages_freed": reclaimed.pages}
            data: dict[str, object] = {"owner": reclaimed.owner, **freed, "waiting_acquires": waited}
            self._actions.append(Log("warning", event, data))


_CALLS: dict[type[Any], Callable[[ShardCore, ActorId, Any, float], Answer | None]] = {
    Acquire: ShardCore._take_in,
    Match: ShardCore._take_in,
    AllocMem: ShardCore._alloc_mem,
    FreeMem: ShardCore._free_mem,
    Insert: ShardCore._insert,
    Adopt: ShardCore._adopt,
    Delete: ShardCore._delete,
    Evict: ShardCore._evict,
    SwapOut: ShardCore._swap_out,
    SwapIn: ShardCore._swap_in,
    Transfer: ShardCore._transfer,
    NextArrival: ShardCore._next_arrival,
    DescribePool: ShardCore._describe,
}
"""Handler for each kind of call; it returns None if the answer comes later."""
