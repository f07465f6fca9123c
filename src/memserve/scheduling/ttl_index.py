"""The paper's own way to know what shards hold (MemServe, section 6): assume it of every placement, for some minutes.

Nothing is heard of evictions, nor of answers until a next prompt repeats them. It is here to be compared with the
shards' events.
"""

from __future__ import annotations

import math
from collections import deque

import attrs

from memserve.actions import Send
from memserve.identity import ActorId
from memserve.pool_messages import IndexDelta, IndexSnapshot
from memserve.scheduling.global_tree import GlobalTree, Node, PromptPath
from memserve.tokens import count


@attrs.define
class TtlIndex:
    """A tree of what was placed where in the last ``ttl_s``. Looks like an IndexFeed."""

    tree: GlobalTree = attrs.field(factory=GlobalTree)
    ttl_s: float = 300.0
    events: int = 0
    """Placements noted."""
    gaps: int = 0
    snapshots: int = 0
    _placed: deque[tuple[float, ActorId, str, bytes]] = attrs.field(factory=deque, init=False)
    """Until when, who, and what; the oldest first."""

    def match(self, scope: str, tokens: bytes, now: float) -> PromptPath:
        """Who is assumed to hold what of a prompt."""
        while self._placed and self._placed[0][0] <= now:
            _, shard, of, prompt = self._placed.popleft()
            path = [node for node, _ in self.tree.match(of, prompt).path]
            self._let_go([node for node in path if -node.holders.get(shard, -math.inf) <= now], shard)
        return self.tree.match(scope, tokens)

    def placed(self, shard: ActorId, scope: str, tokens: bytes, now: float) -> None:
        """The shard will hold this prompt, for all we know. A holding's figure is the time it ends, below 0: device tier."""
        whole = count(tokens) // self.tree.page_tokens * self.tree.width
        if not whole:
            return
        self.events += 1
        until = now + self.ttl_s
        self._placed.append((until, shard, scope, tokens[:whole]))
        for node in self.tree.hold(self.tree.root(scope), tokens[:whole], shard, -until):
            self.tree.tidy(node)

    def forget(self, shard: ActorId) -> None:
        """A shard is gone, and all that it may have held."""
        self._placed = deque(one for one in self._placed if one[1] != shard)
        self._let_go([node for node in self.tree.nodes() if shard in node.holders], shard)

    def _let_go(self, nodes: list[Node], shard: ActorId) -> None:
        for node in nodes:
            self.tree.unmark(node, shard)
        for node in reversed(nodes):
            self.tree.tidy(node)

    def is_whole(self, shard: ActorId) -> bool:
        """Nothing is told, so nothing is missing."""
        return True

    def delta(self, sender: ActorId, delta: IndexDelta, now: float) -> list[Send]:
        """Not listened to."""
        return []

    def reported(self, sender: ActorId, published: int, now: float) -> list[Send]:
        """Not listened to."""
        return []

    def snapshot(self, sender: ActorId, part: IndexSnapshot, now: float) -> list[Send]:
        """Not listened to."""
        return []
