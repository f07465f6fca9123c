"""A worker's dealings with its shard: leases taken, grown, retired from, adopted and given back.

Every call is repeated until it is answered: the shard acts on it once. Pages are asked for one ahead, while the last
one fills, so that no step waits for the shard. When the pool has
none to give, the youngest sequence gives way: its pages go back (what is indexed will likely be found again)
and it queues for all of them anew.
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
"""How often a sequence without a page asks again."""
SHORTAGE_YIELD_S = 1.0
"""How long the only sequence of a worker starves before it gives its pages back and queues for all of them."""


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
    """How long pages of another shard are waited for."""
    ahead: bool = False
    """Whether full pages go to the decode worker's shard while the rest of a prompt is computed."""
    swap_least: int = 0
    """Cached tokens of slower tiers that are worth bringing in."""
    sequel_tokens: int = 0
    """How much of what came after a prompt before is worth knowing."""
    deadline: float = attrs.field(default=float("inf"), init=False)
    """When a shortage must be looked at again."""
    now: float = attrs.field(default=0.0, init=False)
    """Set by the owner before each of its verbs: when calls are sent."""
    _calls: ShardCalls[Sequence | None] = attrs.field(factory=ShardCalls, init=False)
    """Of None: the end of a lease, for which no sequence waits."""
    _unanswered: dict[int, tuple[float, _Call]] = attrs.field(factory=dict, init=False)
    """By call: when it was sent last, the longest ago first, and what was sent."""
    _starving_since: float | None = attrs.field(default=None, init=False)
    _relief_at: float = attrs.field(default=0.0, init=False)

    def answered(self, call: int) -> Sequence | None:
        """Whose call this ends; None when it was withdrawn meanwhile, and then only :meth:`freed` ends it."""
        _, message = self._unanswered.get(call, (0.0, None))
        if not isinstance(message, FreeMem) or message.lease:
            self._unanswered.pop(call, None)
        return self._calls.answered(call)

    def freed(self, call: int) -> None:
        """The shard has ended a lease, or knows that a call was withdrawn."""
        self._unanswered.pop(call, None)
        self._calls.answered(call)

    def inserted(self, call: int) -> Sequence | None:
        """The shard has retired what this call said; whose it was, unless that was withdrawn."""
        _, message = self._unanswered.get(call, (0.0, None))
        one = self.answered(call)
        if one is not None and isinstance(message, Insert):
            one.acknowledged = max(one.acknowledged, message.start + count(message.tokens))
        return one

    def repeat(self) -> None:
        """Send again what has waited too long for its answer."""
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
        """Ask for a lease on pages for all of a sequence's tokens, cached ones first, and from ``source`` what is missing."""
        extra = one.headroom(self.page_tokens, self.max_context)
        scope, least = one.request.scope, self.swap_least
        anew = one.tells is not None
        sequel = self.sequel_tokens
        self._send(self._calls.acquire(one, scope, one.tokens, extra, source, least, anew, sequel))

    def fetch(self, one: Sequence) -> None:
        """Acquire, with what the plan says to fetch before the prompt runs."""
        shard = one.plan.source
        held = usable(one.plan.source_tokens, one.length, self.page_tokens)
        source = Source(shard, held, self.fetch_s, request=one.request.id)
        self.acquire(one, source if held and shard not in ("", self.shard) else None)

    def move(self, one: Sequence, lease: int, owner: ActorId) -> None:
        """Acquire pages here for a sequence that was handed over, filled from ``lease`` of ``owner`` on the plan's shard."""
        insert = self.retire_what == "all"
        shard, request = one.plan.shard, one.request.id
        self.acquire(one, Source(shard, one.length - 1, self.fetch_s, lease, owner, insert, request))

    def give_back(self, one: Sequence, page_bytes: int) -> None:
        """Let the shard of the prefill have the answer's pages, in the background: the last use of this lease."""
        full = one.acknowledged if self.retire_what != "all" else one.retired
        if full:
            tokens, to = span(one.tokens, 0, full), one.plan.shard
            self.outbox.send(self.shard, Return(one.request.scope, tokens, to, self.fetch_s, one.request.id))
            one.returns(full, self.page_tokens, page_bytes)

    def adopt(self, one: Sequence, previous: ActorId) -> None:
        """Ask for the lease that ``previous`` handed over."""
        self._send(self._calls.adopt(one, one.lease, previous))

    def grow(self, one: Sequence) -> None:
        """Ask for the next page if the last one is in use."""
        if not one.growing and one.pages_wanted(self.page_tokens, self.max_context):
            one.growing = True
            self._send(self._calls.alloc(one, one.lease, 1))

    def retire(self, one: Sequence) -> None:
        """Give the pages that are full by now to the index: all that the shard has not acknowledged, as a call may be lost."""
        prompt = 0 if one.came_with and one.crosses else one.request.prompt_tokens  # indexed there
        limit = {"none": 0, "prompt": prompt, "all": one.computed}[self.retire_what]
        full = min(one.computed, limit) // self.page_tokens * self.page_tokens
        if full > one.retired:
            start = one.acknowledged
            self._send(self._calls.insert(one, one.lease, start, span(one.tokens, start, full)))
            one.retired = full
            rest = count(one.request.tokens) > one.computed
            if rest and self.ahead and one.crosses and not one.came_with:
                tokens, to = span(one.tokens, 0, full), one.plan.decode_shard
                self.outbox.send(
                    self.shard, Return(one.request.scope, tokens, to, self.fetch_s, one.request.id, True)
                )

    def release(self, one: Sequence) -> None:
        """End the lease: unpin what is indexed, free the rest."""
        self.forget(one)
        if one.lease:
            lease = one.lease
            self._send(self._calls.ask(None, lambda call: FreeMem(lease, call)))

    def forget(self, one: Sequence) -> None:
        """Stop waiting for answers about a sequence; a waiting acquire is withdrawn."""
        ended = self._calls.of(one)
        for call in ended:
            self._unanswered.pop(call, None)
        for withdrawal in self._calls.forget(one):
            self._send(withdrawal)

    def relieve_shortage(self, ready: list[Sequence], now: float) -> None:
        """When one of the ``ready`` cannot go on for want of a page: preempt the youngest, and ask again.

        No step may be under way. The oldest is never preempted while another is left, so it always reaches its end.
        A worker's only sequence gives way after SHORTAGE_YIELD_S and queues for all its pages, so that two
        workers holding one half each cannot wait for one another for ever.
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
