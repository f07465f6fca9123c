"""The MemPoolShard's core: pool calls in, answers out, and the clock that ends leases of silent owners.

A call is identified by ``(sender, call)`` and acted on once. A repeat gets the same answer again (as long as
a granted lease lives) and never a second grant, which no caller would know to free.

An Acquire or a Match that finds the pool short waits in one bounded queue. The queue is granted strictly in
order, so that small calls cannot overtake a large one forever. A call whose pages must be brought in leaves
the queue with its pages reserved, and is answered when the copy has ended; the calls behind it do not wait
for that. AllocMem and SwapIn never wait for pages of others, because their callers already hold pages that
others wait for. When pages come free, a lease that was refused pages goes before the queue. Otherwise a
caller that gave way to it would be granted the very pages that it gave up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import attrs

from memserve.actions import Action, CopyDone, Kill, Log, Overslept, Send, Stop
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Tier
from memserve.mempool.answers import Answer, Granting, Replies
from memserve.mempool.audit import check_pool
from memserve.mempool.copy_waits import CopyWaits, acquired
from memserve.mempool.gauges import pool_gauges
from memserve.mempool.grants import Grant, Reclaimed
from memserve.mempool.pool import Pool
from memserve.mempool.publishing import Publisher
from memserve.mempool.sequel import sequel_of
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
    PoolDescribed,
    PoolRefused,
    Prefetch,
    Source,
    SwapIn,
    SwapOut,
)

Waiting = Acquire | Match
"""Calls that may wait for pages."""

PREFETCHER = ActorId("prefetch.0")
"""Owner of the leases under which pages are brought in ahead of their use."""


@attrs.define
class ShardCore:
    """One shard's calls, over the :class:`Pool` that it owns.

    Verbs: receive, advance, take, deadline, check.
    """

    calls: ClassVar[Mapping[type[Any], Callable[..., Answer | None]]]
    """Handler for each kind of call; it returns None if the answer comes later."""
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
    me: ActorId | None = None  # to notice when it is itself presumed dead
    _waiting: dict[tuple[ActorId, int], Waiting] = attrs.field(factory=dict, init=False)
    """Waiting calls by (sender, call), longest waiting first."""
    _loading: dict[int, tuple[ActorId, Waiting | SwapIn | None]] = attrs.field(factory=dict, init=False)
    """Senders and calls whose pages are being brought in, by lease; the call is None for a Prefetch."""
    _copy_waits: CopyWaits = attrs.field(init=False)
    _replies: Replies = attrs.field(init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)
    _pids: dict[ActorId, int] = attrs.field(factory=dict, init=False)
    """PIDs of the processes that report here: those that map the arena."""
    _publisher: Publisher = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._publisher = Publisher(self.pool.tree, self.schedulers)
        self._replies = Replies(self.remembered_max)
        self._copy_waits = CopyWaits(self.pool)

    # ---- verbs ---------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nothing is due."""
        return min(self.pool.deadline, self._publisher.deadline)

    def receive(self, sender: ActorId, message: Message | CopyDone | object, now: float) -> None:
        """Take in one message. A heartbeat counts for the member it names, whichever actor passed it on."""
        match message:
            case FreeMem():
                self._free(sender, message, now)
            case CopyDone():
                self._copied(message, now)
            case Prefetch(scope, tokens, source):
                self._prefetch(scope, tokens, source, now)
            case Load(member):
                self._pids[member.id] = member.pid
                self.pool.renew(member.id, now)
            case Gone(actors):
                self._bury(actors)
            case Overslept():
                self.pool.leases.excuse(now)
            case IndexWanted():
                self._actions += self._publisher.snapshot(sender)
            case Cluster() | Meet():
                pass  # the shell has handled it
            case _ if type(message) in self.calls:
                self._call(sender, message, now)
            case _:
                data: dict[str, object] = {"sender": sender, "kind": type(message).__name__}
                self._actions.append(Log("warning", "unexpected message", data))
        self._proceed(now)

    def advance(self, now: float) -> None:
        """Publish index events that are due, and end the leases of owners that fell silent.

        The leases end whether or not a call waits for their pages.
        """
        self._actions += self._publisher.advance(now)
        if now < self.pool.deadline:
            return
        for reclaimed in self.pool.expire(now):
            self._fence(reclaimed.owner)
            self._log_reclaimed("lease expired", reclaimed, self._forget(reclaimed.owner))
        self._proceed(now)

    def take(self) -> list[Action]:
        """Actions to perform, returned once."""
        actions, self._actions = self._actions, []
        return actions

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Log an answer that the shell could not send.

        Its caller is gone, and what it was granted ends with its silence.
        """
        data: dict[str, object] = {"to": to, "kind": type(message).__name__}
        self._actions.append(Log("warning", "message undeliverable", data))

    def gauges(self) -> dict[str, float]:
        """The shard's figures for its heartbeat, with units in the names.

        ``_total`` figures only grow, except the sizes of the tiers.
        """
        return {
            **pool_gauges(self.pool),
            "index_published_total": self._publisher.published,
            "waiting_acquires": len(self._waiting),
            "loading_acquires": len(self._loading),
        }

    def check(self) -> None:
        """Assert every invariant of the shard and of its pool; walks all of it."""
        check_pool(self.pool)
        waiting = self._unanswered
        assert waiting <= self.waiting_max, f"{waiting} calls wait, {self.waiting_max} may"
        for sender, call in self._waiting:
            assert not self._replies.remembers(sender, call), f"call {call} of {sender} is answered and waits"
        assert self._loading.keys() == self.pool.loading.keys(), "leases that load are filed wrongly"
        self._copy_waits.check()
        self._replies.check()

    # ---- calls ---------------------------------------------------------------------------------------------

    def _call(self, sender: ActorId, call: Any, now: float) -> None:
        self.pool.renew(sender, now)
        if self._is_under_way(sender, call.call):
            return  # a repeat, not yet answered
        if call.call in self._replies.of(sender):
            again = self._replies.again(sender, call.call, self.pool.owner_of)
            self._actions += [Send(sender, again)] if again is not None else []
            return
        try:
            answer = self.calls[type(call)](self, sender, call, now)
        except PoolError as refused:
            answer = PoolRefused(call.call, refused.code, refused.message)
        if answer is not None:
            self._reply(sender, answer)

    def _is_under_way(self, sender: ActorId, call: int) -> bool:
        return (
            (sender, call) in self._waiting
            or any(who == sender and held and held.call == call for who, held in self._loading.values())
            or self._copy_waits.has(sender, call)
        )

    @property
    def _unanswered(self) -> int:
        """Number of calls that wait for pages or for copies."""
        return len(self._waiting) + len(self._loading) + len(self._copy_waits)

    def _alloc_mem(self, sender: ActorId, call: AllocMem, now: float) -> Answer | None:
        return self._copy_waits.alloc(sender, call, now, may_wait=self._unanswered < self.waiting_max)

    def _insert(self, sender: ActorId, call: Insert, now: float) -> Answer:
        addresses = [Address(address) for address in call.addresses]
        already = self.pool.insert(sender, call.lease, call.start, call.tokens, addresses)
        return Inserted(call.call, already)

    def _adopt(self, sender: ActorId, call: Adopt, now: float) -> Answer:
        self.pool.adopt(sender, call.lease, call.previous, now)
        return Adopted(call.call, call.lease)

    def _delete(self, sender: ActorId, call: Delete, now: float) -> Answer:
        return Freed(call.call, self.pool.delete(call.scope, call.tokens))

    def _evict(self, sender: ActorId, call: Evict, now: float) -> Answer:
        return Freed(call.call, self.pool.evict(call.pages, call.tier))

    def _swap_out(self, sender: ActorId, call: SwapOut, now: float) -> Answer | None:
        return self._copy_waits.swap_out(sender, call)

    def _describe(self, sender: ActorId, call: DescribePool, now: float) -> Answer:
        pool, home = self.pool, self.pool.home
        pages = tuple(pool.room.total(tier) for tier in Tier)
        me, lease_s = self.me or ActorId(""), pool.leases.lease_s
        sizes = (pool.page_tokens, self.page_bytes, pages, self.arenas, me, lease_s)
        return PoolDescribed(call.call, home.shard, home.incarnation, *sizes)

    def _wait(self, sender: ActorId, call: Waiting, now: float) -> Answer | None:
        """Grant a call that may wait, unless it would overtake another; otherwise queue it."""
        # What is refused in any case must not enter the queue: there, nothing would catch the error.
        if isinstance(call, Acquire):
            self.pool.demands.pages(call.tokens, call.extra_pages)
        else:
            self.pool.demands.check_tokens(call.tokens)
        if not self._waiting and self._unanswered < self.waiting_max:
            grant = self._try(sender, call, now)
            if grant is not None:
                return self._granted(sender, call, grant, now)
        self._check_queue()
        self._waiting[sender, call.call] = call
        return None

    def _check_queue(self) -> None:
        """Raise PoolError (QUEUE_FULL) if as many calls wait as may.

        Calls whose pages are being brought in count, because they return to the queue if the bytes are lost.
        """
        if (waiting := self._unanswered) >= self.waiting_max:
            raise PoolError(PoolError.QUEUE_FULL, f"{waiting} calls wait for pages already")

    def _try(self, sender: ActorId, call: Waiting, now: float) -> Grant | None:
        if self.pool.leases.any_starved(now):
            return None
        match call:
            case Acquire(_, scope, tokens, extra_pages, _, swap_least, uncached, _):
                return self.pool.acquire(sender, scope, tokens, extra_pages, now, swap_least, uncached)
            case Match(_, scope, tokens):
                return self.pool.match(sender, scope, tokens, now)

    def _swap_in(self, sender: ActorId, call: SwapIn, now: float) -> Answer | None:
        self._check_queue()
        return self._granted(sender, call, self.pool.swap_in(sender, call.lease, now), now)

    def _granted(self, sender: ActorId, call: Waiting | SwapIn, grant: Grant, now: float) -> Answer | None:
        if not grant.ready:
            self._loading[grant.lease] = (sender, call)
            return None
        return acquired(call.call, grant, self._sequel(call))

    def _sequel(self, call: Waiting | SwapIn) -> bytes:
        if not isinstance(call, Acquire) or not call.sequel_tokens:
            return b""
        return sequel_of(self.pool.tree, call.scope, call.tokens, call.sequel_tokens)

    # ---- going on ------------------------------------------------------------------------------------------

    def _proceed(self, now: float) -> None:
        """After every change: grant what can be granted, keep some pages free, begin the copies needed."""
        self._reply_all(self._copy_waits.grown(now))
        self._grant_waiting(now)
        self.pool.room.balance()
        self._actions += self.pool.take_copies()
        self._publisher.changed(now)

    def _grant_waiting(self, now: float) -> None:
        """Grant the head of the queue as often as the pool can."""
        while self._waiting:
            (sender, number), call = next(iter(self._waiting.items()))
            grant = self._try(sender, call, now)
            if grant is None:
                return
            del self._waiting[sender, number]
            if (answer := self._granted(sender, call, grant, now)) is not None:
                self._reply(sender, answer)

    def _copied(self, done: CopyDone, now: float) -> None:
        swaps = self.pool.room.swaps
        bad, moved = swaps.bad_pages, swaps.out_pages
        again = [self._lost(lease) for lease in self.pool.copied(done)]
        if swaps.bad_pages > bad:
            self._actions.append(Log("warning", "damaged pages dropped", {"pages": swaps.bad_pages - bad}))
        for sender, call in reversed(again):  # their bytes are lost: back to the head of the queue
            if isinstance(call, Acquire | Match):
                self._waiting = {(sender, call.call): call, **self._waiting}
        for grant in self.pool.settle():
            self._loaded(grant, now)
        self._reply_all(self._copy_waits.copied(done.id, swaps.out_pages - moved))

    def _lost(self, lease: int) -> tuple[ActorId, Waiting | SwapIn | None]:
        return self._loading.pop(lease)

    def _loaded(self, grant: Grant, now: float) -> None:
        sender, call = self._loading.pop(grant.lease)
        if call is None:
            self.pool.free_mem(sender, grant.lease)
        elif (answer := self._granted(sender, call, grant, now)) is not None:
            self._reply(sender, answer)

    def _prefetch(self, scope: str, tokens: bytes, source: Source | None, now: float) -> None:
        full = self._unanswered >= self.waiting_max
        grant = None if full else self.pool.prefetch(PREFETCHER, scope, tokens, now)
        if grant is not None:
            self._loading[grant.lease] = (PREFETCHER, None)

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
            self._loading.pop(call.lease, None)
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
        lease = answer.lease if isinstance(answer, Granting) else 0
        for loading, (who, held) in self._loading.items():
            if who == sender and held is not None and held.call == number:
                lease = loading
        if lease and self.pool.owner_of(lease) == sender:
            self.pool.free_mem(sender, lease)
        self._loading.pop(lease, None)
        self._waiting.pop((sender, number), None)
        self._copy_waits.withdraw(sender, number)
        memory.put(number, None)
        self._actions.append(Send(sender, Freed(number, 0)))

    # ---- senders -------------------------------------------------------------------------------------------

    def _reply(self, sender: ActorId, answer: Answer) -> None:
        self._replies.of(sender).put(answer.call, answer)
        self._actions.append(Send(sender, answer))

    def _reply_all(self, answers: Iterable[tuple[ActorId, Answer]]) -> None:
        for sender, answer in answers:
            self._reply(sender, answer)

    def _forget(self, owner: ActorId) -> int:
        """Drop an owner's calls and the answers it was sent; returns how many calls waited for pages."""
        self._replies.forget(owner)
        waiting = [key for key in self._waiting if key[0] == owner]
        for key in waiting:
            del self._waiting[key]
        self._loading = {lease: held for lease, held in self._loading.items() if held[0] != owner}
        self._copy_waits.forget(owner)
        return len(waiting)

    def _bury(self, actors: Iterable[ActorId]) -> None:
        """Free what dead actors owned.

        An actor that comes back after all is heard again, but its old leases are unknown.
        """
        if self.me and self.me in actors:  # its workers have left, and no scheduler places anything here
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


ShardCore.calls = {
    Acquire: ShardCore._wait,
    Match: ShardCore._wait,
    AllocMem: ShardCore._alloc_mem,
    FreeMem: ShardCore._free_mem,
    Insert: ShardCore._insert,
    Adopt: ShardCore._adopt,
    Delete: ShardCore._delete,
    Evict: ShardCore._evict,
    SwapOut: ShardCore._swap_out,
    SwapIn: ShardCore._swap_in,
    DescribePool: ShardCore._describe,
}
