"""What each sender was told, so that no repeat of a call is acted on twice."""

from __future__ import annotations

import attrs

from memserve.pool_messages import Acquired, Adopted, Allocated, Freed, Inserted, PoolDescribed, PoolRefused

Answer = Acquired | Allocated | Inserted | Adopted | Freed | PoolDescribed | PoolRefused


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
