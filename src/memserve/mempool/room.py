"""Room for pages: what is free in every tier, and how more of it is made.

A grant takes free pages. Short of those, the least recently used unpinned pages leave for the next tier and the grant
waits for that copy (:meth:`Room.secure`, :meth:`Room.clears`), or they are dropped at once where nobody may wait
(:meth:`Room.take`) or where there is no other tier. :meth:`Room.balance` keeps some pages free in the background, so that most grants never wait.
"""

from __future__ import annotations

import attrs

from memserve.mempool.addresses import Tier
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.swaps import Swaps
from memserve.mempool.tiers import Tiers


@attrs.frozen
class Capacity:
    """Pages of a pool by tier, and when they are moved."""

    device: int
    host: int = 0
    disk: int = 0
    swap_low: float = 0.05
    """Pages begin to leave a tier when less than this share of it is free."""
    swap_high: float = 0.1
    """They leave until this share is free."""


@attrs.define
class Room:
    """The pages of one pool: free ones, indexed ones, and those under way between tiers."""

    capacity: Capacity
    tree: PromptTree
    tiers: Tiers = attrs.field(init=False)
    swaps: Swaps = attrs.field(init=False)
    evicted_pages: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.tiers = Tiers.of(self.capacity.device, self.capacity.host, self.capacity.disk)
        self.swaps = Swaps(self.tiers, self.tree)

    def total(self, tier: Tier) -> int:
        """Pages of a tier."""
        return self.tiers.total(tier)

    def free(self, tier: Tier) -> int:
        """Pages of a tier that hold nothing."""
        return self.tiers.free(tier)

    def leased(self, tier: Tier) -> int:
        """Pages of a tier that are private to a lease, or to a copy that fills them."""
        return self.tiers.total(tier) - self.tiers.free(tier) - self.tree.indexed[tier]

    def give(self, slots: list[int] | tuple[int, ...]) -> None:
        """Pages hold nothing any more."""
        self.tiers.give(slots)

    def evict(self, n: int, tier: Tier = Tier.DEVICE) -> int:
        """Drop unpinned pages until ``n`` of ``tier`` came free; how many did."""
        before = self.tiers.free(tier)
        pages = self.tree.evict(n, tier)
        self.tiers.give(pages)
        self.evicted_pages += len(pages)
        return self.tiers.free(tier) - before

    def take(self, n: int, tier: Tier = Tier.DEVICE) -> list[int] | None:
        """``n`` slots now, dropping just as many pages as are missing; None when even that would not do."""
        missing = n - self.tiers.free(tier)
        if missing > self.tree.evictable[tier]:
            return None
        if missing > 0:
            self.evict(missing, tier)
        return self.tiers.take(n, tier)

    def clears(self, n: int) -> bool:
        """Whether ``n`` device slots are not there, but come free when copies end; begins what copies it takes."""
        missing = n - self.tiers.free(Tier.DEVICE)
        if missing <= 0:
            return False
        self.send_out(Tier.DEVICE, missing - self.swaps.leaving(Tier.DEVICE), urgent=True)
        return missing <= self.swaps.leaving(Tier.DEVICE)

    def secure(self, n: int) -> list[int] | None:
        """``n`` device slots, losing nothing that can be kept.

        None when that takes time: until copies end that are under way then, or until others free pages.
        """
        while (missing := n - self.tiers.free(Tier.DEVICE)) > 0:
            if missing > self.tree.evictable[Tier.DEVICE]:
                return None
            leaving = self.swaps.leaving(Tier.DEVICE)
            if missing <= leaving:
                return None
            if not self.send_out(Tier.DEVICE, missing - leaving, urgent=True):
                self.evict(missing - leaving)
        return self.tiers.take(n)

    def send_out(self, tier: Tier, n: int, *, urgent: bool) -> list[int]:
        """Begin to move up to ``n`` pages, the least recently used, to the next tier; the copies begun.

        An urgent call drops what is coldest there to make room, and so does one to the slowest tier.
        """
        lower = self.swaps.below(tier)
        n = min(n, self.tree.evictable[tier] - self.swaps.leaving(tier))
        if lower is None or n <= 0:
            return []
        missing = n - self.tiers.free(lower)
        if missing > 0 and (urgent or self.swaps.below(lower) is None):
            self.evict(missing, lower)
        return self.swaps.send_out(tier, lower, min(n, self.tiers.free(lower)))

    def balance(self) -> None:
        """Begin to move pages out of every tier that is short of free ones."""
        for tier in self.tiers.names:
            total, free = self.tiers.total(tier), self.tiers.free(tier)
            if free >= self.capacity.swap_low * total or self.swaps.below(tier) is None:
                continue
            free += self.swaps.leaving(tier)
            if free < self.capacity.swap_low * total:
                self.send_out(tier, int(self.capacity.swap_high * total) + 1 - free, urgent=False)
