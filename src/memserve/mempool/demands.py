"""Checks of what callers ask of a pool; they change nothing."""

from __future__ import annotations

import attrs

from memserve.errors import PoolError
from memserve.mempool.addresses import Tier
from memserve.mempool.room import Room
from memserve.pool_messages import PRIVATE_BYTES_MAX
from memserve.tokens import TOKEN_BYTES, count, pages_for


@attrs.frozen
class Demands:
    """Checks against the tiers that a pool has."""

    room: Room
    page_tokens: int

    def pages(self, tokens: bytes, extra_pages: int) -> int:
        """Number of device pages for ``tokens`` plus ``extra_pages`` more.

        Raises PoolError (TOO_LARGE, NOT_WHOLE_PAGES, BAD_COUNT) if they could never be granted.
        """
        self.check_tokens(tokens)
        need = pages_for(count(tokens), self.page_tokens) + counted(extra_pages)
        self.check_fits(need)
        return need

    def check_tokens(self, tokens: bytes) -> None:
        """Raise PoolError (NOT_WHOLE_PAGES) for bytes that are not a whole number of tokens."""
        if len(tokens) % TOKEN_BYTES:
            text = f"{len(tokens)} bytes of tokens are not a multiple of {TOKEN_BYTES}"
            raise PoolError(PoolError.NOT_WHOLE_PAGES, text)

    def check_fits(self, pages: int, tier: Tier = Tier.DEVICE) -> None:
        """Raise PoolError (TOO_LARGE) for more pages than a tier has."""
        total = self.room.total(tier)
        if pages > total:
            text = f"{pages} pages needed, and tier {tier.name} has {total} in all"
            raise PoolError(PoolError.TOO_LARGE, text)

    def existing(self, tier: int) -> Tier:
        """The tier with this number. Raises PoolError (BAD_TIER) if the shard does not have it."""
        if tier not in self.room.tiers:
            raise PoolError(PoolError.BAD_TIER, f"this shard has no tier {tier}")
        return Tier(tier)

    def leasable(self, tier: int) -> Tier:
        """The tier with this number, if its pages can be leased. Raises PoolError (BAD_TIER)."""
        if tier == Tier.DISK:
            text = "pages on disk cannot be leased: they cannot be written to in place"
            raise PoolError(PoolError.BAD_TIER, text)
        return self.existing(tier)


def check_private(data: bytes) -> None:
    """Raise PoolError (DOES_NOT_FIT) if private data is too large for a Transfer."""
    if len(data) > PRIVATE_BYTES_MAX:
        text = f"{len(data)} bytes of private data: at most {PRIVATE_BYTES_MAX} go with a transfer"
        raise PoolError(PoolError.DOES_NOT_FIT, text)


def counted(n: int) -> int:
    """``n`` as a number of pages. Raises PoolError (BAD_COUNT) if it is negative."""
    if n < 0:
        raise PoolError(PoolError.BAD_COUNT, f"{n} pages: expected 0 or more")
    return n
