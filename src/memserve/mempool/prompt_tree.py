"""The prefix index of one shard: a radix tree from token sequences to the pages that hold their KV.

Keys are packed int32 tokens (:mod:`memserve.tokens`) in whole pages; a child is found by the bytes of its
first page, and a node's key is compared with one ``memcmp``, so no step of a look-up is a Python loop over
tokens. Each scope has a root of its own: one tenant's look-up cannot reach another's nodes. A node's pages lie
in one tier; moving a part of them splits it.

Four rules hold the structure together:

* **Split keeps the old object as the suffix.** A new parent takes the front half and a copy of the pin count.
  Pins that were given out end at the old object, so they go on naming the same tokens.
* **A pin covers its whole path.** Whatever is above a pinned node is pinned too, so below an unpinned node
  nothing is pinned: it can go with all that continues it, and ``evictable`` needs no walk.
* **A leaf that only the inserting pin holds grows in place.** A conversation that retires a page at a time
  stays one node however long it gets. Eviction takes the tail of a leaf, so long nodes do not make it coarse.
* **What is pinned stays where it is**, but for pages that are brought in for those who pin them.

With ``events`` on, every change is noted as an :class:`~memserve.messages.IndexEvent`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.lru import Lru
from memserve.mempool.nodes import CachedPrefix, Insertion, Node, Pin, Root
from memserve.pool_messages import IndexEvent
from memserve.tokens import TOKEN_BYTES


@attrs.define
class PromptTree:
    """Token prefixes to pages, with pins and least-recently-used eviction. A counter of its own is its clock."""

    page_tokens: int
    events: list[IndexEvent] | None = None
    """Changes since the owner took them last; None when nobody wants them."""
    indexed: list[int] = attrs.field(factory=lambda: [0] * len(Tier), init=False)
    """Pages in the index by tier, pinned or not."""
    evictable: list[int] = attrs.field(factory=lambda: [0] * len(Tier), init=False)
    """Those of them that no pin covers: :meth:`evict` can free every one."""
    roots: dict[str, Root] = attrs.field(factory=dict, init=False)
    pins: set[Pin] = attrs.field(factory=set, init=False)
    """Those that have not ended."""
    lru: tuple[Lru, ...] = attrs.field(factory=lambda: tuple(Lru(tier) for tier in Tier), init=False)
    page_bytes: int = attrs.field(init=False)
    """Bytes of a page's tokens."""
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

        Splits a node that matches in part.
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
        """End a pin. Its pages stay in the index, evictable once no other pin covers them."""
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

        Pages whose tokens are in the index already are handed back as duplicates, unless they are in a faster tier
        than what is there and nobody pins that: then they take its place. ``pages`` must not be in the index.
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
        """Take unpinned pages out until ``n`` of ``tier`` are, from the tails of the least recently used leaves.

        What continues a page goes with it, in whatever tier it is. The caller owns the pages returned.
        """
        freed: list[int] = []
        goal = self.indexed[tier] - n
        while self.indexed[tier] > goal and (leaf := self.lru[tier].pop()) is not None:
            if leaf.pins or leaf.kin:
                continue
            spare = len(leaf.pages) - (self.indexed[tier] - goal)
            if spare > 0:
                self.split(leaf, spare * self.page_bytes)
            freed += self.fell(leaf)
        return freed

    def coldest(self, n: int, tier: int) -> list[Node]:
        """Unpinned nodes of ``tier`` with ``n`` pages in all, or fewer, to be moved out; the least recently used.

        The caller gives each of them a move by :meth:`depart` before it calls anything else.
        """
        chosen: list[Node] = []
        passed: list[Node] = []
        while n > 0 and (leaf := self.lru[tier].pop()) is not None:
            if leaf.pins or leaf.kin:
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
        """``node.moving`` was set to a way out: what it continues may follow it now."""
        parent = node.parent
        if parent is not None and parent.tier == node.tier:
            parent.kin -= 1
            self._settle(parent)

    def stay(self, node: Node) -> None:
        """Call off the way out of ``node``."""
        assert node.moving is not None, "a node that does not move stays"
        node.moving.abandon()
        if node.parent is not None and node.parent.tier == node.tier:
            node.parent.kin += 1

    def arrive(self, node: Node, pages: list[int]) -> list[int]:
        """The pages of ``node`` are in other slots now, all of one tier; the caller owns the old ones."""
        old, parent = node.pages, node.parent
        assert parent is not None, "a root has no pages to move"
        if parent.tier == node.tier and not node.leaving:
            parent.kin -= 1
        if node.moving is not None:
            node.moving.abandon()
        self.lru[node.tier].forget(node)
        self._account(node, -len(old))
        node.pages, node.tier = pages, tier_of(pages[0])
        self._account(node, len(pages))
        node.kin = sum(child.tier == node.tier and not child.leaving for child in node.children.values())
        parent.kin += parent.tier == node.tier
        self._settle(node)
        self._settle(parent)
        self._note("moved", node, tier=node.tier)
        return old

    def delete(self, scope: str, tokens: bytes) -> list[int]:
        """Take a prompt, and all that continues it, out of the index. The caller owns the pages returned.

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
            beyond = []  # the prompt was cached in part; what hangs below that part are other prompts
        freed: list[int] = []
        for doomed in reversed(beyond):  # children before their parents
            freed += self._drop(doomed)
        while node.parent is not None and not node.pins and not node.children:
            parent = node.parent
            freed += self._drop(node)
            node = parent
        return freed

    def fell(self, node: Node) -> list[int]:
        """Take an unpinned node and all that continues it out of the index. The caller owns the pages returned."""
        assert not node.pins, "a pinned node is felled"
        return [page for doomed in reversed(list(node.walk())) for page in self._drop(doomed)]

    # ---- the accounts --------------------------------------------------------------------------------------

    @property
    def pages_total(self) -> int:
        """Pages in the index, of all tiers."""
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
        """Follow ``tokens`` from the end of ``node``: (last node, bytes of its key, bytes of tokens)."""
        width = self.page_bytes
        at = 0
        while (child := node.children.get(tokens[at : at + width])) is not None:
            node = child
            if not tokens.startswith(node.key, at):
                inside = self._common(node.key, tokens, at)
                return node, inside, at + inside
            at += len(node.key)
        return node, len(node.key), at

    def _common(self, key: bytes, tokens: bytes, at: int) -> int:
        """Bytes of whole pages that ``key`` shares with ``tokens[at:]``, given that they share the first.

        Bisection over slices compared in C: at most twice the differing part is read, however the two differ.
        """
        width = self.page_bytes
        low, high = 1, min(len(key), len(tokens) - at) // width
        while low < high:
            middle = (low + high + 1) // 2
            if key[low * width : middle * width] == tokens[at + low * width : at + middle * width]:
                low = middle
            else:
                high = middle - 1
        return low * width

    def split(self, node: Node, at: int) -> Node:
        """Give the first ``at`` bytes of ``node``, whole pages, to a new parent, and return that.

        ``node`` stays the suffix: pins end there.
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
        front.kin = int(not node.leaving)
        self._note("split", node, parent=front.id, pages=at // width)
        self._settle(front)
        return front

    def _extend(self, node: Node, tokens: bytes, pages: Sequence[int]) -> Node:
        """Put new pages after ``node``, which the inserting pin holds; the last node they are in, held too."""
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
        """Put new pages of one tier after ``node``."""
        self.indexed[tier] += len(pages)
        alone = node.pins == 1 and not node.children and node.moving is None
        if node.parent is not None and alone and node.tier == tier:
            node.key += tokens
            node.pages.extend(pages)
            self._note("stored", node, tokens=tokens, tier=tier)
            return node
        child = Node(tokens, list(pages), node, tier, self._entry(), pins=1)
        node.children[tokens[: self.page_bytes]] = child
        node.kin += node.tier == tier
        self._note("stored", child, parent=node.id, scope=self._scope(node), tokens=tokens, tier=tier)
        return child

    def _improve(self, node: Node, until: Node, pages: Sequence[int]) -> tuple[list[int], list[int]]:
        """Offer ``pages`` to the nodes from below ``until`` to ``node``: (duplicates, pages that they replace)."""
        duplicates: list[int] = []
        replaced: list[int] = []
        end = len(pages)
        while node is not until:
            tier, first = tier_of(pages[end - 1]), end - len(node.pages)
            start = end - 1
            while start > first and tier_of(pages[start - 1]) == tier:
                start -= 1
            if start > first:  # offered in several tiers: one node each
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
        """The pages of the whole path, the root's end first."""
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
        """Note that ``node`` may have become idle: queue it if it can go next, forget an empty root."""
        if node.pins or node.ticket:
            return
        if node.parent is not None:
            if not node.kin:
                self.lru[node.tier].push(node)
        elif isinstance(node, Root) and not node.children:
            self.roots.pop(node.scope, None)

    def _drop(self, node: Node) -> list[int]:
        """Take ``node`` out of the tree, unless it is pinned or others hang below it; its pages, the caller's now."""
        parent = node.parent
        if parent is None or node.pins or node.children:
            return []
        del parent.children[node.key[: self.page_bytes]]
        if parent.tier == node.tier and not node.leaving:
            parent.kin -= 1
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
