"""The parts of the prefix index. Private to :mod:`memserve.mempool`."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from memserve.mempool.addresses import tier_of


@attrs.define(eq=False)
class Node:
    """A run of whole pages below ``parent``, all in one tier."""

    key: bytes
    """Packed tokens of ``len(pages)`` whole pages."""
    pages: list[int]
    """Pages as slots (see :mod:`memserve.mempool.addresses`)."""
    parent: Node | None
    """None for a root, and for a node that left the tree."""
    tier: int = 0
    id: int = 0
    """Entry number of the node in IndexEvents; 0 for roots."""
    children: dict[bytes, Node] = attrs.field(factory=dict)
    """Children by the bytes of their first page."""
    staying_children: int = 0
    """Number of children in the same tier that are not leaving it. A node without any can leave next."""
    pins: int = 0
    """Number of pins that end here or below."""
    last_use: int = 0
    """Value of the tree's use counter at the last touch; never more than the parent's."""
    ticket: int = 0
    """Ticket of the node's entry in its tier's :class:`~memserve.mempool.lru.Lru`; 0 when it has none."""
    moving: Move | None = None
    """The move of the node's pages to another tier; they stay valid, and in place, until it has ended."""

    @property
    def leaving(self) -> bool:
        """Whether the node's pages are on their way to a slower tier."""
        return self.moving is not None and not self.moving.inbound

    def path(self) -> Iterator[Node]:
        """This node and all nodes above it, the root last."""
        above: Node | None = self
        while above is not None:
            yield above
            above = above.parent

    def walk(self) -> Iterator[Node]:
        """This node and all nodes below it, parents before their children."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


@attrs.define(eq=False)
class Root(Node):
    """The empty prefix of one scope."""

    scope: str = ""


@attrs.define(eq=False)
class Pin:
    """A claim on one prefix, owned by one lease.

    Until :meth:`PromptTree.unpin`, none of its pages is evicted, and none is moved except to bring it in for
    the leases that pin it.
    """

    node: Node
    tokens: int
    """Length of the prefix in tokens, always whole pages."""


@attrs.define(eq=False)
class Job:
    """One Copy that the shell has been asked for, and the moves that it completes."""

    id: int
    moves: list[Move] = attrs.field(factory=list)


@attrs.define(eq=False)
class Move:
    """One node's pages on their way to another tier.

    ``target`` belongs to the move until the copy has ended: nothing else may be written there before.
    """

    job: Job
    node: Node | None
    """None once the result is not wanted any more: ``target`` then comes free when the copy ends."""
    source: list[int]
    target: list[int]

    @property
    def inbound(self) -> bool:
        """Whether the move goes to a faster tier."""
        return tier_of(self.target[0]) < tier_of(self.source[0])

    def split(self, node: Node, at: int) -> Move:
        """Give the first ``at`` pages of this move to ``node``, which a split has made; returns its move."""
        front = Move(self.job, node, self.source[:at], self.target[:at])
        self.source, self.target = self.source[at:], self.target[at:]
        self.job.moves.append(front)
        return front

    def abandon(self) -> None:
        """Give up the result of this move."""
        if self.node is not None:
            self.node.moving = None
            self.node = None


@attrs.frozen
class CachedPrefix:
    """The longest cached prefix of a prompt, as it was when it was looked up."""

    tokens: int
    pages: tuple[int, ...]
    """Pages as slots."""


@attrs.frozen
class Insertion:
    """What :meth:`PromptTree.insert` found. The index now owns the offered pages, except ``duplicates``."""

    already_tokens: int
    duplicates: tuple[int, ...]
    """Offered pages whose tokens the index holds in other pages; the caller still owns them."""
    replaced: tuple[int, ...]
    """Pages in slower tiers whose tokens are now in offered pages; the caller owns them."""
