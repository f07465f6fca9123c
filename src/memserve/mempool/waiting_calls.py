"""The calls of one shard that wait: for pages, for pages to be brought in, or for pages of other shards.

An Acquire or a Match that finds the pool short waits in one bounded queue. The queue is granted strictly in
order, so that small calls cannot overtake a large one forever. A call whose pages must be brought in leaves
the queue with its pages reserved, and is answered when the copy has ended. A granted Acquire that names a
source is answered when the pages have come from there, or can no longer come. The calls behind these do not
wait for that. AllocMem and SwapIn never wait for pages of others, because their callers already hold pages
that others wait for. When pages come free, a lease that was refused pages goes before the queue. Otherwise a
caller that gave way to it would be granted the very pages that it gave up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs

from memserve.actions import CopyDone, Log
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.answers import Answer
from memserve.mempool.copy_waits import CopyWaits, Reply, acquired
from memserve.mempool.exchange import Exchange, Fetch
from memserve.mempool.grants import Grant
from memserve.mempool.pool import Pool
from memserve.mempool.prefetch import Prefetcher
from memserve.mempool.pull_server import EXCHANGER
from memserve.mempool.sequel import sequel_of
from memserve.pool_messages import Acquire, Acquired, AllocMem, Match, Prefetch, Source, SwapIn

MayWait = Acquire | Match
"""Calls that may wait for pages."""

PREFETCHER = ActorId("prefetch.0")
"""Owner of the leases under which pages are brought in ahead of their use."""


@attrs.define
class WaitingCalls:
    """The waiting calls over one pool and its exchange; :meth:`go_on` after every change finds their answers."""

    pool: Pool
    exchange: Exchange
    limit: int
    """Maximum number of calls that wait; one more is refused with QUEUE_FULL."""
    copies: CopyWaits = attrs.field(init=False)
    """The calls that wait only for copies."""
    _queue: dict[tuple[ActorId, int], MayWait] = attrs.field(factory=dict, init=False)
    """Calls that wait for pages by (sender, call), longest waiting first."""
    _loading: dict[int, tuple[ActorId, MayWait | SwapIn | None]] = attrs.field(factory=dict, init=False)
    """Senders and calls whose pages are being brought in, by lease; the call is None if nobody waits for it."""
    _ahead: Prefetcher = attrs.field(factory=Prefetcher, init=False)
    _own_calls: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    """Numbers of EXCHANGER's calls: several may wait at a time."""
    _answers: list[Reply] = attrs.field(factory=list, init=False)
    _logs: list[Log] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.copies = CopyWaits(self.pool)

    def __len__(self) -> int:
        """Number of calls that are not answered yet."""
        exchange = self.exchange
        moving = len(exchange) + len(exchange.pushing) + len(self._ahead) - len(exchange.serving.warming)
        return len(self._queue) + len(self._loading) + len(self.copies) + moving

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call is under way."""
        return (
            (sender, call) in self._queue
            or any(who == sender and held and held.call == call for who, held in self._loading.values())
            or self.copies.has(sender, call)
            or self.exchange.fetch_of(sender, call) is not None
            or self.exchange.pushing.has(sender, call)
            or self._ahead.has(sender, call)
        )

    @property
    def queued(self) -> tuple[tuple[ActorId, int], ...]:
        """The calls that wait for pages, by (sender, call)."""
        return tuple(self._queue)

    def take_answers(self) -> list[Reply]:
        """Answers to calls that have waited, returned once."""
        answers, self._answers = self._answers, []
        return answers

    def take_logs(self) -> list[Log]:
        """What is to be logged, returned once."""
        logs, self._logs = self._logs, []
        return logs

    def gauges(self) -> dict[str, float]:
        """Figures for the heartbeat."""
        return {"waiting_acquires": len(self._queue), "loading_acquires": len(self._loading)}

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self) <= self.limit, f"{len(self)} calls wait, {self.limit} may"
        assert self._loading.keys() == self.pool.loading.keys(), "leases that load are filed wrongly"
        self.copies.check()
        waiting = [call for (who, _), call in self._queue.items() if who == EXCHANGER]
        loading = [call for who, call in self._loading.values() if who == EXCHANGER]
        own = [*waiting, *loading, *self.exchange.calls_of(EXCHANGER)]
        sources = [call.source for call in own if isinstance(call, Acquire) and call.source]
        self._ahead.check({source.request for source in sources if source.ahead})

    # ---- beginning -----------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raise PoolError (QUEUE_FULL) if as many calls wait as may.

        Calls whose pages are being brought in count, because they return to the queue if the bytes are lost.
        """
        if (waiting := len(self)) >= self.limit:
            raise PoolError(PoolError.QUEUE_FULL, f"{waiting} calls wait for pages already")

    def take_in(self, sender: ActorId, call: MayWait, now: float) -> Answer | None:
        """Grant a call, unless it would overtake another; otherwise queue it: the answer comes later.

        Raises PoolError (TOO_LARGE, NOT_WHOLE_PAGES, BAD_COUNT, QUEUE_FULL).
        """
        # What is refused in any case must not enter the queue: there, nothing would catch the error.
        if isinstance(call, Acquire):
            self.pool.demands.pages(call.tokens, call.extra_pages)
        else:
            self.pool.demands.check_tokens(call.tokens)
        if len(self) < self.limit:
            if isinstance(call, Acquire) and self._ahead.hold(sender, call):
                return None
            if not self._queue and (grant := self._try(sender, call, now)) is not None:
                return self._granted(sender, call, grant, now)
        self.check_room()
        self._queue[sender, call.call] = call
        return None

    def swap_in(self, sender: ActorId, call: SwapIn, now: float) -> Answer | None:
        """Begin to bring a lease's pages in. Raises PoolError (QUEUE_FULL, and those of Pool.swap_in)."""
        self.check_room()
        return self._granted(sender, call, self.pool.swap_in(sender, call.lease, now), now)

    def alloc(self, sender: ActorId, call: AllocMem, now: float) -> Answer | None:
        """Grant pages, or begin to make room for them. Raises PoolError like CopyWaits.alloc."""
        return self.copies.alloc(sender, call, now, may_wait=len(self) < self.limit)

    def prefetch(self, scope: str, tokens: bytes, source: Source | None, now: float) -> None:
        """Bring a prefix in, or fetch it from ``source``, if there is room."""
        if source is not None:
            self._fetch(scope, tokens, source, now)
        elif len(self) < self.limit:
            grant = self.pool.prefetch(PREFETCHER, scope, tokens, now)
            if grant is not None:
                self._loading[grant.lease] = (PREFETCHER, None)

    def warmed(self) -> None:
        """Note the leases whose pages are brought in for other shards."""
        for lease in self.exchange.serving.warming:
            self._loading.setdefault(lease, (EXCHANGER, None))

    def _fetch(self, scope: str, tokens: bytes, source: Source, now: float) -> None:
        """Fetch a prefix that no call waits for."""
        if len(tokens) % self.pool.tree.page_bytes:
            return
        if source.ahead and not self._ahead.announced(Prefetch(scope, tokens, source)):
            return
        grant = self.exchange.bring(scope, tokens) if len(self) < self.limit else None
        if grant is None:
            self._not_brought(source, now)
            return
        call = Acquire(next(self._own_calls), scope, tokens, 0, source)
        if (answer := self._granted(EXCHANGER, call, grant, now)) is not None:
            self._answer(EXCHANGER, answer)

    def _try(self, sender: ActorId, call: MayWait, now: float) -> Grant | None:
        if self.pool.leases.any_starved(now):
            return None
        match call:
            case Acquire(_, scope, tokens, extra_pages, _, swap_least, uncached, _):
                return self.pool.acquire(sender, scope, tokens, extra_pages, now, swap_least, uncached)
            case Match(_, scope, tokens):
                return self.pool.match(sender, scope, tokens, now)

    def _granted(self, sender: ActorId, call: MayWait | SwapIn, grant: Grant, now: float) -> Answer | None:
        """The answer to a call that has its pages; None while they are brought in or fetched."""
        if not grant.ready:
            self._loading[grant.lease] = (sender, call)
            return None
        if not isinstance(call, Acquire):
            return acquired(call.call, grant)
        if self.exchange.begin(sender, call, grant, now):
            return None
        answer = acquired(call.call, grant, self._sequel(call))
        if call.source is None:
            return answer
        if call.source.ahead:  # nothing is missing here
            self._ended_ahead(call.source, 0, now)
        found, moved = self._ahead.counted(call, grant, self.exchange.geometry.page_bytes)
        return attrs.evolve(answer, found_pages=found, fetched_bytes=moved)

    def _sequel(self, call: Acquire) -> bytes:
        wanted = call.sequel_tokens
        return sequel_of(self.pool.tree, call.scope, call.tokens, wanted) if wanted else b""

    def _answer(self, sender: ActorId, answer: Answer) -> None:
        """Answer a call; if this shard itself has called, end the lease that it was granted."""
        if sender == EXCHANGER and isinstance(answer, Acquired):
            self.pool.free_mem(sender, answer.lease)
        else:
            self._answers.append((sender, answer))

    # ---- going on ------------------------------------------------------------------------------------------

    def go_on(self, now: float) -> None:
        """After every change: answer what can be answered, with or without pages of other shards."""
        self._answers += self.copies.grown(now)
        self._grant_queued(now)
        self._answers += self.exchange.pushing.take_answers()
        while ended := self.exchange.take_ended():
            for fetch in ended:
                self._end_fetch(fetch)
                if fetch.sender == EXCHANGER:
                    self._returned(fetch, now)
            self._grant_queued(now)

    def _grant_queued(self, now: float) -> None:
        """Grant the head of the queue as often as the pool can."""
        while self._queue:
            (sender, number), call = next(iter(self._queue.items()))
            grant = self._try(sender, call, now)
            if grant is None:
                return
            del self._queue[sender, number]
            if (answer := self._granted(sender, call, grant, now)) is not None:
                self._answer(sender, answer)

    def copied(self, done: CopyDone, now: float) -> None:
        """Handle the end of a copy between tiers."""
        swaps = self.pool.room.swaps
        bad, moved = swaps.bad_pages, swaps.out_pages
        again = [self._lost(lease) for lease in self.pool.copied(done)]
        if swaps.bad_pages > bad:
            self._logs.append(Log("warning", "damaged pages dropped", {"pages": swaps.bad_pages - bad}))
        for sender, call in reversed(again):  # their bytes are lost: back to the head of the queue
            if isinstance(call, Acquire | Match):
                self._queue = {(sender, call.call): call, **self._queue}
        for grant in self.pool.settle():
            self._loaded(grant, now)
        self._answers += self.copies.copied(done.id, swaps.out_pages - moved)

    def _lost(self, lease: int) -> tuple[ActorId, MayWait | SwapIn | None]:
        if lease in self.exchange.serving.warming:
            self.exchange.serving.warming_failed(lease)
        return self._loading.pop(lease)

    def _loaded(self, grant: Grant, now: float) -> None:
        sender, call = self._loading.pop(grant.lease)
        if grant.lease in self.exchange.serving.warming:
            self.exchange.warm(grant, now)
        elif call is None:
            self.pool.free_mem(sender, grant.lease)
        elif (answer := self._granted(sender, call, grant, now)) is not None:
            self._answer(sender, answer)

    # ---- fetches -------------------------------------------------------------------------------------------

    def _end_fetch(self, fetch: Fetch) -> None:
        sender, call, number = fetch.sender, fetch.call, fetch.grant.lease
        lease = self.pool.leases.find(number)
        if lease is None or lease.owner != sender:
            return  # its owner has ended it in the meantime
        if not lease.lent:
            retired = lease.retired_tokens
            more = max(0, fetch.filled_tokens - retired)
            found, early = self._ahead.counted(call, fetch.grant, self.exchange.geometry.page_bytes)
            moved, table = fetch.nbytes + early, fetch.grant.pages
            sequel = self._sequel(call)
            self._answer(sender, Acquired(call.call, number, table, retired, more, moved, found, sequel))
            return
        self.pool.free_mem(sender, number)  # a slow sender still writes to these pages: grant others
        if sender != EXCHANGER:
            self._queue = {(sender, call.call): attrs.evolve(call, source=None), **self._queue}

    def _returned(self, fetch: Fetch, now: float) -> None:
        """Record that a prefix that no call waits for has come, or try once more to fetch it."""
        source = fetch.source
        if source.ahead:
            self.exchange.handed_over_bytes += fetch.nbytes
            self._ended_ahead(source, fetch.nbytes, now)
        elif not fetch.failed:
            self.exchange.returned_bytes += fetch.nbytes
            data: dict[str, object] = {"source": source.shard, "moved_bytes": fetch.nbytes}
            self._logs.append(Log("info", "answer returned", {"request": source.request, **data}))
        elif source.tries > 1:
            again = attrs.evolve(source, tries=source.tries - 1)
            self._fetch(fetch.call.scope, fetch.call.tokens, again, now)
        else:
            self.exchange.failed_returns += 1

    def _not_brought(self, source: Source, now: float) -> None:
        """Give up a prefix that no call waits for, because there is no room for it."""
        if source.ahead:
            self._ended_ahead(source, 0, now)
        else:
            self.exchange.failed_returns += 1

    def _ended_ahead(self, source: Source, nbytes: int, now: float) -> None:
        """Let the handoffs go on that waited for a fetch, and fetch what was announced meanwhile."""
        more, free = self._ahead.ended(source.request, nbytes // self.exchange.geometry.page_bytes)
        self._queue = {**free, **self._queue}
        if more is not None and more.source is not None:
            self._fetch(more.scope, more.tokens, more.source, now)

    # ---- giving up -----------------------------------------------------------------------------------------

    def ended(self, lease: int) -> None:
        """A lease has ended: nobody waits any more for what is brought in for it."""
        self._loading.pop(lease, None)

    def withdraw(self, sender: ActorId, call: int) -> None:
        """Drop a call that its sender no longer waits for, with the lease that it was to get."""
        fetch = self.exchange.fetch_of(sender, call)
        leases = [
            lease
            for lease, (who, held) in self._loading.items()
            if who == sender and held is not None and held.call == call
        ]
        for lease in (*leases, *([fetch.grant.lease] if fetch else [])):
            if self.pool.owner_of(lease) == sender:
                self.pool.free_mem(sender, lease)
            self.ended(lease)
        self._queue.pop((sender, call), None)
        self.copies.withdraw(sender, call)
        self.exchange.forget(sender, call)
        self._ahead.forget(sender, call)

    def forget(self, owner: ActorId) -> int:
        """Drop the calls of an owner that is gone; returns how many waited for pages."""
        queued = [key for key in self._queue if key[0] == owner]
        for key in queued:
            del self._queue[key]
        self._loading = {lease: held for lease, held in self._loading.items() if held[0] != owner}
        self.copies.forget(owner)
        self.exchange.forget(owner)
        self._ahead.forget(owner)
        return len(queued)
