"""The answers sent to each sender, so that no repeated call is acted on twice."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.pool_messages import (
    Acquired,
    Adopted,
    Allocated,
    Arrival,
    Freed,
    Inserted,
    PoolDescribed,
    PoolRefused,
    Transferred,
)

Answer = (
    Acquired | Allocated | Inserted | Adopted | Freed | PoolDescribed | PoolRefused | Transferred | Arrival
)
Granting = Acquired | Arrival
"""Answers that give a lease to the sender of the call."""


@attrs.define
class Answers:
    """The answers sent to one sender, whose call numbers only increase."""

    limit: int
    _answers: dict[int, Answer | None] = attrs.field(factory=dict, init=False)
    """Answers by call, oldest first; None for a call that was withdrawn."""
    _forgotten: int = attrs.field(default=0, init=False)
    """The highest call whose answer was dropped to keep the limit; no call up to it can be new."""

    def __contains__(self, call: int) -> bool:
        return call in self._answers or call <= self._forgotten

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, call: int) -> Answer | None:
        """The answer that was sent; None for a call that was withdrawn, is forgotten, or is new."""
        return self._answers.get(call)

    def remembers(self, call: int) -> bool:
        """Whether :meth:`answer` still knows the call: False for one that is forgotten or new."""
        return call in self._answers

    def put(self, call: int, answer: Answer | None) -> None:
        """Remember an answer, and forget the oldest one above the limit."""
        self._answers.pop(call, None)
        self._answers[call] = answer
        if len(self._answers) > self.limit:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            self._forgotten = max(self._forgotten, oldest)


@attrs.define
class Replies:
    """The answers sent to every sender."""

    limit: int
    """Number of answers remembered for each sender.

    A repeat of an older call is refused with UNKNOWN_LEASE.
    """
    _memories: dict[ActorId, Answers] = attrs.field(factory=dict, init=False)

    def of(self, sender: ActorId) -> Answers:
        """The answers sent to one sender."""
        memory = self._memories.get(sender)
        if memory is None:
            memory = self._memories[sender] = Answers(self.limit)
        return memory

    def remembers(self, sender: ActorId, call: int) -> bool:
        """Whether the answer to this call is remembered."""
        memory = self._memories.get(sender)
        return memory is not None and memory.remembers(call)

    def forget(self, sender: ActorId) -> None:
        """Drop the answers sent to a sender that is gone."""
        self._memories.pop(sender, None)

    def again(self, sender: ActorId, number: int, owner_of: Callable[[int], ActorId | None]) -> Answer | None:
        """The answer to repeat for a call that was answered before; None: send nothing.

        The answer is the same again, unless the call is too old to be remembered or the lease that it granted
        is no longer the sender's: these are refused with UNKNOWN_LEASE.
        """
        memory = self.of(sender)
        answer = memory.answer(number)
        if not memory.remembers(number):
            text = f"call {number} is too old to be remembered"
            return PoolRefused(number, PoolError.UNKNOWN_LEASE, text)
        if isinstance(answer, Acquired | Allocated | Arrival) and owner_of(answer.lease) != sender:
            text = f"lease {answer.lease} of call {number} has ended"
            return PoolRefused(number, PoolError.UNKNOWN_LEASE, text)
        return answer  # None for a withdrawn call: its sender waits for no answer

    def check(self) -> None:
        """Assert that no sender has more answers than the limit."""
        for sender, memory in self._memories.items():
            assert len(memory) <= self.limit, f"{len(memory)} answers to {sender} are remembered"
