"""Copies under way between the tiers of a shard: what they move, and which pages they hold until they end.

A move's source stays in place and valid until the copy has ended, and its target belongs to the move alone. A
move that is no longer wanted (its node was pinned, improved or dropped) is abandoned. Its source may then be
freed at once, because bytes read from it are thrown away; its target comes free when the copy has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from memserve.actions import Copy, CopyDone
from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.nodes import Job, Move, Node
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.tiers import Tiers

COPY_PAGES = 64
"""Maximum number of pages in a Copy to a slower tier: the first ones come free while the rest is copied."""


@attrs.define
class Swaps:
    """The moves of one pool's pages.

    Takes and gives pages of ``tiers``, and changes ``tree`` as copies end.
    """

    tiers: Tiers
    tree: PromptTree
    broken: set[Tier] = attrs.field(factory=set, init=False)
    """Tiers that could not be written to: no more pages are moved there."""
    out_pages: int = attrs.field(default=0, init=False)
    in_pages: int = attrs.field(default=0, init=False)
    bad_pages: int = attrs.field(default=0, init=False)
    """Pages that could not be read back as they were written."""
    _jobs: dict[int, Job] = attrs.field(factory=dict, init=False)
    _last: int = attrs.field(default=0, init=False)
    _copies: list[Copy] = attrs.field(factory=list, init=False)

    def __len__(self) -> int:
        """Number of copies under way."""
        return len(self._jobs)

    def __contains__(self, job: int) -> bool:
        return job in self._jobs

    def moves(self) -> Iterator[Move]:
        """Every move under way, abandoned ones included."""
        for job in self._jobs.values():
            yield from job.moves

    def leaving(self, tier: Tier) -> int:
        """Number of pages of a tier that come free when copies end."""
        return sum(
            len(move.source)
            for move in self.moves()
            if move.node is not None and not move.inbound and tier_of(move.source[0]) == tier
        )

    def copying(self) -> list[int]:
        """Slots that are being written; each is held by its move."""
        return [page for move in self.moves() for page in move.target]

    def below(self, tier: Tier) -> Tier | None:
        """The tier to which pages of a tier move; None from the slowest one that works."""
        lower = self.tiers.below(tier)
        return self.below(lower) if lower in self.broken and lower is not None else lower

    def send_out(self, tier: Tier, lower: Tier, n: int) -> list[int]:
        """Begin to move up to ``n`` pages, least recently used first, to a tier with as many free.

        Returns the IDs of the copies.
        """
        begun = []
        while n > 0:
            nodes = self.tree.coldest(min(n, COPY_PAGES), tier)
            if not nodes:
                break
            n -= sum(len(node.pages) for node in nodes)
            begun.append(self._begin(nodes, self._targets(nodes, lower)))
            for node in nodes:
                self.tree.depart(node)
        return begun

    def bring_in(self, nodes: Sequence[Node], slots: Sequence[int]) -> None:
        """Begin to move ``nodes`` into ``slots``, which the caller has taken."""
        targets, start = [], 0
        for node in nodes:
            targets.append(list(slots[start : start + len(node.pages)]))
            start += len(node.pages)
        assert start == len(slots), f"{len(slots)} places for {start} pages"
        if nodes:
            self._begin(nodes, targets)

    def finish(self, done: CopyDone) -> list[Node]:
        """Handle the end of a copy: its pages are where they should be.

        Returns the nodes whose bytes are lost; they are still in the tree.
        """
        job = self._jobs.pop(done.id)
        bad = set(done.bad)
        # The list grows while it is walked: a node that is bad in part is split, and its move with it.
        landed = [self._land(move, bad) for move in job.moves]
        return [node for node in landed if node is not None]

    def take_copies(self) -> list[Copy]:
        """Copies that the shell must make, returned once."""
        copies, self._copies = self._copies, []
        return copies

    # ---- inside --------------------------------------------------------------------------------------------

    def _targets(self, nodes: Sequence[Node], tier: Tier) -> list[list[int]]:
        found = []
        for node in nodes:
            slots = self.tiers.take(len(node.pages), tier)
            assert slots is not None, "more pages are sent out than there is room for"
            found.append(slots)
        return found

    def _begin(self, nodes: Sequence[Node], targets: Sequence[list[int]]) -> int:
        self._last += 1
        job = self._jobs[self._last] = Job(self._last)
        for node, slots in zip(nodes, targets, strict=True):
            node.moving = Move(job, node, list(node.pages), slots)
            job.moves.append(node.moving)
        self._copies.append(Copy(job.id, runs(job.moves)))
        return job.id

    def _land(self, move: Move, bad: set[int]) -> Node | None:
        """End one move; returns its node if the bytes are lost."""
        node = move.node
        if node is None:
            self.tiers.give(move.target)
            return None
        first_bad = next((i for i, page in enumerate(move.source) if page in bad), None)
        if first_bad is None:
            self._count(move)
            self.tiers.give(self.tree.arrive(node, move.target))
            return None
        if not move.inbound:
            self.tree.stay(node)
            self.tiers.give(move.target)
            self.broken.add(Tier(tier_of(move.target[0])))
            return None
        if first_bad:
            self.tree.split(node, first_bad * self.tree.page_bytes)
        self.bad_pages += sum(page in bad for page in move.source)
        self.tiers.give(move.target)
        move.abandon()
        return node

    def _count(self, move: Move) -> None:
        if move.inbound:
            self.in_pages += len(move.source)
        else:
            self.out_pages += len(move.source)


def runs(moves: Sequence[Move]) -> tuple[tuple[int, int, int], ...]:
    """The fewest (source, target, pages) that copy all moves: pages adjacent at both ends go in one piece."""
    pairs = sorted(pair for move in moves for pair in zip(move.source, move.target, strict=True))
    found: list[tuple[int, int, int]] = []
    for source, target in pairs:
        if found:
            first, to, n = found[-1]
            if source == first + n and target == to + n:
                found[-1] = (first, to, n + 1)
                continue
        found.append((source, target, 1))
    return tuple(found)
