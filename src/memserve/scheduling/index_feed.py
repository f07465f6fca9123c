"""What schedulers are told of the shards' indexes: which events have come, and when to ask for all of them again.

It checks the numbers and counts; nothing is routed by it.
"""

from __future__ import annotations

import attrs

from memserve.actions import Send
from memserve.messages import ActorId
from memserve.pool_messages import IndexDelta, IndexSnapshot, IndexWanted

ASK_AGAIN_S = 2.0
"""How long a snapshot may take before it is asked for again."""


@attrs.define
class _Shard:
    """One incarnation of a shard. ``next`` is the number of the event expected."""

    next: int = 0
    whole: bool = True
    """False after a gap, until a snapshot has come."""
    parts: int = 0
    """Parts of the snapshot that have come."""
    asked_at: float = float("-inf")


@attrs.define
class IndexFeed:
    """Sequence numbers by shard."""

    events: int = 0
    """Events that came in order."""
    gaps: int = 0
    snapshots: int = 0
    _shards: dict[ActorId, _Shard] = attrs.field(factory=dict, init=False)

    def is_whole(self, shard: ActorId) -> bool:
        """Whether everything that a shard has said was heard."""
        known = self._shards.get(shard)
        return known is not None and known.whole

    def delta(self, sender: ActorId, delta: IndexDelta, now: float) -> list[Send]:
        """Take events in; a question when some are missing."""
        shard = self._shards.setdefault(sender, _Shard())
        if shard.whole and delta.first == shard.next:
            shard.next += len(delta.events)
            self.events += len(delta.events)
            return []
        if shard.whole and delta.first + len(delta.events) <= shard.next:
            return []  # known: it came twice
        return self._ask(sender, shard, now)

    def reported(self, sender: ActorId, published: int, now: float) -> list[Send]:
        """A shard's heartbeat says how many events it has sent: a question when the last of them have not come."""
        shard = self._shards.setdefault(sender, _Shard())
        return [] if shard.whole and published <= shard.next else self._ask(sender, shard, now)

    def _ask(self, sender: ActorId, shard: _Shard, now: float) -> list[Send]:
        self.gaps += shard.whole
        shard.whole = False
        if now < shard.asked_at + ASK_AGAIN_S:
            return []
        shard.asked_at, shard.parts = now, 0
        return [Send(sender, IndexWanted(shard.next))]

    def snapshot(self, sender: ActorId, part: IndexSnapshot) -> None:
        """Take a part of a snapshot in; the last one ends the gap."""
        shard = self._shards.setdefault(sender, _Shard(whole=False))
        if part.part != shard.parts:
            return  # a part was lost: the next delta asks again
        shard.parts += 1
        if shard.parts == part.parts:
            shard.next, shard.whole, shard.parts = part.next, True, 0
            self.snapshots += 1

    def forget(self, shard: ActorId) -> None:
        """A shard is gone; its successor counts from 0 again."""
        self._shards.pop(shard, None)
