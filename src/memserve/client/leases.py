"""What a program holds on each shard: leases, which of their pages it may write, and their memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import attrs

from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.kernels.arena import Arena, attach_arena
from memserve.mempool.addresses import Address, Home, Tier, page_of, tier_of
from memserve.pool_messages import Acquired, Arrival, PoolDescribed


@attrs.frozen
class Lease:
    """Pages that this program may use. ``addresses[i]`` holds the tokens from ``i`` whole pages on."""

    shard: str
    id: int
    addresses: tuple[Address, ...]
    cached_tokens: int
    """Number of tokens, from the first on, that are filled: read their pages, never write them."""


@attrs.define(eq=False)
class HeldLease:
    """A lease, and which of its pages may still be written."""

    id: int
    table: list[Address]
    private: set[Address]
    moving: Counter[Address] = attrs.field(factory=Counter)
    """Pages that transfers read or fill, or may still fill after they have failed, and how many transfers do."""

    def lend(self, pages: Iterable[Address]) -> None:
        """Record that one more transfer reads or fills these pages."""
        self.moving.update(pages)

    def take_back(self, pages: Iterable[Address]) -> None:
        """Record that one transfer less does."""
        self.moving -= Counter(pages)


@attrs.define(eq=False)
class Shard:
    """A shard as this program knows it."""

    name: str
    to: ActorId
    endpoint: str
    valid_until: float
    """Until when our leases certainly live: ``lease_s`` from the sending of the last answered call.

    Before the first answer: until when the shard may take to give it.
    """
    about: PoolDescribed | None = None
    arenas: dict[Tier, Arena] = attrs.field(factory=dict)
    memory: dict[Tier, memoryview] = attrs.field(factory=dict)
    leases: dict[int, HeldLease] = attrs.field(factory=dict)
    holders: dict[Address, list[HeldLease]] = attrs.field(factory=dict)
    """The leases that hold each page, the latest last: several matches may find the same page."""

    @property
    def known(self) -> PoolDescribed:
        """The shard's description of itself."""
        assert self.about is not None, f"shard {self.name} is used before it was asked what it is"
        return self.about

    @property
    def home(self) -> Home:
        """The part that all of the shard's addresses share."""
        return Home(self.known.shard, self.known.incarnation)

    def renewed(self, sent_at: float, now: float) -> list[int]:
        """Record that a call sent at ``sent_at`` was answered.

        If our leases may have ended before the shard heard it, they are forgotten, and returned to be given
        back: if it was the shard that slept, they live on there.
        """
        forgotten = list(self.leases) if now >= self.valid_until else []
        if forgotten:
            self.leases.clear()
            self.holders.clear()
        self.valid_until = max(self.valid_until, sent_at + self.known.lease_s)
        return forgotten

    def map(self) -> None:
        """Map the memory of every tier that is on this host. Blocks."""
        for tier, path in zip(Tier, self.known.arenas, strict=True):
            if path and os.path.exists(path):
                arena = self.arenas[tier] = attach_arena(Path(path), self.known.page_bytes)
                self.memory[tier] = arena.memory

    def unmap(self) -> None:
        """Unmap the memory."""
        self.memory.clear()
        for arena in self.arenas.values():
            arena.close()

    # ---- leases --------------------------------------------------------------------------------------------

    def hold(self, answer: Acquired | Arrival) -> Lease:
        """Record a lease that was granted."""
        table = self.home.addresses(answer.pages)
        cached = answer.cached_tokens // self.known.page_tokens
        held = self.leases[answer.lease] = HeldLease(answer.lease, list(table), set(table[cached:]))
        self._file(held, table)
        return Lease(self.name, answer.lease, table, answer.cached_tokens)

    def grew(self, held: HeldLease, new: Iterable[Address]) -> None:
        """Record pages that were added to a lease."""
        new = list(new)
        held.table += new
        held.private.update(new)
        self._file(held, new)

    def inserted(self, held: HeldLease, addresses: tuple[Address, ...]) -> None:
        """Record that these pages, those of ``held`` among them, are in the index."""
        held.private.difference_update(addresses)
        own, named = set(held.table), set(addresses)
        held.table = [*addresses, *(one for one in held.table if one not in named)]
        self._file(held, [one for one in addresses if one not in own])

    def let_go(self, number: int, gone: set[Address] | None) -> None:
        """Forget a lease, or these of its pages."""
        held = self.leases.get(number)
        if held is None:
            return
        gone = set(held.table) if gone is None else gone
        held.table = [one for one in held.table if one not in gone]
        held.private -= gone
        for one in gone:
            del held.moving[one]
            holders = [other for other in self.holders.get(one, []) if other is not held]
            self.holders[one] = holders
            if not holders:
                del self.holders[one]
        if not held.table:
            del self.leases[number]

    def _file(self, held: HeldLease, pages: Iterable[Address]) -> None:
        for one in pages:
            self.holders.setdefault(one, []).append(held)

    def held(self, number: int) -> HeldLease:
        """The lease with this number. Raises PoolError (UNKNOWN_LEASE)."""
        held = self.leases.get(number)
        if held is None:
            raise PoolError(PoolError.UNKNOWN_LEASE, f"lease {number} on {self.name} has ended")
        return held

    def holder(self, address: Address, now: float) -> HeldLease:
        """The latest lease on a page. Raises PoolError (NOT_HELD), also when the leases may have ended."""
        holders = self.holders.get(address) if now < self.valid_until else None
        if not holders:
            raise PoolError(PoolError.NOT_HELD, f"{address:#x} is not, or no longer, leased by this program")
        return holders[-1]

    # ---- bytes ---------------------------------------------------------------------------------------------

    def page(self, address: Address) -> memoryview:
        """A page's memory, in place. Raises PoolError (STALE_ADDRESS, UNREADABLE)."""
        (slot,) = self.home.slots((address,))
        memory = self.memory.get(Tier(tier_of(slot)))
        if memory is None:
            raise PoolError(PoolError.UNREADABLE, f"{address:#x} is not in memory of this host")
        size = self.known.page_bytes
        return memory[page_of(slot) * size : (page_of(slot) + 1) * size]


def check_writable(held: HeldLease, address: Address) -> None:
    """Raise PoolError (MOVING, RETIRED) unless a page's bytes are this program's alone."""
    if address in held.moving:
        raise PoolError(PoolError.MOVING, f"page {address:#x} is read or filled by a transfer, or may be")
    if address not in held.private:
        raise PoolError(PoolError.RETIRED, f"page {address:#x} is in the index: its bytes are others' too")
