"""What pages hold in a run whose content is kept, and which actor or transfer writes to which of them.

A token's KV depends on it and on all tokens before it. So does its stand-in here: four bytes, chained from
the first token on. So a page with the right tokens behind another prefix is as wrong as one with other
tokens.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate

import attrs

from memserve.identity import ActorId
from memserve.mempool.addresses import Tier, slot
from memserve.mempool.pool import Pool
from memserve.sim.layout import ShardPlan
from memserve.sim.world import Violation
from memserve.tokens import TOKEN_BYTES

Slots = dict[int, bytearray]
"""Page content by slot."""
SPOILED = b"\xff"
"""The bytes that a write leaves behind when it breaks off."""


def content_of(tokens: bytes, before: bytes = b"") -> bytes:
    """The content of pages for packed tokens that follow content ``before``; as many bytes as ``tokens``."""
    state = int.from_bytes(before[-TOKEN_BYTES:], "little")
    each = (tokens[at : at + TOKEN_BYTES] for at in range(0, len(tokens), TOKEN_BYTES))
    chain = accumulate(each, lambda crc, token: zlib.crc32(token, crc), initial=state)
    return array("I", chain).tobytes()[TOKEN_BYTES:]


@attrs.define(eq=False)
class Arenas:
    """The pages of every living shard. Without ``kept`` there is no content, and nothing is checked."""

    page_bytes: int
    """Size of a page's content."""
    kept: bool = True
    of: dict[ActorId, Slots] = attrs.field(factory=dict)
    _writing: dict[tuple[ActorId, int], Hashable] = attrs.field(factory=dict)
    """Pages that are being written to, by shard and slot, with the worker or the transfer that writes."""

    def open(self, shard: ActorId, plan: ShardPlan) -> None:
        """Open the arena of a shard that starts, with empty pages."""
        if self.kept:
            counts = zip(Tier, (plan.pages, plan.host_pages, plan.disk_pages), strict=True)
            slots = [slot(tier, page) for tier, pages in counts for page in range(pages)]
            self.of[shard] = {one: bytearray(self.page_bytes) for one in slots}

    def drop(self, actor: ActorId) -> None:
        """An actor is dead: a shard's pages are gone, a worker's step writes nothing any more."""
        self.of.pop(actor, None)
        self.let_go(actor)

    def copy(self, source: ActorId, pages: Sequence[int], to: ActorId, into: Sequence[int]) -> None:
        """Copy pages, within a shard or to another, if both have content."""
        here, there = self.of.get(source), self.of.get(to)
        if here is not None and there is not None:
            for page, target in zip(pages, into, strict=True):
                there[target][:] = here[page]

    def spoil(self, shard: ActorId, pages: Iterable[int]) -> None:
        """Fill pages with content that is valid for no token."""
        for page in pages if shard in self.of else ():
            self.of[shard][page][:] = SPOILED * self.page_bytes

    # ---- one page has one writer -----------------------------------------------------------------------------

    def claim(self, shard: ActorId, pages: Iterable[int], who: Hashable) -> None:
        """``who`` begins to write to pages. Raises Violation where another writer already does."""
        for page in pages if self.kept else ():
            other = self._writing.setdefault((shard, page), who)
            if other != who:
                raise Violation(f"page {page} of {shard} is written by {who} and {other} at once")

    def let_go(self, who: Hashable) -> None:
        """``who`` writes no more."""
        if self.kept:
            self._writing = {page: other for page, other in self._writing.items() if other != who}

    # ---- what the index promises -----------------------------------------------------------------------------

    def check_index(self, shard: ActorId, pool: Pool) -> None:
        """Check that every page that can be matched holds the content of its tokens behind all before them.

        Raises Violation.
        """
        pages = self.of.get(shard)
        if pages is None:
            return
        for root in pool.tree.roots.values():
            stack = [(child, b"") for child in root.children.values()]
            while stack:
                node, before = stack.pop()
                found = b"".join([bytes(pages[page]) for page in node.pages])
                if found != content_of(node.key, before):
                    raise Violation(f"{shard} has pages {node.pages} in its index that hold other tokens")
                stack += [(child, found) for child in node.children.values()]
