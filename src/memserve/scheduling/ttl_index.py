"""The paper's way to know what shards hold (MemServe, section 6): assume it of every placement for a time.

It does not learn of evictions, nor of answers until a later prompt repeats them. It exists for comparison
with the shards' events.
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
    """A tree of what was placed where in the last ``ttl_s``. A scheduler uses it like an IndexFeed."""

    tree: GlobalTree = attrs.field(factory=GlobalTree)
    ttl_s: float = 300.0
    events: int = 0
    """Placements noted."""
    gaps: int = 0
    _placed: deque[tuple[float, ActorId, str, bytes]] = attrs.field(factory=deque, init=False)
    """Expiry time, shard, scope and prompt of each placement; the oldest first."""

    def match(self, scope: str, tokens: bytes, now: float) -> PromptPath:
        """The shards assumed to hold a prefix of a prompt, and how much of it."""
        while self._placed and self._placed[0][0] <= now:
            _, shard, of, prompt = self._placed.popleft()
            path = [node for node, _ in self.tree.match(of, prompt).path]
            self._let_go([node for node in path if -node.holders.get(shard, -math.inf) <= now], shard)
        return self.tree.match(scope, tokens)

    def placed(self, shard: ActorId, scope: str, tokens: bytes, now: float) -> None:
        """Assume that the shard will hold this prompt.

        A holder's figure is its expiry time, negated: a figure not above 0 counts as the device tier.
        """
        whole = count(tokens) // self.tree.page_tokens * self.tree.width
        if not whole:
            return
        self.events += 1
        until = now + self.ttl_s
        self._placed.append((until, shard, scope, tokens[:whole]))
        for node in self.tree.hold(self.tree.root(scope), tokens[:whole], shard, -until):
            self.tree.tidy(node)

    def forget(self, shard: ActorId) -> None:
        """Drop a dead shard and all it may have held."""
        self._placed = deque(one for one in self._placed if one[1] != shard)
        self._let_go([node for node in self.tree.nodes() if shard in node.holders], shard)

    def _let_go(self, nodes: list[Node], shard: ActorId) -> None:
        for node in nodes:
            self.tree.unmark(node, shard)
        for node in reversed(nodes):
            self.tree.tidy(node)

    def delta(self, sender: ActorId, delta: IndexDelta, now: float) -> list[Send]:
        """Ignore events."""
        return []

    def reported(self, sender: ActorId, published: int, now: float) -> list[Send]:
        """Ignore reports."""
        return []

    def snapshot(self, sender: ActorId, part: IndexSnapshot, now: float) -> list[Send]:
        """Ignore snapshots."""
        return []
