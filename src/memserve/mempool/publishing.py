"""Publishes a shard's index to schedulers: numbered deltas, and a snapshot to a scheduler that missed one."""

from __future__ import annotations

import math

import attrs

from memserve.actions import Action, Send
from memserve.identity import ActorId
from memserve.mempool.prompt_tree import PromptTree
from memserve.pool_messages import IndexDelta, IndexEvent, IndexSnapshot

GATHER_S = 0.05
"""How long a change may wait for others to be sent with it."""
QUIET_S = 1.0
"""How long after the last delta an empty one follows, once, so that the loss of the last is noticed."""
EVENTS_MAX = 512
"""Maximum number of events in one message."""
TOKEN_BYTES_MAX = 8 << 20
"""Bytes of tokens in one message, exceeded by at most one event, which holds the tokens of one node.

A message that is longer than the bus allows would never arrive, however often the snapshot is repeated.
"""


@attrs.define
class Publisher:
    """Sends the ``events`` of one tree to ``schedulers`` as deltas; without schedulers, none are recorded."""

    tree: PromptTree
    schedulers: tuple[ActorId, ...]
    deadline: float = attrs.field(default=math.inf, init=False)
    """When :meth:`advance` must be called next."""
    _next: int = attrs.field(default=0, init=False)
    """Number of the next event."""
    _gathering: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.tree.events = [] if self.schedulers else None

    @property
    def published(self) -> int:
        """Number of events sent so far.

        Every heartbeat carries it, so that a scheduler that missed the last events asks for them.
        """
        return self._next

    def changed(self, now: float) -> None:
        """Schedule any new events to be sent a little later, or now if they are many."""
        events = self.tree.events
        if events and not self._gathering:
            self._gathering, self.deadline = True, now + GATHER_S
        if events and len(events) >= EVENTS_MAX:
            self.deadline = now

    def advance(self, now: float) -> list[Action]:
        """The messages that are due."""
        if now < self.deadline:
            return []
        if not self._gathering:
            self.deadline = math.inf
            return self._to_all(())
        self._gathering, self.deadline = False, now + QUIET_S
        return self._flush()

    def snapshot(self, to: ActorId) -> list[Action]:
        """The whole index for one scheduler.

        Events that are not sent yet go to all schedulers first, so that the numbers agree.
        """
        flushed = self._flush() if self.tree.events else []
        events = tuple(self.tree.snapshot())
        parts = _parts(events) or [()]
        return flushed + [
            Send(to, IndexSnapshot(self._next, number, len(parts), part)) for number, part in enumerate(parts)
        ]

    def _flush(self) -> list[Action]:
        events = self.tree.events or []
        actions = [action for part in _parts(tuple(events)) for action in self._to_all(part)]
        events.clear()
        return actions

    def _to_all(self, events: tuple[IndexEvent, ...]) -> list[Action]:
        delta = IndexDelta(self._next, events)
        self._next += len(events)
        return [Send(scheduler, delta) for scheduler in self.schedulers]


def _parts(events: tuple[IndexEvent, ...]) -> list[tuple[IndexEvent, ...]]:
    parts: list[list[IndexEvent]] = []
    nbytes = 0
    for event in events:
        if not parts or len(parts[-1]) == EVENTS_MAX or nbytes >= TOKEN_BYTES_MAX:
            parts.append([])
            nbytes = 0
        parts[-1].append(event)
        nbytes += len(event.tokens)
    return [tuple(part) for part in parts]
