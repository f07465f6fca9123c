"""The prefix index of one shard: a radix tree from token sequences to the pages that hold their KV.

Keys are packed int32 tokens (:mod:`memserve.tokens`) in whole pages; a child is found by the bytes of its
first page, and a node's key is compared with one ``memcmp``, so no step of a look-up is a Python loop over
tokens. Each scope has a root of its own: one tenant's look-up cannot reach another's nodes.

Three rules hold the structure together:

* **Split keeps the old object as the suffix.** A new parent takes the front half and a copy of the pin count.
  Pins that were given out end at the old object, so they go on naming the same tokens.
* **A pin covers its whole path.** Whatever is above a pinned node is pinned too, so the unpinned pages are
  exactly those that eviction can reach from the leaves, and ``evictable_pages`` needs no walk.
* **A leaf that only the inserting pin holds grows in place.** A conversation that retires a page at a time
  stays one node however long it gets. Eviction trims leaves from the tail, so long nodes do not make it
  coarse.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import attrs

from memserve.tokens import TOKEN_BYTES


@attrs.define(eq=False)
class Node:
    """A run of whole pages below ``parent``. Private to this module."""

    key: bytes
    """Packed tokens; ``len(pages)`` whole pages of them."""
    pages: list[int]
    parent: Node | None
    """None for a root, and for a node that left the tree."""
    children: dict[bytes, Node] = attrs.field(factory=dict)
    """By the bytes of each child's first page."""
    pins: int = 0
    """How many pins end here or below."""
    last_use: int = 0
    """The tree's use counter at the last touch; never more than the parent's."""
    queued: bool = False
    """Whether an entry of the eviction heap names this node. At most one does."""


@attrs.define(eq=False)
class Root(Node):
    """The empty prefix of one scope."""

    scope: str = ""


@attrs.define(eq=False)
class Pin:
    """A claim on one prefix: none of its pages is evicted until :meth:`PromptTree.unpin`.

    Owned by one lease.
    """

    _node: Node
    tokens: int
    """Length of the prefix, always whole pages."""


@attrs.frozen
class Match:
    """The longest cached prefix of a prompt, as it was at the moment of asking."""

    tokens: int
    pages: tuple[int, ...]


@attrs.frozen
class Inserted:
    """What :meth:`PromptTree.insert` found.

    The caller still owns ``duplicates``; the index owns the other pages now.
    """

    already_tokens: int
    duplicates: tuple[int, ...]
    """The offered pages whose tokens the index holds in other pages; always the first of those offered."""


@attrs.define
class PromptTree:
    """Token prefixes to pages, with pins and least-recently-used eviction.

    Uses a counter of its own as clock.
    """

    page_tokens: int
    pages_total: int = attrs.field(default=0, init=False)
    """Pages in the index, pinned or not."""
    evictable_pages: int = attrs.field(default=0, init=False)
    """Pages that no pin covers: :meth:`evict` can free every one of them."""
    _page_bytes: int = attrs.field(init=False)
    _roots: dict[str, Root] = attrs.field(factory=dict, init=False)
    _pins: set[Pin] = attrs.field(factory=set, init=False)
    _uses: int = attrs.field(default=0, init=False)
    _idle: list[tuple[int, int, Node]] = attrs.field(factory=list, init=False)
    """Heap of (use when queued, tie-break, leaf).

    Entries are lazy: pinned, grown and touched nodes stay in until popped.
    """
    _pushes: int = attrs.field(default=0, init=False)
    _dead: int = attrs.field(default=0, init=False)
    """Heap entries whose node left the tree."""

    def __attrs_post_init__(self) -> None:
        assert self.page_tokens >= 1, f"page_tokens must be at least 1, is {self.page_tokens}"
        self._page_bytes = self.page_tokens * TOKEN_BYTES

    @property
    def pinned_pages(self) -> int:
        """Pages that at least one pin covers."""
        return self.pages_total - self.evictable_pages

    @property
    def pins(self) -> int:
        """Pins that have not ended."""
        return len(self._pins)

    # ---- reading -------------------------------------------------------------------------------------------

    def match(self, scope: str, tokens: bytes) -> Match:
        """The longest cached prefix of ``tokens`` in whole pages. Counts as a use; changes nothing else."""
        root = self._roots.get(scope)
        if root is None:
            return Match(0, ())
        node, inside, at = self._descend(root, tokens)
        self._touch(node)
        pages = self._pages_to(node)
        spare = (len(node.key) - inside) // self._page_bytes
        return Match(at // TOKEN_BYTES, tuple(pages[: len(pages) - spare]))

    def pages_of(self, pin: Pin) -> list[int]:
        """The pages of a pinned prefix, in token order."""
        return self._pages_to(pin._node)

    def spells(self, pin: Pin, start: int, tokens: bytes) -> bool:
        """Whether the pinned prefix has exactly ``tokens`` from position ``start`` on."""
        parts: list[bytes] = []
        node, begin, position = pin._node, start * TOKEN_BYTES, pin.tokens * TOKEN_BYTES
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
        root = self._roots.get(scope)
        if root is None:
            root = self._roots[scope] = Root(key=b"", pages=[], parent=None, scope=scope)
        node, inside, at = self._descend(root, tokens)
        if inside < len(node.key):
            node = self._split(node, inside)
        self._hold(node, until=None)
        self._touch(node)
        pin = Pin(node, at // TOKEN_BYTES)
        self._pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """End a pin. Its pages stay in the index, evictable once no other pin covers them."""
        assert pin in self._pins, f"a pin of {pin.tokens} tokens was ended twice"
        self._pins.remove(pin)
        self._touch(pin._node)
        node: Node | None = pin._node
        while node is not None:
            node.pins -= 1
            if not node.pins:
                self.evictable_pages += len(node.pages)
            node = node.parent
        self._settle(pin._node)

    def insert(self, pin: Pin, tokens: bytes, pages: Sequence[int]) -> Inserted:
        """Add ``tokens``, in whole pages, right after the pinned prefix, and move the pin to their end.

        Pages whose tokens are already in the index are handed back as duplicates; deeper ones go below the
        nodes that were there first. ``pages`` must not be in the index.
        """
        width = self._page_bytes
        assert pin in self._pins, "insert with a pin that has ended"
        assert len(tokens) == len(pages) * width, f"{len(tokens)} token bytes do not fill {len(pages)} pages"
        node, inside, at = self._descend(pin._node, tokens)
        if inside < len(node.key):
            node = self._split(node, inside)
        self._hold(node, until=pin._node)
        pin._node = node
        pin.tokens += len(tokens) // TOKEN_BYTES
        already = at // width
        if at < len(tokens):
            pin._node = self._grow(node, tokens[at:], pages[already:])
        self._touch(pin._node)
        return Inserted(at // TOKEN_BYTES, tuple(pages[:already]))

    # ---- taking pages out ----------------------------------------------------------------------------------

    def evict(self, n: int) -> list[int]:
        """Take up to ``n`` unpinned pages out, from the tails of the least recently used leaves.

        The caller owns them.
        """
        freed: list[int] = []
        while len(freed) < n and self._idle:
            used, _, leaf = heapq.heappop(self._idle)
            leaf.queued = False
            if leaf.parent is None:
                self._dead -= 1
            elif used != leaf.last_use:
                self._settle(leaf)  # used since it was queued: back in with its real age
            elif not leaf.pins and not leaf.children:
                freed += self._trim(leaf, n - len(freed))
        return freed

    def delete(self, scope: str, tokens: bytes) -> list[int]:
        """Take a prompt, and all that continues it, out of the index. The caller owns the pages returned.

        Pinned pages stay, and so does the part of the prompt's prefix that other prompts share. A tail of
        ``tokens`` that fills no page, or that was never cached, is ignored.
        """
        root = self._roots.get(scope)
        if root is None:
            return []
        node, inside, at = self._descend(root, tokens)
        whole = len(tokens) // self._page_bytes * self._page_bytes
        if whole == 0 or (at < whole and inside < len(node.key)):
            return []
        if at == whole:
            node = self._split(node, inside) if inside < len(node.key) else node
            beyond = list(self._walk(node))[1:]
        else:
            beyond = []  # the prompt was cached in part; what hangs below that part are other prompts
        freed: list[int] = []
        for doomed in reversed(beyond):  # children before their parents
            freed += self._drop(doomed)
        while node.parent is not None and not node.pins and not node.children:
            parent = node.parent
            freed += self._drop(node)
            node = parent
        self._sweep()
        return freed

    # ---- the accounts --------------------------------------------------------------------------------------

    def all_pages(self) -> list[int]:
        """Every page in the index, in no particular order."""
        return [page for root in self._roots.values() for node in self._walk(root) for page in node.pages]

    def check(self) -> None:
        """Assert every invariant of the tree; walks all of it."""
        pins: dict[Node, int] = {}
        for pin in self._pins:
            path = list(self._path(pin._node))
            assert isinstance(path[-1], Root), "a pin's node left the tree"
            assert sum(len(node.key) for node in path) == pin.tokens * TOKEN_BYTES, (
                "a pin does not end at its node's end"
            )
            for node in path:
                pins[node] = pins.get(node, 0) + 1
        nodes = [node for root in self._roots.values() for node in self._walk(root)]
        for node in nodes:
            assert node.pins == pins.pop(node, 0), f"{node.pins} pins counted wrongly"
            self._check_node(node)
        assert not pins, "a pinned root is not in the tree"
        pages = [page for node in nodes for page in node.pages]
        assert len(set(pages)) == len(pages) == self.pages_total, (
            "a page is in the index twice, or the count is wrong"
        )
        free = sum(len(node.pages) for node in nodes if not node.pins)
        assert free == self.evictable_pages, f"{free} pages are unpinned, {self.evictable_pages} counted"
        self._check_heap(nodes)

    def _check_node(self, node: Node) -> None:
        assert len(node.key) == len(node.pages) * self._page_bytes, "a key does not fill its node's pages"
        if isinstance(node, Root):
            assert not node.key, "a root has tokens"
            assert node.parent is None, "a root hangs below a node"
            assert self._roots[node.scope] is node, "a root is filed under another scope"
            assert node.pins or node.children, f"the empty root of scope {node.scope!r} was kept"
        else:
            assert node.key, "a node without pages was kept"
        for first, child in node.children.items():
            assert child.parent is node, "a child names another parent"
            assert child.key[: self._page_bytes] == first, "a child is filed under another page"
            assert child.pins <= node.pins, "a child is pinned more often than its parent"
            assert child.last_use <= node.last_use, "a child was used after its parent"

    def _check_heap(self, nodes: list[Node]) -> None:
        queued = [leaf for _, _, leaf in self._idle]
        assert len(set(queued)) == len(queued), "a leaf is queued twice"
        assert sum(leaf.parent is None for leaf in queued) == self._dead, "dead heap entries are miscounted"
        assert all(used <= leaf.last_use for used, _, leaf in self._idle), (
            "a leaf is queued younger than it is"
        )
        waiting = set(queued)
        for node in nodes:
            assert node.queued == (node in waiting), "a node's queued flag is wrong"
            if not isinstance(node, Root) and not node.pins and not node.children:
                assert node in waiting, "an evictable leaf is not queued: it would never be evicted"

    # ---- inside --------------------------------------------------------------------------------------------

    def _descend(self, node: Node, tokens: bytes) -> tuple[Node, int, int]:
        """Follow ``tokens`` from the end of ``node``: (last node, bytes of its key, bytes of tokens)."""
        width = self._page_bytes
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
        width = self._page_bytes
        low, high = 1, min(len(key), len(tokens) - at) // width
        while low < high:
            middle = (low + high + 1) // 2
            if key[low * width : middle * width] == tokens[at + low * width : at + middle * width]:
                low = middle
            else:
                high = middle - 1
        return low * width

    def _split(self, node: Node, at: int) -> Node:
        """Give the first ``at`` bytes of ``node`` to a new parent, and return that.

        ``node`` stays the suffix: pins end there.
        """
        width = self._page_bytes
        assert node.parent is not None, "a root cannot be split"
        assert 0 < at < len(node.key), f"cannot split a key of {len(node.key)} bytes at {at}"
        front = Node(
            node.key[:at], node.pages[: at // width], node.parent, pins=node.pins, last_use=node.last_use
        )
        node.parent.children[front.key[:width]] = front
        node.key, node.pages, node.parent = node.key[at:], node.pages[at // width :], front
        front.children[node.key[:width]] = node
        return front

    def _grow(self, node: Node, tokens: bytes, pages: Sequence[int]) -> Node:
        """Put new pages after ``node``, which the inserting pin holds; the node they are in, held too."""
        self.pages_total += len(pages)
        if node.parent is not None and node.pins == 1 and not node.children:
            node.key += tokens
            node.pages.extend(pages)
            return node
        child = Node(tokens, list(pages), node, pins=1)
        node.children[tokens[: self._page_bytes]] = child
        return child

    def _hold(self, node: Node, until: Node | None) -> None:
        """Count one more pin on the path from ``node`` up to ``until``, which is not counted."""
        above: Node | None = node
        while above is not None and above is not until:
            if not above.pins:
                self.evictable_pages -= len(above.pages)
            above.pins += 1
            above = above.parent

    def _touch(self, node: Node) -> None:
        self._uses += 1
        for used in self._path(node):
            used.last_use = self._uses

    def _path(self, node: Node) -> Iterator[Node]:
        """``node`` and everything above it, the root last."""
        above: Node | None = node
        while above is not None:
            yield above
            above = above.parent

    def _pages_to(self, node: Node) -> list[int]:
        """The pages of the whole path, the root's end first."""
        runs = [above.pages for above in self._path(node)]
        pages: list[int] = []
        for run in reversed(runs):
            pages += run
        return pages

    def _walk(self, node: Node) -> Iterator[Node]:
        """``node`` and everything below it, parents before their children."""
        stack = [node]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _settle(self, node: Node) -> None:
        """Note that ``node`` may have become idle: queue an evictable leaf, forget an empty root."""
        if node.pins or node.children or node.queued:
            return
        if isinstance(node, Root):
            del self._roots[node.scope]
        elif node.parent is not None:
            self._pushes += 1
            node.queued = True
            heapq.heappush(self._idle, (node.last_use, self._pushes, node))

    def _trim(self, leaf: Node, want: int) -> list[int]:
        """Take up to ``want`` pages off the tail of an idle leaf."""
        keep = len(leaf.pages) - want
        if keep <= 0:
            return self._drop(leaf)
        freed = leaf.pages[keep:]
        del leaf.pages[keep:]
        leaf.key = leaf.key[: keep * self._page_bytes]
        self.pages_total -= want
        self.evictable_pages -= want
        self._settle(leaf)
        return freed

    def _drop(self, node: Node) -> list[int]:
        """Take ``node`` out of the tree, unless it is pinned or others hang below it.

        The caller owns its pages.
        """
        parent = node.parent
        if parent is None or node.pins or node.children:
            return []
        del parent.children[node.key[: self._page_bytes]]
        node.parent = None
        self._dead += node.queued
        self.pages_total -= len(node.pages)
        self.evictable_pages -= len(node.pages)
        self._settle(parent)
        return node.pages

    def _sweep(self) -> None:
        """Rebuild the heap once most of it names nodes that are gone, so that deletions do not pile up."""
        if 2 * self._dead > len(self._idle):
            self._idle = [entry for entry in self._idle if entry[2].parent is not None]
            heapq.heapify(self._idle)
            self._dead = 0
