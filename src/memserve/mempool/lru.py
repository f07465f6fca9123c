"""The least recently used node of a tier, among those whose pages are not needed."""

from __future__ import annotations

import heapq

import attrs

from memserve.mempool.addresses import Tier
from memserve.mempool.nodes import Node


@attrs.define
class Lru:
    """A heap of (use when queued, ticket, node), oldest use first.

    A node has at most one valid entry: the one with its ticket. Entries are lazy: a node that was pinned,
    grown or touched since it was queued stays in the heap until it is popped, and the caller of :meth:`pop`
    checks it again.
    """

    tier: int
    _heap: list[tuple[int, int, Node]] = attrs.field(factory=list, init=False)
    _tickets: int = attrs.field(default=0, init=False)
    _void: int = attrs.field(default=0, init=False)
    """Number of entries whose ticket is no longer that of their node."""

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, node: Node) -> None:
        """Queue a node by its last use."""
        assert not node.ticket, "a node is queued twice"
        self._tickets += len(Tier)  # unique across tiers: a node may have been queued in another before
        node.ticket = self._tickets + self.tier
        heapq.heappush(self._heap, (node.last_use, node.ticket, node))

    def pop(self) -> Node | None:
        """Take out and return the node with the oldest use; None when no node is queued.

        A node that was used since it was queued is first queued again by its latest use.
        """
        while self._heap:
            used, ticket, node = heapq.heappop(self._heap)
            if ticket != node.ticket:
                self._void -= 1
                continue
            node.ticket = 0
            if used == node.last_use:
                return node
            self.push(node)
        return None

    def forget(self, node: Node) -> None:
        """Void the entry, if there is one, of a node that left its tier or the tree."""
        if node.ticket:
            node.ticket = 0
            self._void += 1
            if 2 * self._void > len(self._heap):
                self._heap = [entry for entry in self._heap if entry[1] == entry[2].ticket]
                heapq.heapify(self._heap)
                self._void = 0

    def check(self) -> None:
        """Assert that the entries are sound."""
        valid = [entry for entry in self._heap if entry[1] == entry[2].ticket]
        assert len(valid) + self._void == len(self._heap), "void heap entries are miscounted"
        assert len({node for _, _, node in valid}) == len(valid), "a node is queued twice"
        assert all(used <= node.last_use for used, _, node in valid), "a node is queued younger than it is"
