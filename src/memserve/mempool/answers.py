"""What each sender was told, so that no repeat of a call is acted on twice."""

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
"""Answers that give a lease to whoever asked."""


@attrs.define
class Answers:
    """The answers to one sender, whose call numbers only ever grow."""

    limit: int
    _answers: dict[int, Answer | None] = attrs.field(factory=dict, init=False)
    """Oldest first. None for a call that was withdrawn."""
    _forgotten: int = attrs.field(default=0, init=False)
    """The highest call whose answer was dropped to keep the limit; calls up to it cannot be new."""

    def __contains__(self, call: int) -> bool:
        return call in self._answers or call <= self._forgotten

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, call: int) -> Answer | None:
        """What was said; None for a call that was withdrawn, forgotten, or is new."""
        return self._answers.get(call)

    def remembers(self, call: int) -> bool:
        """Whether :meth:`answer` still knows: False for one that is forgotten or new."""
        return call in self._answers

    def put(self, call: int, answer: Answer | None) -> None:
        """Remember an answer, forgetting the oldest at the limit."""
        self._answers.pop(call, None)
        self._answers[call] = answer
        if len(self._answers) > self.limit:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            self._forgotten = max(self._forgotten, oldest)


@attrs.define
class Replies:
    """The answers to every sender."""

    limit: int
    """Answers remembered for each sender. A repeat of an older call is ignored."""
    _memories: dict[ActorId, Answers] = attrs.field(factory=dict, init=False)

    def of(self, sender: ActorId) -> Answers:
        """What one sender was told."""
        memory = self._memories.get(sender)
        if memory is None:
            memory = self._memories[sender] = Answers(self.limit)
        return memory

    def remembers(self, sender: ActorId, call: int) -> bool:
        """Whether this call was answered, as far as is known."""
        memory = self._memories.get(sender)
        return memory is not None and memory.remembers(call)

    def forget(self, sender: ActorId) -> None:
        """The sender is gone."""
        self._memories.pop(sender, None)

    def again(self, sender: ActorId, number: int, owner_of: Callable[[int], ActorId | None]) -> Answer | None:
        """The answer to a call that was answered before, in the same words while they hold; None: say nothing."""
        memory = self.of(sender)
        answer = memory.answer(number)
        if not memory.remembers(number):
            text = f"call {number} is too old to be remembered"
            return PoolRefused(number, PoolError.UNKNOWN_LEASE, text)
        if isinstance(answer, Acquired | Allocated | Arrival) and owner_of(answer.lease) != sender:
            text = f"lease {answer.lease} of call {number} has ended"
            return PoolRefused(number, PoolError.UNKNOWN_LEASE, text)
        return answer  # None: withdrawn, the sender waits for nothing

    def check(self) -> None:
        """Assert the limit."""
        for sender, memory in self._memories.items():
            assert len(memory) <= self.limit, f"{len(memory)} answers to {sender} are remembered"
