"""The pages of all tiers of one shard, as slots."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from memserve.errors import UserError
from memserve.mempool.addresses import PAGES_MAX, Tier, page_of, slot, tier_of
from memserve.mempool.pages import Pages


@attrs.define
class Tiers:
    """One allocator per tier. A tier without pages does not exist."""

    _pages: dict[Tier, Pages]

    @classmethod
    def of(cls, device: int, host: int = 0, disk: int = 0) -> Tiers:
        """Tiers with these numbers of pages. Raises UserError for more than addresses can name."""
        counts = {Tier.DEVICE: device, Tier.HOST: host, Tier.DISK: disk}
        for tier, count in counts.items():
            if count > PAGES_MAX:
                raise UserError(
                    f"tier {tier.name.lower()} of the pool would have {count} pages, and at most {PAGES_MAX} can be "
                    "addressed: make it smaller, or its pages larger ([pool] page_tokens)"
                )
        return cls({tier: Pages(count) for tier, count in counts.items() if count})

    def __contains__(self, tier: int) -> bool:
        return tier in self._pages

    @property
    def names(self) -> tuple[Tier, ...]:
        """The tiers that exist, fastest first."""
        return tuple(self._pages)

    def below(self, tier: Tier) -> Tier | None:
        """The next slower tier that exists; None when there is none."""
        return next((lower for lower in self._pages if lower > tier), None)

    def total(self, tier: Tier) -> int:
        """Number of pages of a tier; 0 for one that does not exist."""
        return self._pages[tier].count if tier in self._pages else 0

    def free(self, tier: Tier) -> int:
        """Number of free pages of a tier; 0 for one that does not exist."""
        return self._pages[tier].free_count if tier in self._pages else 0

    def take(self, n: int, tier: Tier = Tier.DEVICE) -> list[int] | None:
        """``n`` free slots of a tier; None, with nothing taken, when fewer are free."""
        pages = self._pages[tier].take(n)
        if tier is Tier.DEVICE or pages is None:
            return pages
        return [slot(tier, page) for page in pages]

    def give(self, slots: Sequence[int]) -> None:
        """Give slots of any tiers back. Each must be taken, and named only once."""
        if not slots:
            return
        if max(slots) < PAGES_MAX:
            self._pages[Tier.DEVICE].give(slots)
            return
        for tier, pages in self._pages.items():
            pages.give([page_of(where) for where in slots if tier_of(where) == tier])

    def check(self) -> None:
        """Assert that every allocator is sound."""
        for pages in self._pages.values():
            pages.check()
