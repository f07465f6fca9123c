"""Page addresses: shard, incarnation, tier and page number in one integer.

Inside one shard the lower part is enough. It is called the *slot*: tier and page number. The device tier is
0, so a device page's slot equals its page number, and workers index their arena with it without unpacking::

    address  shard 10 bits | incarnation 24 bits | tier 2 bits | page 27 bits     63 bits: fits a signed int64
    slot                                           tier 2 bits | page 27 bits
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NewType

import attrs

from memserve.errors import PoolError

Address = NewType("Address", int)
"""One page of one tier, in one incarnation of one shard."""

PAGE_BITS = 27
_TIER_BITS = 2
_INCARNATION_BITS = 24
_SHARD_BITS = 10
_SLOT_BITS = PAGE_BITS + _TIER_BITS
PAGES_MAX = 1 << PAGE_BITS
"""Maximum number of pages in one tier of one shard."""
SHARDS_MAX = 1 << _SHARD_BITS


class Tier(enum.IntEnum):
    """Where a page's bytes lie, fastest tier first."""

    DEVICE = 0
    """The arena that engines compute on."""
    HOST = 1
    """Memory of the shard's host."""
    DISK = 2
    """A file of the shard; its pages cannot be read in place."""


def slot(tier: int, page: int) -> int:
    """The slot of a page, which names it within its shard."""
    return tier << PAGE_BITS | page


def tier_of(where: int) -> int:
    """The tier of a slot."""
    return where >> PAGE_BITS


def page_of(where: int) -> int:
    """The page number of a slot within its tier."""
    return where & (PAGES_MAX - 1)


@attrs.frozen
class Home:
    """The part that all addresses of one incarnation of one shard share."""

    shard: int
    """Number of the shard within its cluster."""
    incarnation: int
    """Only its lowest 24 bits are used: enough to recognize an address of an earlier incarnation."""

    @property
    def base(self) -> int:
        """The number that is added to a slot to make an address."""
        incarnation = self.incarnation & ((1 << _INCARNATION_BITS) - 1)
        return (self.shard << _INCARNATION_BITS | incarnation) << _SLOT_BITS

    def addresses(self, slots: Iterable[int]) -> tuple[Address, ...]:
        """Addresses of slots of this shard."""
        base = self.base
        return tuple(Address(base | where) for where in slots)

    def slots(self, addresses: Iterable[Address]) -> list[int]:
        """Slots of addresses of this shard.

        Raises PoolError (FOREIGN_ADDRESS, STALE_ADDRESS) unless all belong to this incarnation of this shard.
        """
        base, found = self.base, []
        for address in addresses:
            where = address ^ base
            if where >> _SLOT_BITS:
                raise self._wrong(address)
            found.append(where)
        return found

    def _wrong(self, address: Address) -> PoolError:
        parts = unpack(address)
        if parts.shard != self.shard:
            text = f"address {address:#x} is of shard {parts.shard}, not of {self.shard}"
            return PoolError(PoolError.FOREIGN_ADDRESS, text)
        return PoolError(PoolError.STALE_ADDRESS, f"address {address:#x} is of an earlier run of its shard")


@attrs.frozen
class Parts:
    """The parts of an address."""

    shard: int
    incarnation: int
    tier: Tier
    page: int


def pack(parts: Parts) -> Address:
    """The address with these parts."""
    assert 0 <= parts.shard < SHARDS_MAX, f"shard number {parts.shard}"
    assert 0 <= parts.page < PAGES_MAX, f"page number {parts.page}"
    return Home(parts.shard, parts.incarnation).addresses([slot(parts.tier, parts.page)])[0]


def unpack(address: Address) -> Parts:
    """The parts of an address. Raises PoolError (NOT_HELD) for an integer that is not an address."""
    where = address & ((1 << _SLOT_BITS) - 1)
    if address < 0 or address >> (_SLOT_BITS + _INCARNATION_BITS + _SHARD_BITS) or tier_of(where) > Tier.DISK:
        raise PoolError(PoolError.NOT_HELD, f"{address:#x} is no address of a page")
    home = address >> _SLOT_BITS
    incarnation = home & ((1 << _INCARNATION_BITS) - 1)
    return Parts(home >> _INCARNATION_BITS, incarnation, Tier(tier_of(where)), page_of(where))
