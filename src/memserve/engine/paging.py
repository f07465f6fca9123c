"""A worker's calls to its shard: it acquires, grows, adopts and frees leases, and retires their pages.

Every call is repeated until it is answered; the shard acts on it once. The next page is requested while the
last one fills, so that no step waits for the shard. When the pool has no free page, the youngest sequence is
preempted: it gives its pages back (the indexed ones will likely be found again) and queues for all of them
again.
"""

from __future__ import annotations

import attrs

from memserve.engine.outbox import Outbox
from memserve.engine.sequence import Phase, Sequence, usable
from memserve.identity import ActorId
from memserve.mempool.shard_calls import ShardCalls
from memserve.pool_messages import Acquire, Adopt, AllocMem, FreeMem, Insert, Return, Source
from memserve.tokens import count, span

_Call = Acquire | Adopt | AllocMem | FreeMem | Insert

CALL_REPEAT_S = 1.0
"""How long a call may stay unanswered before it is sent again."""
SHORTAGE_RETRY_S = 0.05
"""Seconds between two requests for a page by a starved sequence."""
SHORTAGE_YIELD_S = 1.0
"""How long a worker's only sequence starves before it gives its pages back and queues for all of them."""


@attrs.define
class Paging:
    """One worker's calls to the shard whose pages its engine can reach."""

    shard: ActorId
    page_tokens: int
    max_context: int
    retire_what: str
    """Which pages go into the index: ``none``, ``prompt`` or ``all``."""
    outbox: Outbox
    fetch_s: float = 5.0
    """How long to wait for pages of another shard, in seconds."""
    ahead: bool = False
    """Whether a prompt's full pages go to the decode worker's shard while the rest is computed."""
    swap_least: int = 0
    """Least number of cached tokens in slower tiers for which a swap-in pays."""
    sequel_tokens: int = 0
    """Tokens to request, at most, of what followed a prompt earlier."""
    deadline: float = attrs.field(default=float("inf"), init=False)
    """When a shortage must be handled again."""
    now: float = attrs.field(default=0.0, init=False)
    """Current time, at which calls are sent. The owner sets it before it uses this object."""
    _calls: ShardCalls[Sequence | None] = attrs.field(factory=ShardCalls, init=False)
    """Pending calls by sequence; under None, FreeMem calls, for which no sequence waits."""
    _unanswered: dict[int, tuple[float, _Call]] = attrs.field(factory=dict, init=False)
    """By call number: when it was last sent, and the message. The one sent longest ago comes first."""
    _starving_since: float | None = attrs.field(default=None, init=False)
    _relief_at: float = attrs.field(default=0.0, init=False)

    def answered(self, call: int) -> Sequence | None:
        """The sequence whose call this ends; None if it was withdrawn, then only :meth:`freed` ends it."""
        _, message = self._unanswered.get(call, (0.0, None))
        if not isinstance(message, FreeMem) or message.lease:
            self._unanswered.pop(call, None)
        return self._calls.answered(call)

    def freed(self, call: int) -> None:
        """Record that the shard has ended a lease, or confirmed that a call is withdrawn."""
        self._unanswered.pop(call, None)
        self._calls.answered(call)

    def inserted(self, call: int) -> Sequence | None:
        """Record the answer to an Insert; returns its sequence, or None if the call was withdrawn."""
        _, message = self._unanswered.get(call, (0.0, None))
        one = self.answered(call)
        if one is not None and isinstance(message, Insert):
            one.acknowledged = max(one.acknowledged, message.start + count(message.tokens))
        return one

    def repeat(self) -> None:
        """Send calls again that have waited too long for their answers."""
        for call, (sent_at, message) in list(self._unanswered.items()):
            if self.now < sent_at + CALL_REPEAT_S:
                break
            self._resend(call, message)

    @property
    def repeat_at(self) -> float:
        """When :meth:`repeat` must be called next."""
        for sent_at, _ in self._unanswered.values():
            return sent_at + CALL_REPEAT_S
        return float("inf")

    def acquire(self, one: Sequence, source: Source | None = None) -> None:
        """Ask for a lease on pages for all tokens of a sequence: cached pages first.

        Missing pages are fetched from ``source``.
        """

        def make(call: int) -> Acquire:
            return Acquire(
                call,
                one.request.scope,
                one.tokens,
                one.headroom(self.page_tokens, self.max_context),
                source,
                swap_least=self.swap_least,
                uncached=one.score_count is not None,
                sequel_tokens=self.sequel_tokens,
            )

        self._send(self._calls.ask(one, make, grants=True))

    def fetch(self, one: Sequence) -> None:
        """Acquire pages, and have the prefix fetched that the plan names, before the prompt runs."""
        shard = one.plan.source
        held = usable(one.plan.source_tokens, one.length, self.page_tokens)
        source = Source(shard, held, self.fetch_s, request=one.request.id)
        self.acquire(one, source if held and shard not in ("", self.shard) else None)

    def move(self, one: Sequence, lease: int, owner: ActorId) -> None:
        """Acquire pages for a handed-over sequence, filled from ``owner``'s ``lease`` on the plan's shard."""
        insert = self.retire_what == "all"
        shard, request = one.plan.shard, one.request.id
        self.acquire(one, Source(shard, one.length - 1, self.fetch_s, lease, owner, insert, request))

    def give_back(self, one: Sequence, page_bytes: int) -> None:
        """Copy the answer's pages to the prefill's shard in the background: the last use of this lease."""
        full = one.acknowledged if self.retire_what != "all" else one.retired
        if full:
            tokens, to = span(one.tokens, 0, full), one.plan.shard
            self.outbox.send(self.shard, Return(one.request.scope, tokens, to, self.fetch_s, one.request.id))
            one.returns(full, self.page_tokens, page_bytes)

    def adopt(self, one: Sequence, previous: ActorId) -> None:
        """Ask the shard to transfer the lease from ``previous`` to this worker."""
        self._send(self._calls.ask(one, lambda call: Adopt(call, one.lease, previous)))

    def grow(self, one: Sequence) -> None:
        """Ask for the next page if the last one is in use and the sequence may outgrow it."""
        if not one.growing and one.pages_wanted(self.page_tokens, self.max_context):
            one.growing = True
            self._send(self._calls.ask(one, lambda call: AllocMem(call, one.lease, 1)))

    def retire(self, one: Sequence) -> None:
        """Give the full pages to the index.

        The Insert covers all pages that the shard has not acknowledged, because an earlier call may be lost.
        With ``ahead``, a prompt's pages are also sent to the decode worker's shard while the rest is
        computed.
        """
        prompt = 0 if one.came_with and one.crosses else one.request.prompt_tokens  # indexed by the prefill
        limit = {"none": 0, "prompt": prompt, "all": one.computed}[self.retire_what]
        full = min(one.computed, limit) // self.page_tokens * self.page_tokens
        if full > one.retired:
            start = one.acknowledged
            tokens = span(one.tokens, start, full)
            self._send(self._calls.ask(one, lambda call: Insert(call, one.lease, start, tokens)))
            one.retired = full
            rest = count(one.request.tokens) > one.computed
            if rest and self.ahead and one.crosses and not one.came_with:
                prefix, to = span(one.tokens, 0, full), one.plan.decode_shard
                self.outbox.send(
                    self.shard, Return(one.request.scope, prefix, to, self.fetch_s, one.request.id, True)
                )

    def release(self, one: Sequence) -> None:
        """End the lease: indexed pages are unpinned, the others freed."""
        self.forget(one)
        if one.lease:
            lease = one.lease
            self._send(self._calls.ask(None, lambda call: FreeMem(lease, call)))

    def forget(self, one: Sequence) -> None:
        """Stop waiting for answers about a sequence; a pending Acquire is withdrawn."""
        ended = self._calls.of(one)
        for call in ended:
            self._unanswered.pop(call, None)
        for withdrawal in self._calls.forget(one):
            self._send(withdrawal)

    def relieve_shortage(self, ready: list[Sequence], now: float) -> None:
        """If a ``ready`` sequence cannot continue without another page, preempt the youngest and ask again.

        No step may be running. The oldest sequence is never preempted while there is another, so it always
        finishes. A worker's only sequence gives its pages back after SHORTAGE_YIELD_S and queues for all of
        them; otherwise two workers that each hold half of the pool could deadlock.
        """
        starving = [one for one in ready if one.starved and one.room(self.page_tokens) <= 0]
        if not starving:
            self._starving_since, self.deadline = None, float("inf")
            return
        if self._starving_since is None:
            self._starving_since = now
        if now >= self._relief_at:
            self._relief_at = now + SHORTAGE_RETRY_S
            if len(ready) > 1 or now - self._starving_since >= SHORTAGE_YIELD_S:
                self._preempt(max(ready, key=lambda one: one.order))
            for one in starving:
                if one.phase is Phase.READY:
                    self.grow(one)
        self.deadline = self._relief_at

    def _preempt(self, one: Sequence) -> None:
        self.outbox.log("request preempted", one, level="warning", computed_tokens=one.computed)
        self.outbox.count("preemptions_total")
        self.release(one)
        one.go(Phase.WAITING)
        one.lease, one.pages, one.computed, one.retired, one.acknowledged = 0, (), 0, 0, 0
        one.growing = one.starved = False
        self.acquire(one)

    def _send(self, message: _Call) -> None:
        self._resend(message.call, message)

    def _resend(self, call: int, message: _Call) -> None:
        self._unanswered.pop(call, None)
        self._unanswered[call] = (self.now, message)
        self.outbox.send(self.shard, message)
