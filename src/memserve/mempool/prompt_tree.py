"""The prefix index of one shard: a radix tree from token sequences to the pages that hold their KV.

Keys are packed int32 tokens (:mod:`memserve.tokens`) in whole pages. A child is found by the bytes of its
first page, and a node's key is compared with one ``memcmp``, so no step of a look-up is a Python loop over
tokens. Each scope has its own root: one tenant's look-up cannot reach another's nodes. A node's pages lie in
one tier; moving only some of them splits the node.

Four rules hold the structure together:

* **A split keeps the old object as the suffix.** A new parent takes the front and a copy of the pin count.
  Existing pins end at the old object, so they still name the same tokens.
* **A pin covers its whole path.** Every node above a pinned node is pinned too, so below an unpinned node
  nothing is pinned: it can go with all that continues it, and ``evictable`` needs no walk.
* **A leaf that only the inserting pin holds grows in place.** A conversation that retires page by page stays
  one node however long it gets. Eviction takes the tail of a leaf, so long nodes do not make it coarse.
* **Pinned pages stay where they are**, except those that are brought in for the leases that pin them.

With ``events`` on, every change is recorded as an :class:`~memserve.pool_messages.IndexEvent`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.lru import Lru
from memserve.mempool.nodes import CachedPrefix, Insertion, Node, Pin, Root
from memserve.pool_messages import IndexEvent
from memserve.tokens import TOKEN_BYTES, common_pages


@attrs.define
class PromptTree:
    """Maps token prefixes to pages, with pins and LRU eviction. Its clock is a counter of its own."""

    page_tokens: int
    events: list[IndexEvent] | None = None
    """Changes since the owner last took them; None when they are not recorded."""
    indexed: list[int] = attrs.field(factory=lambda: [0] * len(Tier), init=False)
    """Number of pages in the index by tier, pinned or not."""
    evictable: list[int] = attrs.field(factory=lambda: [0] * len(Tier), init=False)
    """Number of indexed pages by tier that no pin covers: :meth:`evict` can free every one."""
    roots: dict[str, Root] = attrs.field(factory=dict, init=False)
    pins: set[Pin] = attrs.field(factory=set, init=False)
    """Pins that have not ended."""
    lru: tuple[Lru, ...] = attrs.field(factory=lambda: tuple(Lru(tier) for tier in Tier), init=False)
    page_bytes: int = attrs.field(init=False)
    """Bytes of the tokens of one page."""
    _uses: int = attrs.field(default=0, init=False)
    _entries: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        assert self.page_tokens >= 1, f"page_tokens must be at least 1, is {self.page_tokens}"
        self.page_bytes = self.page_tokens * TOKEN_BYTES

    # ---- reading -------------------------------------------------------------------------------------------

    def match(self, scope: str, tokens: bytes) -> CachedPrefix:
        """The longest cached prefix of ``tokens`` in whole pages. Counts as a use; changes nothing else."""
        root = self.roots.get(scope)
        if root is None:
            return CachedPrefix(0, ())
        node, inside, at = self.descend(root, tokens)
        self._touch(node)
        pages = self._pages_to(node)
        spare = (len(node.key) - inside) // self.page_bytes
        return CachedPrefix(at // TOKEN_BYTES, tuple(pages[: len(pages) - spare]))

    def pages_of(self, pin: Pin) -> list[int]:
        """The slots of a pinned prefix, in token order."""
        return self._pages_to(pin.node)

    def spells(self, pin: Pin, start: int, tokens: bytes) -> bool:
        """Whether the pinned prefix has exactly ``tokens`` from position ``start`` on."""
        parts: list[bytes] = []
        node, begin, position = pin.node, start * TOKEN_BYTES, pin.tokens * TOKEN_BYTES
        while position > begin and node.parent is not None:
            parts.append(node.key)
            position -= len(node.key)
            node = node.parent
        return b"".join(reversed(parts)).startswith(tokens, begin - position)

    # ---- pins and insertion --------------------------------------------------------------------------------

    def pin(self, scope: str, tokens: bytes) -> Pin:
        """Match ``tokens`` and pin what was found, which may be nothing.

        Splits a node that matches only in part.
        """
        root = self.roots.get(scope)
        if root is None:
            root = self.roots[scope] = Root(key=b"", pages=[], parent=None, scope=scope)
        node, inside, at = self.descend(root, tokens)
        if inside < len(node.key):
            node = self.split(node, inside)
        self._hold(node, until=None)
        self._touch(node)
        pin = Pin(node, at // TOKEN_BYTES)
        self.pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """End a pin. Its pages stay in the index, and are evictable once no other pin covers them."""
        assert pin in self.pins, f"a pin of {pin.tokens} tokens was ended twice"
        self.pins.remove(pin)
        self._touch(pin.node)
        for node in pin.node.path():
            node.pins -= 1
            if not node.pins:
                self.evictable[node.tier] += len(node.pages)
                self._settle(node)

    def insert(self, pin: Pin, tokens: bytes, pages: Sequence[int]) -> Insertion:
        """Add ``tokens``, in whole pages, right after the pinned prefix, and move the pin to their end.

        Pages whose tokens the index has already are returned as duplicates, or replace the indexed ones if
        these are unpinned and in a slower tier. ``pages`` must not be in the index.
        """
        assert pin in self.pins, "insert with a pin that has ended"
        assert len(tokens) == len(pages) * self.page_bytes, (
            f"{len(tokens)} token bytes do not fill {len(pages)} pages"
        )
        node, inside, at = self.descend(pin.node, tokens)
        if inside < len(node.key):
            node = self.split(node, inside)
        already = at // self.page_bytes
        duplicates, replaced = self._improve(node, pin.node, pages[:already]) if already else ([], [])
        self._hold(node, until=pin.node)
        pin.node = node
        pin.tokens += len(tokens) // TOKEN_BYTES
        if at < len(tokens):
            pin.node = self._extend(node, tokens[at:], pages[already:])
        self._touch(pin.node)
        return Insertion(at // TOKEN_BYTES, tuple(duplicates), tuple(replaced))

    # ---- taking pages out ----------------------------------------------------------------------------------

    def evict(self, n: int, tier: int = Tier.DEVICE) -> list[int]:
        """Take up to ``n`` unpinned pages of ``tier`` out, from the tails of the least recently used leaves.

        Pages that continue a page go with it, whatever their tier. The caller owns the returned pages.
        """
        freed: list[int] = []
        goal = self.indexed[tier] - n
        while self.indexed[tier] > goal and (leaf := self.lru[tier].pop()) is not None:
            if leaf.pins or leaf.staying_children:
                continue
            spare = len(leaf.pages) - (self.indexed[tier] - goal)
            if spare > 0:
                self.split(leaf, spare * self.page_bytes)
            freed += self.remove_subtree(leaf)
        return freed

    def coldest(self, n: int, tier: int) -> list[Node]:
        """The least recently used unpinned nodes of ``tier``, at most ``n`` pages in all, to be moved out.

        The caller sets a move on each of them and calls :meth:`depart` before any other method.
        """
        chosen: list[Node] = []
        passed: list[Node] = []
        while n > 0 and (leaf := self.lru[tier].pop()) is not None:
            if leaf.pins or leaf.staying_children:
                continue
            if leaf.moving is not None:
                passed.append(leaf)
                continue
            if len(leaf.pages) > n:
                self.split(leaf, (len(leaf.pages) - n) * self.page_bytes)
            n -= len(leaf.pages)
            chosen.append(leaf)
        for leaf in (*passed, *chosen):
            self._settle(leaf)
        return chosen

    def depart(self, node: Node) -> None:
        """Update the parent of a node whose ``moving`` was set to a way out: it may be able to follow now."""
        parent = node.parent
        if parent is not None and parent.tier == node.tier:
            parent.staying_children -= 1
            self._settle(parent)

    def stay(self, node: Node) -> None:
        """Cancel the move of ``node`` out of its tier."""
        assert node.moving is not None, "a node that does not move stays"
        node.moving.abandon()
        if node.parent is not None and node.parent.tier == node.tier:
            node.parent.staying_children += 1

    def arrive(self, node: Node, pages: list[int]) -> list[int]:
        """Record that ``node`` is in ``pages``, of one tier; returns its old pages, which the caller owns."""
        old, parent = node.pages, node.parent
        assert parent is not None, "a root has no pages to move"
        if parent.tier == node.tier and not node.leaving:
            parent.staying_children -= 1
        if node.moving is not None:
            node.moving.abandon()
        self.lru[node.tier].forget(node)
        self._account(node, -len(old))
        node.pages, node.tier = pages, tier_of(pages[0])
        self._account(node, len(pages))
        node.staying_children = sum(
            child.tier == node.tier and not child.leaving for child in node.children.values()
        )
        parent.staying_children += parent.tier == node.tier
        self._settle(node)
        self._settle(parent)
        self._note("moved", node, tier=node.tier)
        return old

    def delete(self, scope: str, tokens: bytes) -> list[int]:
        """Take a prompt and all that continues it out of the index. The caller owns the returned pages.

        Pinned pages stay, and so does the part of the prompt's prefix that other prompts share. A tail of
        ``tokens`` that fills no page, or that was never cached, is ignored.
        """
        root = self.roots.get(scope)
        if root is None:
            return []
        node, inside, at = self.descend(root, tokens)
        whole = len(tokens) // self.page_bytes * self.page_bytes
        if whole == 0 or (at < whole and inside < len(node.key)):
            return []
        if at == whole:
            node = self.split(node, inside) if inside < len(node.key) else node
            beyond = list(node.walk())[1:]
        else:
            beyond = []  # the prompt is cached only in part: below that part there are only other prompts
        freed: list[int] = []
        for below in reversed(beyond):  # children before their parents
            freed += self._drop(below)
        while node.parent is not None and not node.pins and not node.children:
            parent = node.parent
            freed += self._drop(node)
            node = parent
        return freed

    def remove_subtree(self, node: Node) -> list[int]:
        """Take out an unpinned node and all that continues it; returns the pages, which the caller owns."""
        assert not node.pins, "a pinned node is taken out"
        return [page for one in reversed(list(node.walk())) for page in self._drop(one)]

    # ---- the accounts --------------------------------------------------------------------------------------

    @property
    def pages_total(self) -> int:
        """Number of pages in the index, over all tiers."""
        return sum(self.indexed)

    def nodes(self) -> Iterator[Node]:
        """Every node, parents before their children."""
        for root in self.roots.values():
            yield from root.walk()

    def all_pages(self) -> list[int]:
        """Every slot in the index, in no particular order."""
        return [page for node in self.nodes() for page in node.pages]

    # ---- inside --------------------------------------------------------------------------------------------

    def descend(self, node: Node, tokens: bytes) -> tuple[Node, int, int]:
        """Follow ``tokens`` from the end of ``node``: (last node, matched bytes of its key, and of them)."""
        width = self.page_bytes
        at = 0
        while (child := node.children.get(tokens[at : at + width])) is not None:
            node = child
            if not tokens.startswith(node.key, at):
                inside = common_pages(node.key, tokens, at, width)
                return node, inside, at + inside
            at += len(node.key)
        return node, len(node.key), at

    def split(self, node: Node, at: int) -> Node:
        """Give the first ``at`` bytes of ``node``, whole pages, to a new parent, which is returned.

        ``node`` stays the suffix, because pins end there.
        """
        width = self.page_bytes
        parent = node.parent
        assert parent is not None, "a root cannot be split"
        assert 0 < at < len(node.key), f"cannot split a key of {len(node.key)} bytes at {at}"
        front = Node(node.key[:at], node.pages[: at // width], parent, node.tier, self._entry())
        front.pins, front.last_use = node.pins, node.last_use
        parent.children[front.key[:width]] = front
        node.key, node.pages, node.parent = node.key[at:], node.pages[at // width :], front
        front.children[node.key[:width]] = node
        if node.moving is not None:
            front.moving = node.moving.split(front, at // width)
        front.staying_children = int(not node.leaving)
        self._note("split", node, parent=front.id, pages=at // width)
        self._settle(front)
        return front

    def _extend(self, node: Node, tokens: bytes, pages: Sequence[int]) -> Node:
        """Append new pages to ``node``, which the inserting pin holds; returns the last node, held too."""
        start = 0
        while start < len(pages):
            stop, tier = start + 1, tier_of(pages[start])
            while stop < len(pages) and tier_of(pages[stop]) == tier:
                stop += 1
            key = tokens[start * self.page_bytes : stop * self.page_bytes]
            node = self._grow(node, key, pages[start:stop], tier)
            start = stop
        return node

    def _grow(self, node: Node, tokens: bytes, pages: Sequence[int], tier: int) -> Node:
        """Append new pages of one tier to ``node``; returns the node that holds them."""
        self.indexed[tier] += len(pages)
        alone = node.pins == 1 and not node.children and node.moving is None
        if node.parent is not None and alone and node.tier == tier:
            node.key += tokens
            node.pages.extend(pages)
            self._note("stored", node, tokens=tokens, tier=tier)
            return node
        child = Node(tokens, list(pages), node, tier, self._entry(), pins=1)
        node.children[tokens[: self.page_bytes]] = child
        node.staying_children += node.tier == tier
        self._note("stored", child, parent=node.id, scope=self._scope(node), tokens=tokens, tier=tier)
        return child

    def _improve(self, node: Node, until: Node, pages: Sequence[int]) -> tuple[list[int], list[int]]:
        """Offer ``pages`` to the nodes from below ``until`` to ``node``: (duplicates, pages they replace)."""
        duplicates: list[int] = []
        replaced: list[int] = []
        end = len(pages)
        while node is not until:
            tier, first = tier_of(pages[end - 1]), end - len(node.pages)
            start = end - 1
            while start > first and tier_of(pages[start - 1]) == tier:
                start -= 1
            if start > first:  # offered pages in several tiers: one node each
                self.split(node, (start - first) * self.page_bytes)
            offered = list(pages[start:end])
            end = start
            free = not node.pins or (node.moving is not None and node.moving.inbound)
            if free and tier < node.tier:
                replaced += self.arrive(node, offered)
            else:
                duplicates = offered + duplicates
            assert node.parent is not None, "a pin's node is not above what was found below it"
            node = node.parent
        return duplicates, replaced

    def _hold(self, node: Node, until: Node | None) -> None:
        """Count one more pin on the path from ``node`` up to ``until``, which is not counted."""
        above: Node | None = node
        while above is not None and above is not until:
            if not above.pins:
                self.evictable[above.tier] -= len(above.pages)
                if above.leaving:
                    self.stay(above)
            above.pins += 1
            above = above.parent

    def _touch(self, node: Node) -> None:
        self._uses += 1
        above: Node | None = node
        while above is not None:
            above.last_use = self._uses
            above = above.parent

    def _pages_to(self, node: Node) -> list[int]:
        """The pages of the whole path from the root to ``node``, in token order."""
        runs = []
        above: Node | None = node
        while above is not None:
            runs.append(above.pages)
            above = above.parent
        pages: list[int] = []
        for run in reversed(runs):
            pages += run
        return pages

    def _account(self, node: Node, pages: int) -> None:
        self.indexed[node.tier] += pages
        if not node.pins:
            self.evictable[node.tier] += pages

    def _settle(self, node: Node) -> None:
        """Queue ``node`` if it is idle and can leave next; forget it if it is an empty root."""
        if node.pins or node.ticket:
            return
        if node.parent is not None:
            if not node.staying_children:
                self.lru[node.tier].push(node)
        elif isinstance(node, Root) and not node.children:
            self.roots.pop(node.scope, None)

    def _drop(self, node: Node) -> list[int]:
        """Take out ``node`` unless it is pinned or has children; returns its pages, which the caller owns."""
        parent = node.parent
        if parent is None or node.pins or node.children:
            return []
        del parent.children[node.key[: self.page_bytes]]
        if parent.tier == node.tier and not node.leaving:
            parent.staying_children -= 1
        node.parent = None
        if node.moving is not None:
            node.moving.abandon()
        self.lru[node.tier].forget(node)
        self._account(node, -len(node.pages))
        self._note("removed", node)
        self._settle(parent)
        return node.pages

    # ---- events --------------------------------------------------------------------------------------------

    def snapshot(self) -> Iterator[IndexEvent]:
        """The whole index as events, each entry after the one that it continues."""
        for root in self.roots.values():
            for node in root.walk():
                if node.parent is not None:
                    yield IndexEvent("stored", node.id, node.parent.id, root.scope, node.key, node.tier)

    def _entry(self) -> int:
        self._entries += 1
        return self._entries

    def _note(
        self,
        kind: str,
        node: Node,
        parent: int = 0,
        scope: str = "",
        tokens: bytes = b"",
        tier: int = 0,
        pages: int = 0,
    ) -> None:
        if self.events is not None:
            self.events.append(IndexEvent(kind, node.id, parent, scope, tokens, tier, pages))

    def _scope(self, node: Node) -> str:
        if node.parent is not None:
            return ""
        assert isinstance(node, Root), "a node left the tree"
        return node.scope
