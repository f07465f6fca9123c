"""Leases: pages granted to an owner until a deadline.

An owner's heartbeat renews all of its leases; its silence ends all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.nodes import Node, Pin

LENDER = ActorId("lender.0")
"""Owner of leases that ended while their pages were lent: a mover still reads or fills them."""


@attrs.define(eq=False)
class Lease:
    """One request's pages, as slots. ``pages[i]`` holds the tokens from ``i * page_tokens`` on.

    The table has two parts, with R = ``retired_tokens // page_tokens``::

        pages[:R]   retired: in the index and pinned, except those in ``kept``, which only this lease reads
                    and owns
        pages[R:]   private to this lease: filled, being filled, or still empty
    """

    id: int
    owner: ActorId
    scope: str
    pages: list[int]
    pin: Pin
    """Pin on every token that was matched or, with caching on, retired; ends with the lease."""
    retired_tokens: int
    kept: list[int] = attrs.field(factory=list)
    """Retired pages that stayed private: the index has their tokens in other pages, or caching is off."""
    floor: int | None = None
    """The slowest tier in which the owner can use the pages, while pinned pages are brought in.

    None once all of them are there.
    """
    requested_tokens: int = 0
    """Number of tokens asked for; 0 once the counters include them."""
    found_pages: tuple[int, ...] = (0, 0, 0)
    """Number of matched pages by tier."""
    lent: int = 0
    """Number of transfers that read or fill the pages.

    Until they have ended the pages stay where they are, even if the lease ends.
    """

    def private(self, page_tokens: int) -> list[int]:
        """The pages that only this lease can reach: they come free when it ends."""
        return self.kept + self.pages[self.retired_tokens // page_tokens :]

    def in_vain(self, lost: Sequence[Node]) -> bool:
        """Whether it waits for pages that do not come: those of ``lost`` nodes, or some not on their way any more.

        The latter were on disk, and another lease has meanwhile inserted pages in host memory in their place.
        """
        assert self.floor is not None, "a lease at rest waits for nothing"
        floor = self.floor
        return any(
            node in lost or (node.tier > floor and node.moving is None) for node in self.pin.node.path()
        )


@attrs.define
class _Owner:
    deadline: float
    leases: dict[int, Lease] = attrs.field(factory=dict)


STARVED_S = 2.0
"""How long a lease that was refused pages takes precedence over new leases.

Its owner must ask again within this time.
"""


@attrs.define
class Leases:
    """Every lease, by ID and by owner. Times are in seconds on the caller's clock."""

    lease_s: float
    """How long an owner may be silent."""
    _next_id: int
    _by_id: dict[int, Lease] = attrs.field(factory=dict, init=False)
    _owners: dict[ActorId, _Owner] = attrs.field(factory=dict, init=False)
    _starved: dict[int, float] = attrs.field(factory=dict, init=False)
    """Time until which each lease that was refused pages takes precedence over new leases."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._by_id.values())

    @property
    def deadline(self) -> float:
        """When the next owner falls silent unless renewed, or a refused lease loses its precedence.

        Infinity when there is neither.
        """
        silent = min((owner.deadline for owner in self._owners.values()), default=math.inf)
        return min(silent, *self._starved.values()) if self._starved else silent

    def mark_starved(self, lease: int, now: float) -> None:
        """Record that this lease was refused pages; its owner asks again.

        Until it has got them, and for STARVED_S at most, pages that come free are not granted to new leases.
        """
        self._starved[lease] = now + STARVED_S

    def clear_starved(self, lease: int) -> None:
        """Record that the lease has got its pages, or has ended."""
        self._starved.pop(lease, None)

    def any_starved(self, now: float) -> bool:
        """Whether some lease was refused pages less than STARVED_S ago and still wants them."""
        return any(now < until and lease in self._by_id for lease, until in self._starved.items())

    def renew(self, owner: ActorId, now: float) -> None:
        """Record that the owner was heard from: all of its leases live for another ``lease_s``."""
        deadline = now + self.lease_s
        held = self._owners.get(owner)
        if held is None:
            self._owners[owner] = _Owner(deadline)
        else:
            held.deadline = max(held.deadline, deadline)

    def excuse(self, now: float) -> None:
        """Count every owner's silence from now, because it was this shard that heard nothing."""
        for owner in self._owners:
            self.renew(owner, now)

    def open(self, owner: ActorId, scope: str, pages: list[int], pin: Pin, now: float) -> Lease:
        """Open a lease whose first ``pin.tokens`` tokens are in the index already."""
        lease = Lease(self._next_id, owner, scope, pages, pin, pin.tokens)
        self._next_id += 1
        self.renew(owner, now)
        self._by_id[lease.id] = self._owners[owner].leases[lease.id] = lease
        return lease

    def get(self, owner: ActorId, lease: int) -> Lease:
        """The lease, if it is this owner's and none of its pages are being brought in.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER, MOVING).
        """
        held = self.any(owner, lease)
        if held.floor is not None:
            raise PoolError(PoolError.MOVING, f"pages of lease {lease} are being brought in")
        return held

    def unlent(self, owner: ActorId, lease: int) -> Lease:
        """The lease, as :meth:`get` finds it, if no transfer reads or fills its pages.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER, MOVING).
        """
        held = self.get(owner, lease)
        if held.lent:
            raise PoolError(PoolError.MOVING, f"pages of lease {lease} are read or filled by a transfer")
        return held

    def find(self, lease: int) -> Lease | None:
        """The lease, whoever owns it; None when it does not exist."""
        return self._by_id.get(lease)

    def keep(self, lease: Lease) -> None:
        """Give a lease whose owner has ended it to LENDER, because its pages are lent."""
        if lease.owner != LENDER:
            self.move(lease, LENDER, math.inf)

    def any(self, owner: ActorId, lease: int) -> Lease:
        """The lease, if it is this owner's, even while its pages are brought in.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER).
        """
        held = self._by_id.get(lease)
        if held is None:
            raise PoolError(PoolError.UNKNOWN_LEASE, f"lease {lease} does not exist: it ended, or never was")
        if held.owner != owner:
            raise PoolError(PoolError.NOT_OWNER, f"lease {lease} belongs to {held.owner}, not to {owner}")
        return held

    def owner_of(self, lease: int) -> ActorId | None:
        """Owner of a lease; None when the lease does not exist."""
        held = self._by_id.get(lease)
        return None if held is None else held.owner

    def move(self, lease: Lease, owner: ActorId, now: float) -> None:
        """Make ``owner`` the lease's owner; the pages stay as they are."""
        self.renew(owner, now)
        del self._owners[lease.owner].leases[lease.id]
        self._owners[owner].leases[lease.id] = lease
        lease.owner = owner

    def close(self, lease: Lease) -> None:
        """Forget a lease; the caller must return its pages and its pin."""
        self.clear_starved(lease.id)
        del self._by_id[lease.id]
        del self._owners[lease.owner].leases[lease.id]

    def silent(self, now: float) -> list[ActorId]:
        """Owners whose deadline has passed, with or without leases."""
        self._starved = {lease: until for lease, until in self._starved.items() if now < until}
        return [actor for actor, owner in self._owners.items() if owner.deadline <= now]

    def drop(self, owner: ActorId) -> list[Lease]:
        """Forget an owner and its leases, which are returned; the caller must return their pages and pins.

        Leases whose pages are lent pass to LENDER instead.
        """
        held = self._owners.get(owner)
        for lease in [] if held is None else list(held.leases.values()):
            if lease.lent:
                self.keep(lease)
        self._owners.pop(owner, None)
        leases = [] if held is None else list(held.leases.values())
        for lease in leases:
            del self._by_id[lease.id]
        return leases

    def check(self) -> None:
        """Assert that the leases by ID and the leases by owner agree."""
        by_owner = {lease.id: lease for owner in self._owners.values() for lease in owner.leases.values()}
        assert by_owner == self._by_id, "leases by owner differ from leases by id"
        for actor, owner in self._owners.items():
            assert all(lease.owner == actor for lease in owner.leases.values()), (
                f"a lease is filed under {actor} wrongly"
            )
        for lease in self._by_id.values():
            assert len(set(lease.pages)) == len(lease.pages), f"lease {lease.id} names a page twice"
