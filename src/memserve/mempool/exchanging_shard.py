"""A shard that fetches pages from other shards and sends them its own.

It is a :class:`ShardCore` with an :class:`Exchange`. The two meet in a granted Acquire that names a source:
it is answered when the pages have come, or can no longer come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs

from memserve.actions import Action, CopyDone, Kill, Log, Overslept, Send
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.answers import Answer
from memserve.mempool.exchange import HEARD, Exchange, Fetch
from memserve.mempool.grants import Grant
from memserve.mempool.prefetch import Prefetcher
from memserve.mempool.pull_server import EXCHANGER
from memserve.mempool.shard import ShardCore, Waiting
from memserve.messages import Gone, Message
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    Insert,
    NextArrival,
    Prefetch,
    Return,
    Source,
    SwapIn,
    Transfer,
)
from memserve.tokens import count

RETURN_TRIES = 2
"""How often the pages of an answer are asked for.

If they do not come, they are computed in the next turn of the chat.
"""


@attrs.define
class ExchangingShard(ShardCore):
    """A shard core with an exchange; see the module's text. Its verbs are those of ShardCore."""

    exchange: Exchange = attrs.field(kw_only=True)
    _ahead: Prefetcher = attrs.field(factory=Prefetcher, init=False)
    _own_calls: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)
    """Numbers of EXCHANGER's calls: several may wait at a time."""

    # ---- verbs ---------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next."""
        return min(super().deadline, self.exchange.deadline)

    def receive(self, sender: ActorId, message: Message | CopyDone | object, now: float) -> None:
        """Take in one message, from others or from this shard's movers."""
        match message:
            case Return(scope, tokens, to, deadline_s, request, ahead):
                tries, here = 1 if ahead else RETURN_TRIES, self.exchange.me
                source = Source(here, count(tokens), deadline_s, request=request, tries=tries, ahead=ahead)
                self._actions.append(Send(to, Prefetch(scope, tokens, source)))
            case _ if isinstance(message, HEARD):
                self.exchange.receive(sender, message, now)
                for lease in self.exchange.serving.warming:
                    self._loading.setdefault(lease, (EXCHANGER, None))
                self._proceed(now)
            case _:
                super().receive(sender, message, now)
                if isinstance(message, Gone):
                    self.exchange.receive(sender, message, now)
                    self._proceed(now)
                elif isinstance(message, Overslept):
                    self.exchange.pushing.excuse(now)

    def advance(self, now: float) -> None:
        """Let time pass, for leases and for fetches."""
        if now >= self.exchange.deadline:
            self.exchange.advance(now)
            self._proceed(now)
        super().advance(now)

    def take(self) -> list[Action]:
        """Actions to perform, returned once.

        Whoever must be killed is, before another shard hears of its pages; then movers stop that must.
        """
        actions = [*self.exchange.take(), *super().take()]
        return sorted(actions, key=lambda action: not isinstance(action, Kill))

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Handle a message that the shell could not send: a fetch from its receiver ends at once."""
        super().undeliverable(to, message, now)
        self.exchange.unreachable(to, message, now)
        self._proceed(now)

    def gauges(self) -> dict[str, float]:
        """The shard's figures, with those of its transfers."""
        return {**super().gauges(), **self.exchange.gauges()}

    def needs(self) -> tuple[ActorId, ...]:
        """Actors that may still write to pages here."""
        return self.exchange.incoming.writers

    def check(self) -> None:
        """Assert every invariant."""
        super().check()
        self.exchange.check()
        waiting = [call for (who, _), call in self._waiting.items() if who == EXCHANGER]
        loading = [call for who, call in self._loading.values() if who == EXCHANGER]
        own = [*waiting, *loading, *self.exchange.calls_of(EXCHANGER)]
        sources = [call.source for call in own if isinstance(call, Acquire) and call.source]
        self._ahead.check({source.request for source in sources if source.ahead})

    # ---- calls ---------------------------------------------------------------------------------------------

    def _is_under_way(self, sender: ActorId, call: int) -> bool:
        exchange = self.exchange
        known = exchange.fetch_of(sender, call) is not None or exchange.pushing.has(sender, call)
        return known or self._ahead.has(sender, call) or super()._is_under_way(sender, call)

    @property
    def _unanswered(self) -> int:
        moving = len(self.exchange) + len(self.exchange.pushing) + len(self._ahead)
        return super()._unanswered + moving - len(self.exchange.serving.warming)

    def _wait(self, sender: ActorId, call: Waiting, now: float) -> Answer | None:
        if isinstance(call, Acquire) and self._unanswered < self.waiting_max:
            self.pool.demands.pages(call.tokens, call.extra_pages)
            if self._ahead.hold(sender, call):
                return None
        return super()._wait(sender, call, now)

    def _transfer(self, sender: ActorId, call: Transfer, now: float) -> None:
        self._check_queue()
        self.exchange.push(sender, call, now)

    def _next_arrival(self, sender: ActorId, call: NextArrival, now: float) -> None:
        self._check_queue()
        self.exchange.pushing.wait(sender, call)

    def _insert(self, sender: ActorId, call: Insert, now: float) -> Answer:
        if self.exchange.pushing.fills(call.lease):
            raise PoolError(PoolError.MOVING, f"pages of lease {call.lease} are filled by a transfer")
        return super()._insert(sender, call, now)

    def _adopt(self, sender: ActorId, call: Adopt, now: float) -> Answer:
        answer = super()._adopt(sender, call, now)
        self.exchange.pushing.claimed(call.lease)
        return answer

    def _granted(self, sender: ActorId, call: Waiting | SwapIn, grant: Grant, now: float) -> Answer | None:
        if grant.ready and isinstance(call, Acquire) and self.exchange.begin(sender, call, grant, now):
            return None
        answer = super()._granted(sender, call, grant, now)
        if isinstance(answer, Acquired) and isinstance(call, Acquire) and call.source is not None:
            if call.source.ahead:  # nothing is missing here
                self._prefetch_ended(call.source, 0, now)
            found, moved = self._ahead.counted(call, grant, self.exchange.geometry.page_bytes)
            return attrs.evolve(answer, found_pages=found, fetched_bytes=moved)
        return answer

    def _reply(self, sender: ActorId, answer: Answer) -> None:
        """Answer a call; if this shard itself has called, end the lease that it was granted."""
        if sender == EXCHANGER and isinstance(answer, Acquired):
            self.pool.free_mem(sender, answer.lease)
        else:
            super()._reply(sender, answer)

    def _prefetch(self, scope: str, tokens: bytes, source: Source | None, now: float) -> None:
        if source is None:
            super()._prefetch(scope, tokens, source, now)
        elif len(tokens) % self.pool.tree.page_bytes == 0:
            if source.ahead and not self._ahead.announced(Prefetch(scope, tokens, source)):
                return
            room = self._unanswered < self.waiting_max
            grant = self.exchange.bring(scope, tokens) if room else None
            call = Acquire(next(self._own_calls), scope, tokens, 0, source)
            if grant is None:
                self._not_brought(source, now)
            elif (answer := self._granted(EXCHANGER, call, grant, now)) is not None:
                self._reply(EXCHANGER, answer)

    def _withdraw(self, sender: ActorId, number: int) -> None:
        fetch = self.exchange.fetch_of(sender, number)
        if fetch is not None:
            self.pool.free_mem(sender, fetch.grant.lease)
        self.exchange.forget(sender, number)
        self._ahead.forget(sender, number)
        super()._withdraw(sender, number)

    def _forget(self, owner: ActorId) -> int:
        self.exchange.forget(owner)
        self._ahead.forget(owner)
        return super()._forget(owner)

    # ---- going on ------------------------------------------------------------------------------------------

    def _grant_waiting(self, now: float) -> None:
        """Answer calls whose fetch has ended, with or without the pages; then grant what can be granted."""
        super()._grant_waiting(now)
        self._reply_all(self.exchange.pushing.take_answers())
        while ended := self.exchange.take_ended():
            for fetch in ended:
                self._end_fetch(fetch)
                if fetch.sender == EXCHANGER:
                    self._returned(fetch, now)
            super()._grant_waiting(now)

    def _returned(self, fetch: Fetch, now: float) -> None:
        """Record that a prefix that no call waits for has come, or try once more to fetch it."""
        source = fetch.source
        if source.ahead:
            self.exchange.handed_over_bytes += fetch.nbytes
            self._prefetch_ended(source, fetch.nbytes, now)
        elif not fetch.failed:
            self.exchange.returned_bytes += fetch.nbytes
            data: dict[str, object] = {"source": source.shard, "moved_bytes": fetch.nbytes}
            self._actions.append(Log("info", "answer returned", {"request": source.request, **data}))
        elif source.tries > 1:
            again = attrs.evolve(source, tries=source.tries - 1)
            self._prefetch(fetch.call.scope, fetch.call.tokens, again, now)
        else:
            self.exchange.failed_returns += 1

    def _not_brought(self, source: Source, now: float) -> None:
        """Give up a prefix that no call waits for, because there is no room for it."""
        if source.ahead:
            self._prefetch_ended(source, 0, now)
        else:
            self.exchange.failed_returns += 1

    def _prefetch_ended(self, source: Source, nbytes: int, now: float) -> None:
        more, free = self._ahead.ended(source.request, nbytes // self.exchange.geometry.page_bytes)
        self._waiting = {**free, **self._waiting}
        if more is not None:
            self._prefetch(more.scope, more.tokens, more.source, now)

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
            self._reply(sender, Acquired(call.call, number, table, retired, more, moved, found, sequel))
            return
        self.pool.free_mem(sender, number)  # a slow sender still writes to these pages: grant others
        if sender != EXCHANGER:
            self._waiting = {(sender, call.call): attrs.evolve(call, source=None), **self._waiting}

    def _lost(self, lease: int) -> tuple[ActorId, Waiting | SwapIn | None]:
        if lease in self.exchange.serving.warming:
            self.exchange.serving.warming_failed(lease)
        return super()._lost(lease)

    def _loaded(self, grant: Grant, now: float) -> None:
        if grant.lease in self.exchange.serving.warming:
            del self._loading[grant.lease]
            self.exchange.warm(grant, now)
        else:
            super()._loaded(grant, now)


ExchangingShard.calls = {
    **ShardCore.calls,
    Acquire: ExchangingShard._wait,
    Insert: ExchangingShard._insert,
    Adopt: ExchangingShard._adopt,
    Transfer: ExchangingShard._transfer,
    NextArrival: ExchangingShard._next_arrival,
}
