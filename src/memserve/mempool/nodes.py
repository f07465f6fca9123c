"""What the prefix index is made of. Private to :mod:`memserve.mempool`."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from memserve.mempool.addresses import tier_of


@attrs.define(eq=False)
class Node:
    """A run of whole pages below ``parent``, all in one tier."""

    key: bytes
    """Packed tokens; ``len(pages)`` whole pages of them."""
    pages: list[int]
    """Slots (see :mod:`memserve.mempool.addresses`)."""
    parent: Node | None
    """None for a root, and for a node that left the tree."""
    tier: int = 0
    id: int = 0
    """Its entry number in IndexEvents; 0 for roots."""
    children: dict[bytes, Node] = attrs.field(factory=dict)
    """By the bytes of each child's first page."""
    kin: int = 0
    """Children in the same tier that are not on their way out of it. A node with none goes first."""
    pins: int = 0
    """How many pins end here or below."""
    last_use: int = 0
    """The tree's use counter at the last touch; never more than the parent's."""
    ticket: int = 0
    """Of its entry in its tier's :class:`~memserve.mempool.lru.Lru`; 0 when it has none."""
    moving: Move | None = None
    """Its pages' way to another tier; they stay valid, and here, until it is over."""

    @property
    def leaving(self) -> bool:
        """Whether its pages are on their way to a slower tier."""
        return self.moving is not None and not self.moving.inbound

    def path(self) -> Iterator[Node]:
        """This node and everything above it, the root last."""
        above: Node | None = self
        while above is not None:
            yield above
            above = above.parent

    def walk(self) -> Iterator[Node]:
        """This node and everything below it, parents before their children."""
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
    """A claim on one prefix: none of its pages is evicted or moved until :meth:`PromptTree.unpin`.

    Owned by one lease.
    """

    node: Node
    tokens: int
    """Length of the prefix, always whole pages."""


@attrs.define(eq=False)
class Job:
    """One Copy that the shell has been asked for: the moves that it completes."""

    id: int
    moves: list[Move] = attrs.field(factory=list)


@attrs.define(eq=False)
class Move:
    """One node's pages on their way to another tier.

    ``target`` belongs to the move until the copy is over: nobody else may write there before.
    """

    job: Job
    node: Node | None
    """None once nobody wants the result: then ``target`` comes free when the copy is over."""
    source: list[int]
    target: list[int]

    @property
    def inbound(self) -> bool:
        """Whether it goes to a faster tier."""
        return tier_of(self.target[0]) < tier_of(self.source[0])

    def split(self, node: Node, at: int) -> Move:
        """Let ``node``, made by a split, have the first ``at`` pages of this move; its own is returned."""
        front = Move(self.job, node, self.source[:at], self.target[:at])
        self.source, self.target = self.source[at:], self.target[at:]
        self.job.moves.append(front)
        return front

    def abandon(self) -> None:
        """Nobody wants the result any more."""
        if self.node is not None:
            self.node.moving = None
            self.node = None


@attrs.frozen
class CachedPrefix:
    """The longest cached prefix of a prompt, as it was at the moment of asking."""

    tokens: int
    pages: tuple[int, ...]
    """Slots."""


@attrs.frozen
class Insertion:
    """What :meth:`PromptTree.insert` found. The index owns the offered pages now, but for ``duplicates``."""

    already_tokens: int
    duplicates: tuple[int, ...]
    """The offered pages whose tokens the index holds in other pages; the caller still owns them."""
    replaced: tuple[int, ...]
    """Pages of slower tiers whose tokens are in offered pages now; the caller owns them."""
