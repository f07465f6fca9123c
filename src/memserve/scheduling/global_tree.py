"""The global prompt tree: which shards hold which prefixes, and in which tier.

It is one merged radix tree for all shards. Keys are packed tokens in whole pages, as in a shard's own tree
(:mod:`memserve.mempool.prompt_tree`). Each node names the shards that hold all of it. So a prompt is matched
once, whatever the number of shards, and a prefix that a thousand shards hold is stored once. The tree serves
hints only: the shard matches again when it grants a lease.

Two rules hold the structure together:

* **Split keeps the old object as the suffix.** References to the end of a run stay valid.

* **A node at which no run ends, with a single child held by the same shards in the same tiers, is merged with
  it.** A conversation that grows by a page at a time stays one node, also where a second shard follows the
  first page by page.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from memserve.identity import ActorId
from memserve.tokens import TOKEN_BYTES, common_pages


@attrs.define(eq=False)
class Node:
    """A run of whole pages below ``parent``."""

    key: bytes
    parent: Node | None
    """None for a root, and for a node that left the tree."""
    children: dict[bytes, Node] = attrs.field(factory=dict)
    """Children by the bytes of their first page."""
    holders: dict[ActorId, float] = attrs.field(factory=dict)
    """The shards that hold all of this node, and in which tier (a TtlIndex stores another figure, <= 0)."""
    ends: int = 0
    """Number of shards' runs that end here: they would lose their end if this node were merged."""


@attrs.define(eq=False)
class Root(Node):
    """The empty prefix of one scope."""

    scope: str = ""


@attrs.frozen
class ShardHit:
    """What one shard holds of a prompt."""

    tokens: int = 0
    """Tokens held from position 0, in whole pages."""
    slow_tokens: int = 0
    """The part of ``tokens`` that must be brought into the device tier first."""


NOTHING = ShardHit()


@attrs.frozen
class PromptPath:
    """A prompt's path down the tree. Valid until the tree changes."""

    path: tuple[tuple[Node, int], ...] = ()
    """Each node and how many of its tokens the prompt shares, from the root down."""
    page_tokens: int = 16
    loss_share: float = 0.0
    """The chance that a page evicted now will be missed (see :mod:`memserve.scheduling.losses`)."""

    def held(self, shard: ActorId) -> ShardHit:
        """What ``shard`` holds of the prompt."""
        tokens = slow = 0
        for node, shared in self.path:
            tier = node.holders.get(shard)
            if tier is None:
                break
            tokens += shared
            if tier > 0:
                slow += shared
        return ShardHit(tokens, slow) if tokens else NOTHING

    def best(self, limit: int) -> list[ActorId]:
        """Up to ``limit`` shards, those that hold the most first."""
        found: dict[ActorId, None] = {}
        for node, _ in reversed(self.path):
            for shard in node.holders:
                found[shard] = None
                if len(found) == limit:
                    return list(found)
        return list(found)

    @property
    def tokens(self) -> int:
        """Tokens that the shard with the longest match holds."""
        tokens = 0
        for _, shared in self.path:
            tokens += shared
        return tokens


@attrs.define
class GlobalTree:
    """See the module's docstring. ``page_tokens`` must be the shards'."""

    page_tokens: int = 16
    roots: dict[str, Root] = attrs.field(factory=dict, init=False)
    pages: dict[ActorId, int] = attrs.field(factory=dict, init=False)
    """Pages held, by shard; a shard without pages is not a key."""
    width: int = attrs.field(init=False)
    """Bytes of one page's tokens."""

    def __attrs_post_init__(self) -> None:
        self.width = self.page_tokens * TOKEN_BYTES

    def match(self, scope: str, tokens: bytes, loss_share: float = 0.0) -> PromptPath:
        """The longest prefix of packed ``tokens`` that any shard holds."""
        node: Node | None = self.roots.get(scope)
        path = []
        at, width = 0, self.width
        while node is not None and (child := node.children.get(tokens[at : at + width])) is not None:
            if not tokens.startswith(child.key, at):
                path.append((child, common_pages(child.key, tokens, at, width) // TOKEN_BYTES))
                break
            path.append((child, len(child.key) // TOKEN_BYTES))
            at += len(child.key)
            node = child
        return PromptPath(tuple(path), self.page_tokens, loss_share)

    def prefix(self, node: Node) -> tuple[bytes, str]:
        """The tokens before a node, and their scope."""
        keys, above = [], node.parent
        while above is not None and above.parent is not None:
            keys.append(above.key)
            above = above.parent
        return b"".join(reversed(keys)), above.scope if isinstance(above, Root) else ""

    # ---- holdings -------------------------------------------------------------------------------------------

    def root(self, scope: str) -> Root:
        """The root for prefixes of ``scope``; created if missing."""
        root = self.roots.get(scope)
        if root is None:
            root = self.roots[scope] = Root(b"", None, scope=scope)
        return root

    def hold(self, node: Node, tokens: bytes, shard: ActorId, tier: float) -> list[Node]:
        """Record that ``shard`` holds whole pages of ``tokens`` behind ``node``.

        The result is the nodes that contain them now, in order.
        """
        at, width = 0, self.width
        held = []
        while at < len(tokens):
            child = node.children.get(tokens[at : at + width])
            if child is None:
                child = node.children[tokens[at : at + width]] = Node(tokens[at:], node)
            elif not tokens.startswith(child.key, at):
                child = self.split(child, common_pages(child.key, tokens, at, width))
            self.mark(child, shard, tier)
            held.append(child)
            at += len(child.key)
            node = child
        return held

    def mark(self, node: Node, shard: ActorId, tier: float) -> None:
        """Record that ``shard`` holds all of ``node``, in ``tier``."""
        if shard not in node.holders:
            self.pages[shard] = self.pages.get(shard, 0) + len(node.key) // self.width
        node.holders[shard] = tier

    def unmark(self, node: Node, shard: ActorId) -> None:
        """Record that ``shard`` holds nothing of ``node`` any more. Call :meth:`tidy` for it afterwards."""
        if node.holders.pop(shard, None) is not None:
            left = self.pages[shard] - len(node.key) // self.width
            if left:
                self.pages[shard] = left
            else:
                del self.pages[shard]

    def tidy(self, node: Node) -> None:
        """Remove ``node`` if nothing needs it, then tidy its parent; or merge it into its only child."""
        parent = node.parent
        if isinstance(node, Root):
            if not node.children:
                self.roots.pop(node.scope, None)
        elif parent is None or node.ends:
            return
        elif not node.children:
            if not node.holders:
                del parent.children[node.key[: self.width]]
                node.parent = None
                self.tidy(parent)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            if child.holders == node.holders:
                child.key, child.parent, node.parent = node.key + child.key, parent, None
                parent.children[child.key[: self.width]] = child

    def split(self, node: Node, at: int) -> Node:
        """Move the first ``at`` bytes of ``node``, whole pages, into a new parent, and return that."""
        assert 0 < at < len(node.key) and node.parent is not None, (
            f"cannot split {len(node.key)} bytes at {at}"
        )
        front = Node(node.key[:at], node.parent, holders=dict(node.holders))
        node.parent.children[front.key[: self.width]] = front
        node.key, node.parent = node.key[at:], front
        front.children[node.key[: self.width]] = node
        return front

    # ---- for tests and gauges -------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before their children."""
        stack: list[Node] = list(self.roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack += node.children.values()

    def check(self) -> None:
        """Assert every invariant."""
        pages: dict[ActorId, int] = {}
        for node in self.nodes():
            parent = node.parent
            assert parent is not None and parent.children[node.key[: self.width]] is node
            assert node.key and len(node.key) % self.width == 0
            assert node.holders or node.children or node.ends, "a node without holders, children and ends"
            assert isinstance(parent, Root) or parent.holders.keys() >= node.holders.keys(), (
                "a hole in a prefix"
            )
            for shard in node.holders:
                pages[shard] = pages.get(shard, 0) + len(node.key) // self.width
        assert pages == self.pages, (pages, self.pages)
