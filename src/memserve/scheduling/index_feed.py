"""What schedulers know of the shards' indexes: events received, snapshots to request, and the global tree."""

from __future__ import annotations

import attrs

from memserve.actions import Send
from memserve.identity import ActorId
from memserve.pool_messages import IndexDelta, IndexEvent, IndexSnapshot, IndexWanted
from memserve.scheduling.global_tree import GlobalTree, PromptPath
from memserve.scheduling.holdings import EventsDoNotFit, Holdings
from memserve.scheduling.losses import Losses
from memserve.tokens import TOKEN_BYTES

ASK_AGAIN_S = 2.0
"""How long a snapshot may take before it is requested again."""


@attrs.define
class _Shard:
    """One incarnation of a shard. ``next`` is the number of the next expected event."""

    holdings: Holdings
    next: int = 0
    whole: bool = True
    """False after a gap, until a snapshot has come."""
    parts: int = 0
    """Parts of the snapshot received so far."""
    snapshot: list[IndexEvent] = attrs.field(factory=list)
    """Events of the parts received. Until the snapshot is complete, the entries from before the gap serve on
    as hints, mostly right."""
    snapshot_next: int = 0
    """The ``next`` of the snapshot that the parts belong to."""
    asked_at: float = float("-inf")


@attrs.define
class IndexFeed:
    """Sequence numbers by shard, and the tree: exact except for the events still on their way."""

    tree: GlobalTree = attrs.field(factory=GlobalTree)
    events: int = 0
    """Events received in order."""
    gaps: int = 0
    snapshots: int = 0
    losses: Losses = attrs.field(init=False)
    _shards: dict[ActorId, _Shard] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.losses = Losses(self.tree.width, self.tree.pages)

    def match(self, scope: str, tokens: bytes, now: float) -> PromptPath:
        """The shards that hold a prefix of a prompt, and how much each holds."""
        match = self.tree.match(scope, tokens, self.losses.share)
        self.losses.missed(scope, tokens, match.tokens * TOKEN_BYTES)
        return match

    def placed(self, shard: ActorId, scope: str, tokens: bytes, now: float) -> None:
        """Ignore a placement: its shard will report what became of the prompt."""

    def is_whole(self, shard: ActorId) -> bool:
        """Whether no event of a shard is missing."""
        known = self._shards.get(shard)
        return known is not None and known.whole

    def delta(self, sender: ActorId, delta: IndexDelta, now: float) -> list[Send]:
        """Apply events; ask for a snapshot if some are missing."""
        shard = self._known(sender)
        if shard.whole and delta.first == shard.next:
            shard.next += len(delta.events)
            self.events += len(delta.events)
            return self._apply(sender, shard, delta.events, now)
        if shard.whole and delta.first + len(delta.events) <= shard.next:
            return []  # a duplicate
        return self._ask(sender, shard, now)

    def reported(self, sender: ActorId, published: int, now: float) -> list[Send]:
        """Compare a shard's count of published events; ask for a snapshot if the last of them are missing."""
        shard = self._known(sender)
        return [] if shard.whole and published <= shard.next else self._ask(sender, shard, now)

    def snapshot(self, sender: ActorId, part: IndexSnapshot, now: float) -> list[Send]:
        """Take in one part of a snapshot; the last part ends the gap."""
        shard = self._known(sender)
        if shard.whole and part.next <= shard.next:
            return []  # late, or a duplicate
        if part.part == 0:
            shard.parts, shard.snapshot, shard.snapshot_next = 0, [], part.next
        if part.part != shard.parts or part.next != shard.snapshot_next:
            return []  # a part was lost: the next delta asks again
        shard.parts += 1
        shard.snapshot += part.events
        if shard.parts < part.parts:
            return []
        events, shard.snapshot, shard.parts = shard.snapshot, [], 0
        shard.holdings.drop()
        shard.next, shard.whole = part.next, True
        self.snapshots += 1
        return self._apply(sender, shard, events, now)

    def forget(self, shard: ActorId) -> None:
        """Drop a dead shard and all it held; its successor counts events from 0 again."""
        known = self._shards.pop(shard, None)
        if known is not None:
            known.holdings.drop()

    def _known(self, sender: ActorId) -> _Shard:
        shard = self._shards.get(sender)
        if shard is None:
            shard = self._shards[sender] = _Shard(Holdings(sender, self.tree, self.losses))
        return shard

    def _apply(
        self, sender: ActorId, shard: _Shard, events: list[IndexEvent] | tuple[IndexEvent, ...], now: float
    ) -> list[Send]:
        try:
            shard.holdings.apply(events)
        except EventsDoNotFit:
            return self._ask(sender, shard, now)
        return []

    def _ask(self, sender: ActorId, shard: _Shard, now: float) -> list[Send]:
        self.gaps += shard.whole
        shard.whole = False
        if now < shard.asked_at + ASK_AGAIN_S:
            return []
        shard.asked_at, shard.parts, shard.snapshot = now, 0, []
        return [Send(sender, IndexWanted(shard.next))]
