"""The MemPool of one shard: pages, index, leases, copies, and the calls that move pages between them.

In every tier each page is in exactly one of three states:

    free      in :class:`~memserve.mempool.tiers.Tiers`
    leased    private to one lease (being filled, or a duplicate of what the index holds), or to a copy
              that fills it
    indexed   in :class:`PromptTree`, pinned by any number of leases or by none (then it is evictable)

After every call ``free + leased + indexed == total``. A refused call raises PoolError and has changed
nothing. The pool holds only slots (:mod:`memserve.mempool.addresses`). Whoever maps the arenas reads and
writes the bytes; the shell copies them between tiers as :meth:`Pool.take_copies` says, and reports the end of
each copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from memserve.actions import Copy, CopyDone
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Home, Tier, tier_of
from memserve.mempool.demands import Demands, counted
from memserve.mempool.grants import Counters, Grant, Reclaimed
from memserve.mempool.leases import Lease, Leases
from memserve.mempool.nodes import CachedPrefix, Pin
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.retiring import Retiring
from memserve.mempool.room import Capacity, Room
from memserve.tokens import TOKEN_BYTES, count, span


class Pool:
    """The calls of the paper's MemPool on one shard.

    ``lease_s``: how many seconds an owner may be silent before it loses its leases. ``caching``: without it,
    nothing is matched and retired pages stay with their lease. ``home``: the shard's number, and its
    incarnation of at most 32 bits, drawn at process start. Lease IDs carry the incarnation in their upper
    half, so that a lease of an earlier incarnation is unknown and cannot be mistaken for another.
    """

    def __init__(
        self,
        pages: int | Capacity,
        page_tokens: int,
        lease_s: float,
        *,
        caching: bool = True,
        home: Home | None = None,
    ) -> None:
        home = home or Home(0, 0)
        assert 0 <= home.incarnation < 2**32, f"incarnation {home.incarnation} does not fit 32 bits"
        self.page_tokens = page_tokens
        self.caching = caching
        self.home = home
        self.counters = Counters()
        self.tree = PromptTree(page_tokens)
        self.room = Room(pages if isinstance(pages, Capacity) else Capacity(pages), self.tree)
        self.total = self.room.capacity.device
        self.demands = Demands(self.room, page_tokens)
        self.leases = Leases(lease_s, (home.incarnation << 32) + 1)
        self._retiring = Retiring(self.tree, caching)
        self.loading: dict[int, Lease] = {}
        """Leases whose pages are being brought in, by ID."""

    # ---- the accounts --------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Number of device pages that hold nothing."""
        return self.room.free(Tier.DEVICE)

    @property
    def evictable_pages(self) -> int:
        """Number of device pages in the index that no lease pins."""
        return self.tree.evictable[Tier.DEVICE]

    @property
    def leased_pages(self) -> int:
        """Number of device pages private to a lease or to a copy."""
        return self.room.leased(Tier.DEVICE)

    @property
    def deadline(self) -> float:
        """When :meth:`expire` must be called next; infinity when no owner is known."""
        return self.leases.deadline

    # ---- granting ------------------------------------------------------------------------------------------

    def acquire(
        self,
        owner: ActorId,
        scope: str,
        tokens: bytes,
        extra_pages: int,
        now: float,
        swap_least: int = 0,
        uncached: bool = False,
    ) -> Grant | None:
        """match + pin + alloc_mem: device pages for all of ``tokens`` plus ``extra_pages``, all or nothing.

        At least one token is left to compute, so that there is a position to sample from; with ``uncached``
        all of them are. Cached pages in slower tiers are brought in if they hold at least ``swap_least``
        tokens, and then the grant is not ``ready``. None when pages are short at present (some may be on their
        way out). Raises PoolError when the pages could never be granted (see :class:`Demands`).
        """
        need = self.demands.pages(tokens, extra_pages)
        matchable = 0 if uncached else max(count(tokens) - 1, 0) // self.page_tokens * self.page_tokens
        pin = self._pin(scope, span(tokens, 0, matchable), Tier.DEVICE, swap_least)
        return self._open(owner, scope, pin, need - pin.tokens // self.page_tokens, Tier.DEVICE, now, tokens)

    def match(self, owner: ActorId, scope: str, tokens: bytes, now: float) -> Grant | None:
        """The longest cached prefix in whole pages, pinned for the caller by a lease on just these pages.

        Pages in host memory stay there. Pages on disk, which cannot be read in place, are brought in. The
        prefix has at most as many pages as the device tier. None when device pages for those on disk are
        short at present. Raises PoolError (NOT_WHOLE_PAGES).
        """
        self.demands.check_tokens(tokens)
        # A longer prefix might never fit, and would wait at the head of the queue forever.
        pin = self._pin(scope, span(tokens, 0, self.total * self.page_tokens), Tier.HOST)
        return self._open(owner, scope, pin, 0, Tier.HOST, now, tokens)

    def alloc_mem(self, owner: ActorId, lease: int, n: int, now: float, tier: int = 0) -> tuple[int, ...]:
        """``n`` more pages at the end of a lease's table, all or nothing; renews the owner.

        Never waits: missing pages are evicted at once. Raises PoolError (UNKNOWN_LEASE, NOT_OWNER, MOVING,
        BAD_COUNT, BAD_TIER, TOO_LARGE, NO_PAGES).
        """
        held = self.leases.get(owner, lease)
        where = self.demands.leasable(tier)
        self.demands.check_fits(sum(tier_of(page) == tier for page in held.pages) + counted(n), where)
        fresh = self._taken(n, where)
        self.leases.renew(owner, now)
        held.pages += fresh
        return tuple(fresh)

    def alloc_new(self, owner: ActorId, scope: str, n: int, tier: int, now: float) -> Grant:
        """``n`` pages of a tier under a new lease; otherwise like :meth:`alloc_mem`."""
        where = self.demands.leasable(tier)
        self.demands.check_fits(counted(n), where)
        fresh = self._taken(n, where)
        lease = self.leases.open(owner, scope, fresh, self.tree.pin(scope, b""), now)
        return Grant(lease.id, tuple(fresh), 0)

    # ---- index ---------------------------------------------------------------------------------------------

    def insert(
        self, owner: ActorId, lease: int, start: int, tokens: bytes, addresses: Sequence[Address] = ()
    ) -> int:
        """Retire whole pages of a lease: ``tokens``, at position ``start``, are filled and will not change.

        ``addresses`` names the pages that hold them, if their order is not the table's. The first of these
        may be pages that the index holds for the same tokens, as the caller's own match found them. Returns
        how many of the tokens the index already had. The lease's pages for those tokens stay private to the
        lease, which continues to read them, unless they are in a faster tier than the index's pages. A
        repeat, or an overlap with tokens retired before, counts as already there. Raises PoolError
        (UNKNOWN_LEASE, NOT_OWNER, MOVING, NOT_CONTIGUOUS, NOT_WHOLE_PAGES, DOES_NOT_FIT, TOKENS_CHANGED,
        FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD).
        """
        held = self.leases.get(owner, lease)
        done = self._retiring.insert(held, start, tokens, self.home.slots(addresses))
        self.room.give(done.replaced)
        self.counters.inserted_pages += done.new_pages
        self.counters.duplicate_pages += done.duplicate_pages
        self.counters.skipped_pages += done.skipped_pages
        return done.already_tokens

    def lend_prefix(self, owner: ActorId, scope: str, tokens: bytes, pages: int) -> Grant | None:
        """A lease on the longest cached prefix in device pages, and on fresh ones up to ``pages`` in all.

        Its owner never counts as silent. None when pages are short.
        """
        pin = self._pin(scope, tokens, Tier.DEVICE)
        fresh = max(0, pages - pin.tokens // self.page_tokens)
        return self._open(owner, scope, pin, fresh, Tier.DEVICE, math.inf, b"")

    def peek(self, scope: str, tokens: bytes) -> CachedPrefix:
        """The longest cached prefix at this moment. Nothing is pinned: :meth:`match` keeps the pages."""
        return self.tree.match(scope, tokens) if self.caching else CachedPrefix(0, ())

    def delete(self, scope: str, tokens: bytes) -> int:
        """Drop a prompt and everything that continues it, except what is pinned or shared.

        Returns the number of pages freed.
        """
        pages = self.tree.delete(scope, tokens)
        self.room.give(pages)
        self.counters.deleted_pages += len(pages)
        return len(pages)

    def evict(self, n: int, tier: int = Tier.DEVICE) -> int:
        """Free up to ``n`` unpinned pages of a tier, least recently used leaves first.

        Returns the number of pages freed. Raises PoolError (BAD_COUNT, BAD_TIER).
        """
        return self.room.evict(counted(n), self.demands.existing(tier))

    # ---- tiers ---------------------------------------------------------------------------------------------

    def swap_out(self, n: int, tier: int = Tier.DEVICE) -> list[int]:
        """Begin to move up to ``n`` unpinned pages to the next tier, least recently used first.

        Returns the IDs of the copies begun. Raises PoolError (BAD_COUNT, or BAD_TIER, also when there is no
        next tier).
        """
        where = self.demands.existing(tier)
        if self.room.swaps.below(where) is None:
            raise PoolError(PoolError.BAD_TIER, f"pages of tier {where.name} have no slower tier to go to")
        return self.room.send_out(where, counted(n), urgent=True)

    def swap_in(self, owner: ActorId, lease: int, now: float) -> Grant:
        """Bring a lease's indexed pages into the device tier, where they get new addresses.

        Never waits for pages, because the caller holds some that others may wait for. Raises PoolError
        (UNKNOWN_LEASE, NOT_OWNER, MOVING, PINNED, NO_PAGES).
        """
        held = self.leases.unlent(owner, lease)
        nodes = [node for node in held.pin.node.path() if node.tier > Tier.DEVICE]
        if any(node.pins > 1 for node in nodes):
            raise PoolError(
                PoolError.PINNED, f"others hold pages of lease {lease} at their present addresses"
            )
        needed = sum(len(node.pages) for node in nodes)
        slots = self.room.secure(needed)
        if slots is None:
            slots = self._taken(needed, Tier.DEVICE)
        self.leases.renew(owner, now)
        if nodes:
            self.room.swaps.bring_in(nodes, slots)
            self._load(held, Tier.DEVICE)
        return self._grant(held)

    def prefetch(self, owner: ActorId, scope: str, tokens: bytes, now: float) -> Grant | None:
        """Bring a prefix in ahead of the acquire that will want it, if free pages suffice.

        The caller ends the lease once it is ready. None when nothing is brought in.
        """
        slow = sum(tier_of(page) > Tier.DEVICE for page in self.peek(scope, tokens).pages)
        if not 0 < slow <= self.free_pages:
            return None
        grant = self._open(owner, scope, self._pin(scope, tokens, Tier.DEVICE), 0, Tier.DEVICE, now, b"")
        if grant is not None and grant.ready:  # others pin the slow pages where they are
            self.free_mem(owner, grant.lease)
            return None
        return grant

    def take_copies(self) -> list[Copy]:
        """Copies that the shell must make, returned once; each is answered by :meth:`copied`."""
        return self.room.swaps.take_copies()

    def copied(self, done: CopyDone) -> list[int]:
        """Handle the end of a copy.

        Leases that waited for pages which do not come have ended: returns their IDs, so that the calls can be
        repeated.
        """
        lost = self.room.swaps.finish(done)
        ended = [lease for lease in self.loading.values() if lease.in_vain(lost)]
        for lease in ended:
            self._close(lease)
        for node in lost:
            if node.parent is not None:
                self.room.give(self.tree.remove_subtree(node))
        return [lease.id for lease in ended]

    def settle(self) -> list[Grant]:
        """Grants of the leases whose pages are all there by now."""
        ready = []
        for lease in list(self.loading.values()):
            assert lease.floor is not None, "a lease at rest is filed as loading"
            if not _slow(lease.pin, lease.floor):
                del self.loading[lease.id]
                lease.floor = None
                self._reseat(lease)
                ready.append(self._grant(lease))
        return ready

    # ---- owners --------------------------------------------------------------------------------------------

    def adopt(self, owner: ActorId, lease: int, previous: ActorId, now: float) -> None:
        """Move a lease from ``previous`` to ``owner`` without touching a page. A repeat changes nothing.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER, MOVING).
        """
        if self.leases.owner_of(lease) == owner:
            return
        held = self.leases.get(previous, lease)
        self.leases.move(held, owner, now)
        self.counters.handed_over_pages += len(held.pages)

    def free_mem(self, owner: ActorId, lease: int, addresses: Sequence[Address] = ()) -> int:
        """End a lease, or give back some of its pages: unpin what is indexed, free the rest.

        Returns the number of pages freed. Retired pages go only with the whole lease. Raises PoolError
        (UNKNOWN_LEASE, NOT_OWNER; with addresses also MOVING, FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD,
        RETIRED).
        """
        held = self.leases.any(owner, lease)
        if addresses and not self._is_all_of(held, slots := self.home.slots(addresses)):
            return self._give_back(self.leases.unlent(owner, lease), slots)
        return self._close(held)

    def shrink(self, owner: ActorId, lease: int, pages: Sequence[int]) -> None:
        """Take pages back that were added to a lease and that its owner has not heard of.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER; RETIRED, NOT_HELD if it has used them after all).
        """
        self._give_back(self.leases.any(owner, lease), pages)

    def owner_of(self, lease: int) -> ActorId | None:
        """Owner of a lease; None when the lease has ended."""
        return self.leases.owner_of(lease)

    def renew(self, owner: ActorId, now: float) -> None:
        """Record that the owner was heard from."""
        self.leases.renew(owner, now)

    def expire(self, now: float) -> tuple[Reclaimed, ...]:
        """End the leases of owners that were silent for ``lease_s``.

        Returns one entry per owner, with or without leases.
        """
        reclaimed = tuple(self.drop_owner(owner) for owner in self.leases.silent(now))
        self.counters.expired_leases += sum(owner.leases for owner in reclaimed)
        return reclaimed

    def drop_owner(self, owner: ActorId) -> Reclaimed:
        """End all leases of an owner that is gone."""
        leases = self.leases.drop(owner)
        pages = sum(self._release(lease) for lease in leases)
        self.counters.reclaimed_pages += pages
        return Reclaimed(owner, len(leases), pages)

    # ---- inside --------------------------------------------------------------------------------------------

    def _pin(self, scope: str, tokens: bytes, floor: Tier, swap_least: int = 0) -> Pin:
        """Pin the longest cached prefix that can be had in tiers down to ``floor``, and is worth bringing in.

        Pages in slower tiers would have to move. The prefix ends before any that others hold at their present
        addresses, and before any from which on there are fewer than ``swap_least`` tokens.
        """
        pin = self.tree.pin(scope, tokens if self.caching else b"")
        end = 0
        for node in reversed(list(pin.node.path())):
            few = pin.tokens - end // TOKEN_BYTES < swap_least
            if node.tier > floor and node.moving is None and (node.pins > 1 or few):
                self.tree.unpin(pin)
                return self.tree.pin(scope, tokens[:end])
            end += len(node.key)
        return pin

    def _open(
        self, owner: ActorId, scope: str, pin: Pin, fresh: int, floor: Tier, now: float, asked: bytes
    ) -> Grant | None:
        """Open a lease on a pinned prefix and ``fresh`` device pages, and bring in what lies below ``floor``.

        None, with the pin ended, when the device pages for that are short at present.
        """
        path = list(pin.node.path())
        nodes = [node for node in reversed(path) if node.tier > floor and node.moving is None]
        slots = self.room.secure(fresh + sum(len(node.pages) for node in nodes))
        if slots is None:
            self.tree.unpin(pin)
            return None
        lease = self.leases.open(owner, scope, self.tree.pages_of(pin) + slots[:fresh], pin, now)
        lease.requested_tokens = count(asked)
        lease.found_pages = tuple(sum(len(n.pages) for n in path if n.tier == tier) for tier in Tier)
        if _slow(pin, floor):
            self.room.swaps.bring_in(nodes, slots[fresh:])
            self._load(lease, floor)
        return self._grant(lease)

    def _load(self, lease: Lease, floor: Tier) -> None:
        lease.floor = floor
        self.loading[lease.id] = lease

    def _grant(self, lease: Lease) -> Grant:
        ready = lease.floor is None
        if ready and lease.requested_tokens:
            self.counters.requested_tokens += lease.requested_tokens
            self.counters.matched_tokens += lease.retired_tokens
            self.counters.matched_host_tokens += lease.found_pages[Tier.HOST] * self.page_tokens
            self.counters.matched_disk_tokens += lease.found_pages[Tier.DISK] * self.page_tokens
            lease.requested_tokens = 0
        return Grant(lease.id, tuple(lease.pages), lease.retired_tokens, ready, lease.found_pages)

    def _reseat(self, lease: Lease) -> None:
        """Write the present slots of the pinned prefix into a lease's table, except for kept pages."""
        kept = set(lease.kept)
        for i, page in enumerate(self.tree.pages_of(lease.pin)):
            if lease.pages[i] not in kept:
                lease.pages[i] = page

    def _is_all_of(self, lease: Lease, slots: Sequence[int]) -> bool:
        return len(slots) == len(lease.pages) and set(slots) == set(lease.pages)

    def _give_back(self, lease: Lease, slots: Sequence[int]) -> int:
        """Free some of a lease's pages that are not retired."""
        retired = lease.retired_tokens // self.page_tokens
        own, gone = set(lease.pages[retired:]), set(slots)
        if not gone.isdisjoint(lease.pages[:retired]):
            raise PoolError(
                PoolError.RETIRED, f"pages that lease {lease.id} has retired go with the lease only"
            )
        if len(gone) < len(slots) or not gone <= own:
            raise PoolError(
                PoolError.NOT_HELD, f"lease {lease.id} does not hold all of these pages, or not twice"
            )
        lease.pages = [page for page in lease.pages if page not in gone]
        self.room.give(list(slots))
        return len(slots)

    def _close(self, lease: Lease) -> int:
        if lease.lent:
            self.leases.keep(lease)
            return 0
        self.leases.close(lease)
        return self._release(lease)

    def _release(self, lease: Lease) -> int:
        """Return the pages and the pin of a lease that is no longer recorded."""
        self.loading.pop(lease.id, None)
        private = lease.private(self.page_tokens)
        self.room.give(private)
        self.tree.unpin(lease.pin)
        return len(private)

    def _taken(self, n: int, tier: Tier) -> list[int]:
        slots = self.room.take(n, tier)
        if slots is None:
            free, evictable = self.room.free(tier), self.tree.evictable[tier]
            raise PoolError(
                PoolError.NO_PAGES,
                f"{n} pages of tier {tier.name} asked for: {free} free, {evictable} evictable",
            )
        return slots


def _slow(pin: Pin, floor: int) -> bool:
    """Whether pages of a pinned prefix are not where they will stay: below ``floor``, or being moved."""
    return any(node.tier > floor or node.moving is not None for node in pin.node.path())
