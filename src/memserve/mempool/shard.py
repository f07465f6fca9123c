"""The MemPoolShard's core: pool calls in, answers out, and the clock that ends the leases of the silent.

A call is known by ``(sender, call)`` and acted on once. A repeat gets the same answer again (as long as a
granted lease lives) and never a second grant, which nobody would know to free.

An Acquire that finds the pool short waits in one bounded queue, granted strictly in order: a large one is not
overtaken for ever by small ones. AllocMem never waits, because the running request that asks already holds
pages that others wait for.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from memserve.actions import Action, Kill, Log, Send
from memserve.errors import PoolError
from memserve.mempool.pool import Grant, Pool, Reclaimed
from memserve.messages import (
    Acquire,
    Acquired,
    ActorId,
    Adopt,
    Adopted,
    Allocated,
    AllocMem,
    Cluster,
    FreeMem,
    Gone,
    Insert,
    Inserted,
    Load,
    Message,
    PoolRefused,
)

_Answerable = Acquire | AllocMem | Insert | Adopt
_Call = _Answerable | FreeMem
_Answer = Acquired | Allocated | Inserted | Adopted | PoolRefused


@attrs.define
class _Memory:
    """What one sender was told, so that no repeat is acted on twice.

    A sender's call numbers only ever grow.
    """

    limit: int
    _answers: dict[int, _Answer | None] = attrs.field(factory=dict, init=False)
    """Oldest first. None for a call that was withdrawn."""
    _forgotten: int = attrs.field(default=0, init=False)
    """The highest call whose answer was dropped to keep the limit; calls up to it cannot be new."""

    def __contains__(self, call: int) -> bool:
        return call in self._answers or call <= self._forgotten

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, call: int) -> _Answer | None:
        """What was said; None for a call that was withdrawn, forgotten, or is new."""
        return self._answers.get(call)

    def remembers(self, call: int) -> bool:
        """Whether :meth:`answer` still knows: False for one that is forgotten or new."""
        return call in self._answers

    def put(self, call: int, answer: _Answer | None) -> None:
        """Remember an answer, forgetting the oldest at the limit."""
        self._answers.pop(call, None)
        self._answers[call] = answer
        if len(self._answers) > self.limit:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            self._forgotten = max(self._forgotten, oldest)


@attrs.define
class ShardCore:
    """One shard's calls, over the :class:`Pool` that it owns.

    Verbs: receive, advance, take, deadline, check.
    """

    pool: Pool
    waiting_max: int = 1024
    """Acquires that may wait for pages; one more is refused with QUEUE_FULL."""
    remembered_max: int = 1024
    """Answers remembered for each sender. A repeat of an older call is ignored."""
    _waiting: dict[tuple[ActorId, int], Acquire] = attrs.field(factory=dict, init=False)
    """By (sender, call), the longest waiting first."""
    _memories: dict[ActorId, _Memory] = attrs.field(factory=dict, init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)
    _pids: dict[ActorId, int] = attrs.field(factory=dict, init=False)
    """Processes that report here: the workers that map the arena."""

    # ---- verbs ---------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nobody holds anything."""
        return self.pool.deadline

    def receive(self, sender: ActorId, message: Message, now: float) -> None:
        """Take one message in. A heartbeat is believed for the member it names, whoever passed it on."""
        match message:
            case Acquire() | AllocMem() | Insert() | Adopt() | FreeMem():
                self._call(sender, message, now)
                self._grant_waiting(now)
            case Load(member):
                self._pids[member.id] = member.pid
                self.pool.renew(member.id, now)
            case Gone(actors):
                self._bury(actors)
                self._grant_waiting(now)
            case Cluster():
                pass  # sent to everyone; a shard has no use for it
            case _:
                data: dict[str, object] = {"sender": sender, "kind": type(message).__name__}
                self._actions.append(Log("warning", "unexpected message", data))

    def advance(self, now: float) -> None:
        """End the leases of owners that fell silent, whether or not anybody waits for their pages."""
        if now < self.pool.deadline:
            return
        for reclaimed in self.pool.expire(now):
            self._fence(reclaimed.owner)
            self._log_reclaimed("lease expired", reclaimed, self._forget(reclaimed.owner))
        self._grant_waiting(now)

    def take(self) -> list[Action]:
        """What there is to do, once."""
        actions, self._actions = self._actions, []
        return actions

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """The shell could not send an answer: the caller is gone, and what it was granted ends with its silence."""
        data: dict[str, object] = {"to": to, "kind": type(message).__name__}
        self._actions.append(Log("warning", "message undeliverable", data))

    def gauges(self) -> dict[str, float]:
        """The shard's figures for its heartbeat; units in the names, ``_total`` ones only grow."""
        pool, counters = self.pool, self.pool.counters
        figures = attrs.asdict(counters)
        figures["handoff_bytes_copied"] = figures.pop("handed_over_bytes_copied")
        return {
            "pages_total": pool.total,
            "pages_free": pool.free_pages,
            "pages_leased": pool.leased_pages,
            "pages_indexed": pool.indexed_pages,
            "pages_evictable": pool.evictable_pages,
            "leases": pool.leases,
            "waiting_acquires": len(self._waiting),
            **{f"{name}_total": value for name, value in figures.items()},
        }

    def check(self) -> None:
        """Assert every invariant of the shard and of its pool; walks all of it."""
        self.pool.check()
        assert len(self._waiting) <= self.waiting_max, (
            f"{len(self._waiting)} acquires wait, {self.waiting_max} may"
        )
        for sender, call in self._waiting:
            memory = self._memories.get(sender)
            assert memory is None or not memory.remembers(call), (
                f"call {call} of {sender} is answered and waits"
            )
        for sender, memory in self._memories.items():
            assert len(memory) <= self.remembered_max, f"{len(memory)} answers to {sender} are remembered"

    # ---- calls ---------------------------------------------------------------------------------------------

    def _call(self, sender: ActorId, call: _Call, now: float) -> None:
        self.pool.renew(sender, now)
        if isinstance(call, FreeMem):
            if call.lease:
                self._free_mem(sender, call.lease)
            else:
                self._withdraw(sender, call.call)
            return
        if (sender, call.call) in self._waiting:
            return  # a repeat, not yet answered
        if call.call in self._memory(sender):
            self._repeat(sender, call.call)
            return
        try:
            answer = self._answer(sender, call, now)
        except PoolError as refused:
            answer = PoolRefused(call.call, refused.code, refused.message)
        if answer is not None:
            self._reply(sender, answer)

    def _answer(self, sender: ActorId, call: _Answerable, now: float) -> _Answer | None:
        """Do what a new call asks; None when it has to wait. Raises PoolError when it is refused."""
        match call:
            case Acquire():
                return self._acquire(sender, call, now)
            case AllocMem(number, lease, pages):
                return Allocated(number, lease, self.pool.alloc_mem(sender, lease, pages, now))
            case Insert(number, lease, start, tokens):
                return Inserted(number, self.pool.insert(sender, lease, start, tokens))
            case Adopt(number, lease, previous):
                self.pool.adopt(sender, lease, previous, now)
                return Adopted(number, lease)

    def _acquire(self, sender: ActorId, call: Acquire, now: float) -> Acquired | None:
        self.pool.demand(
            call.tokens, call.extra_pages
        )  # what can never be granted must not stand in the queue
        if not self._waiting:
            grant = self.pool.acquire(sender, call.scope, call.tokens, call.extra_pages, now)
            if grant is not None:
                return _acquired(call, grant)
        if len(self._waiting) >= self.waiting_max:
            raise PoolError(PoolError.QUEUE_FULL, f"{len(self._waiting)} acquires wait for pages already")
        self._waiting[sender, call.call] = call
        return None

    def _grant_waiting(self, now: float) -> None:
        """Grant the queue's head as often as the pool can."""
        while self._waiting:
            (sender, _), call = next(iter(self._waiting.items()))
            grant = self.pool.acquire(sender, call.scope, call.tokens, call.extra_pages, now)
            if grant is None:
                return
            del self._waiting[sender, call.call]
            self._reply(sender, _acquired(call, grant))

    def _repeat(self, sender: ActorId, number: int) -> None:
        """Answer a call that was answered before, in the same words while they hold."""
        memory = self._memory(sender)
        answer = memory.answer(number)
        if not memory.remembers(number):
            answer = PoolRefused(
                number, PoolError.UNKNOWN_LEASE, f"call {number} is too old to be remembered"
            )
        elif answer is None:
            return  # withdrawn: the sender waits for nothing
        elif isinstance(answer, Acquired | Allocated) and self.pool.owner_of(answer.lease) != sender:
            answer = PoolRefused(
                number, PoolError.UNKNOWN_LEASE, f"lease {answer.lease} of call {number} has ended"
            )
        self._actions.append(Send(sender, answer))

    def _withdraw(self, sender: ActorId, number: int) -> None:
        """Nobody waits for this Acquire any more.

        Its answer may have crossed the withdrawal: then the lease ends here.
        """
        memory = self._memory(sender)
        answer = memory.answer(number)
        if isinstance(answer, Acquired) and self.pool.owner_of(answer.lease) == sender:
            self.pool.free_mem(sender, answer.lease)
        self._waiting.pop((sender, number), None)
        memory.put(number, None)

    def _free_mem(self, sender: ActorId, lease: int) -> None:
        try:
            self.pool.free_mem(sender, lease)
        except PoolError as refused:
            # A second free, or one that crossed an expiry: harmless, and worth a line.
            data: dict[str, object] = {"sender": sender, "lease": lease, "code": refused.code}
            self._actions.append(Log("warning", "free refused", data))

    # ---- senders -------------------------------------------------------------------------------------------

    def _reply(self, sender: ActorId, answer: _Answer) -> None:
        self._memory(sender).put(answer.call, answer)
        self._actions.append(Send(sender, answer))

    def _memory(self, sender: ActorId) -> _Memory:
        memory = self._memories.get(sender)
        if memory is None:
            memory = self._memories[sender] = _Memory(self.remembered_max)
        return memory

    def _forget(self, owner: ActorId) -> int:
        """Drop an owner's waiting acquires and the answers it was given; how many waited."""
        self._memories.pop(owner, None)
        waiting = [key for key in self._waiting if key[0] == owner]
        for key in waiting:
            del self._waiting[key]
        return len(waiting)

    def _bury(self, actors: Iterable[ActorId]) -> None:
        """Free what the dead owned.

        One that comes back after all is heard again, but its old leases are unknown.
        """
        for actor in actors:
            self._fence(actor)
            reclaimed = self.pool.drop_owner(actor)
            self._log_reclaimed("owner gone", reclaimed, self._forget(actor))

    def _fence(self, owner: ActorId) -> None:
        """Make sure that an owner never writes to its pages again: it may be stopped in the middle of a step.

        Comes before every grant of what is freed here, because actions are performed in order.
        """
        pid = self._pids.pop(owner, None)
        if pid is not None:
            self._actions.append(Kill(owner, pid))

    def _log_reclaimed(self, event: str, reclaimed: Reclaimed, waited: int) -> None:
        if reclaimed.leases or waited:
            data: dict[str, object] = {
                "owner": reclaimed.owner,
                "leases": reclaimed.leases,
                "pages_freed": reclaimed.pages,
                "waiting_acquires": waited,
            }
            self._actions.append(Log("warning", event, data))


def _acquired(call: Acquire, grant: Grant) -> Acquired:
    return Acquired(call.call, grant.lease, grant.pages, grant.cached_tokens)
