"""Room for pages: how many are free in every tier, and how more are freed.

A grant takes free pages. If they do not suffice, the least recently used unpinned pages move to the next tier
and the grant waits for that copy (:meth:`Room.secure`, :meth:`Room.clears`). They are dropped at once if the
caller may not wait (:meth:`Room.take`), or if there is no other tier. :meth:`Room.balance` keeps some pages
free in the background, so that most grants never wait.
"""

from __future__ import annotations

import attrs

from memserve.mempool.addresses import Tier
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.swaps import Swaps
from memserve.mempool.tiers import Tiers


@attrs.frozen
class Capacity:
    """Pages of a pool by tier, and the thresholds at which they move to the next tier."""

    device: int
    host: int = 0
    disk: int = 0
    swap_low: float = 0.05
    """Pages begin to leave a tier when less than this share of it is free."""
    swap_high: float = 0.1
    """Pages leave a tier until this share of it is free."""


@attrs.define
class Room:
    """The pages of one pool: free ones, indexed ones, and those being copied between tiers."""

    capacity: Capacity
    tree: PromptTree
    tiers: Tiers = attrs.field(init=False)
    swaps: Swaps = attrs.field(init=False)
    evicted_pages: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.tiers = Tiers.of(self.capacity.device, self.capacity.host, self.capacity.disk)
        self.swaps = Swaps(self.tiers, self.tree)

    def total(self, tier: Tier) -> int:
        """Number of pages of a tier."""
        return self.tiers.total(tier)

    def free(self, tier: Tier) -> int:
        """Number of pages of a tier that hold nothing."""
        return self.tiers.free(tier)

    def leased(self, tier: Tier) -> int:
        """Number of pages of a tier that are private to a lease or to a copy that fills them."""
        return self.tiers.total(tier) - self.tiers.free(tier) - self.tree.indexed[tier]

    def give(self, slots: list[int] | tuple[int, ...]) -> None:
        """Free pages that hold nothing any more."""
        self.tiers.give(slots)

    def evict(self, n: int, tier: Tier = Tier.DEVICE) -> int:
        """Drop unpinned pages until ``n`` pages of ``tier`` come free; returns how many did."""
        before = self.tiers.free(tier)
        pages = self.tree.evict(n, tier)
        self.tiers.give(pages)
        self.evicted_pages += len(pages)
        return self.tiers.free(tier) - before

    def take(self, n: int, tier: Tier = Tier.DEVICE) -> list[int] | None:
        """``n`` slots now, dropping only as many pages as are missing; None when even that is not enough."""
        missing = n - self.tiers.free(tier)
        if missing > self.tree.evictable[tier]:
            return None
        if missing > 0:
            self.evict(missing, tier)
        return self.tiers.take(n, tier)

    def clears(self, n: int) -> bool:
        """Whether ``n`` device slots are not free yet, but will be when copies end; begins these copies.

        Begins none if not all of the missing slots can come free.
        """
        missing = n - self.tiers.free(Tier.DEVICE)
        if not 0 < missing <= self.tree.evictable[Tier.DEVICE]:
            return False
        self.send_out(Tier.DEVICE, missing - self.swaps.leaving(Tier.DEVICE), urgent=True)
        return missing <= self.swaps.leaving(Tier.DEVICE)

    def secure(self, n: int) -> list[int] | None:
        """``n`` device slots, without losing anything that can be kept.

        None when that takes time: the copies that are then under way must end, or others must free pages.
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
        """Begin to move up to ``n`` pages to the next tier, least recently used first.

        Returns the IDs of the copies begun. An urgent call drops the coldest pages of the next tier to make
        room, and so does a call that moves pages to the slowest tier.
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
        """Begin to move pages out of every tier that is short of free pages."""
        for tier in self.tiers.names:
            total, free = self.tiers.total(tier), self.tiers.free(tier)
            if free >= self.capacity.swap_low * total or self.swaps.below(tier) is None:
                continue
            free += self.swaps.leaving(tier)
            if free < self.capacity.swap_low * total:
                self.send_out(tier, int(self.capacity.swap_high * total) + 1 - free, urgent=False)
