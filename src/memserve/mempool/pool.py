"""The MemPool of one shard: pages, index and leases together, and the calls that move pages between them.

Every page is exactly one of

    free      in :class:`Pages`
    leased    private to one lease: being filled, or a duplicate of what the index holds
    indexed   in :class:`PromptTree`, pinned by any number of leases or by none (then it is evictable)

and after every call ``free + leased + indexed == total``. A refused call raises PoolError and has changed
nothing. The pool holds page numbers only: bytes are written and read by the workers that map the arena.
"""

from __future__ import annotations

import attrs

from memserve.errors import PoolError
from memserve.mempool.leases import Lease, Leases
from memserve.mempool.pages import Pages
from memserve.mempool.prompt_tree import Match, PromptTree
from memserve.messages import ActorId
from memserve.tokens import TOKEN_BYTES, count, pages_for, span


@attrs.frozen
class Grant:
    """A new lease.

    ``pages[i]`` holds tokens ``i * page_tokens`` onwards; the first ``cached_tokens`` are filled.
    """

    lease: int
    pages: tuple[int, ...]
    cached_tokens: int


@attrs.frozen
class Reclaimed:
    """What an owner left behind."""

    owner: ActorId
    leases: int
    pages: int
    """Pages that came free; the retired ones stay in the index."""


@attrs.define
class Counters:
    """Running totals since the shard started."""

    requested_tokens: int = 0
    """Prompt tokens of all granted acquires."""
    matched_tokens: int = 0
    """Those of them that were cached."""
    inserted_pages: int = 0
    duplicate_pages: int = 0
    """Retired pages whose tokens the index had in other pages."""
    skipped_pages: int = 0
    """Retired pages that were not indexed because caching is off."""
    evicted_pages: int = 0
    deleted_pages: int = 0
    reclaimed_pages: int = 0
    """Pages of leases that ended because their owner died or fell silent."""
    expired_leases: int = 0
    handed_over_pages: int = 0
    handed_over_bytes_copied: int = 0
    """Bytes of KV moved by hand-overs.

    :meth:`Pool.adopt` moves none; whoever adds a copying path adds to this.
    """


class Pool:
    """The calls of the paper's MemPool on one shard of ``pages`` pages of ``page_tokens`` tokens.

    ``lease_s``: seconds an owner may be silent before it loses its leases. ``caching``: without it nothing is
    matched and retired pages stay with their lease. ``incarnation``: a number of at most 32 bits drawn at
    process start; lease ids carry it in their upper half, so that a lease of an earlier run is unknown rather
    than somebody else's.
    """

    def __init__(
        self, pages: int, page_tokens: int, lease_s: float, *, caching: bool = True, incarnation: int = 0
    ) -> None:
        assert 0 <= incarnation < 2**32, f"incarnation {incarnation} does not fit 32 bits"
        self.total = pages
        self.page_tokens = page_tokens
        self.caching = caching
        self.counters = Counters()
        self._pages = Pages(pages)
        self._tree = PromptTree(page_tokens)
        self._leases = Leases(lease_s, (incarnation << 32) + 1)

    # ---- the accounts --------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self._pages.free_count

    @property
    def indexed_pages(self) -> int:
        """Pages in the index, pinned or not."""
        return self._tree.pages_total

    @property
    def evictable_pages(self) -> int:
        """Pages in the index that no lease pins."""
        return self._tree.evictable_pages

    @property
    def leased_pages(self) -> int:
        """Pages private to a lease."""
        return self.total - self.free_pages - self.indexed_pages

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return len(self._leases)

    @property
    def deadline(self) -> float:
        """When :meth:`expire` must be called next; infinity when nobody is known."""
        return self._leases.deadline

    # ---- granting ------------------------------------------------------------------------------------------

    def demand(self, tokens: bytes, extra_pages: int) -> int:
        """Pages that :meth:`acquire` would grant.

        Raises PoolError (TOO_LARGE, NOT_WHOLE_PAGES) if it never could.
        """
        if len(tokens) % TOKEN_BYTES or extra_pages < 0:
            raise PoolError(
                PoolError.NOT_WHOLE_PAGES,
                f"{len(tokens)} bytes of tokens and {extra_pages} extra pages: expected multiples of "
                f"{TOKEN_BYTES} bytes and 0 pages or more",
            )
        need = pages_for(count(tokens), self.page_tokens) + extra_pages
        self._fits(need)
        return need

    def acquire(
        self, owner: ActorId, scope: str, tokens: bytes, extra_pages: int, now: float
    ) -> Grant | None:
        """match + pin + alloc_mem: pages for all of ``tokens`` and ``extra_pages`` more, all or nothing.

        At least one token is left to compute, so that there is a position to sample from. Evicts when free
        pages are short. None when pages are short at present; raises PoolError when they always would be (see
        :meth:`demand`).
        """
        need = self.demand(tokens, extra_pages)
        pin = self._tree.pin(scope, self._matchable(tokens))
        pages = self._tree.pages_of(pin)
        fresh = self._take(need - len(pages))
        if fresh is None:
            self._tree.unpin(pin)
            return None
        lease = self._leases.open(owner, scope, pages + fresh, pin, now)
        self.counters.requested_tokens += count(tokens)
        self.counters.matched_tokens += pin.tokens
        return Grant(lease.id, tuple(lease.pages), pin.tokens)

    def alloc_mem(self, owner: ActorId, lease: int, n: int, now: float) -> tuple[int, ...]:
        """``n`` more pages at the end of a lease's table, all or nothing; renews the owner.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER, TOO_LARGE, NO_PAGES).
        """
        held = self._leases.get(owner, lease)
        if n < 0:
            raise PoolError(
                PoolError.NOT_WHOLE_PAGES, f"{n} pages asked for lease {lease}: expected 0 or more"
            )
        self._fits(len(held.pages) + n)
        fresh = self._take(n)
        if fresh is None:
            raise PoolError(
                PoolError.NO_PAGES,
                f"lease {lease} asked for {n}: {self.free_pages} free, {self.evictable_pages} evictable",
            )
        self._leases.renew(owner, now)
        held.pages += fresh
        return tuple(fresh)

    # ---- index ---------------------------------------------------------------------------------------------

    def insert(self, owner: ActorId, lease: int, start: int, tokens: bytes) -> int:
        """Retire whole pages of a lease: ``tokens``, at position ``start``, are filled and will not change.

        Answers how many of these tokens the index already had. Their pages stay private to the lease, which
        goes on reading them; deeper new pages go below the ones that were there first. A repeat, or an
        overlap with what was retired before, counts as already there. Raises PoolError (UNKNOWN_LEASE,
        NOT_OWNER, NOT_CONTIGUOUS, NOT_WHOLE_PAGES).
        """
        held = self._leases.get(owner, lease)
        self._check_span(held, start, tokens)
        repeated = min(held.retired_tokens - start, count(tokens))
        fresh = span(tokens, repeated, count(tokens))
        if not self.caching:
            self._keep(held, fresh)
            return 0
        if repeated and not self._tree.spells(held.pin, start, span(tokens, 0, repeated)):
            raise PoolError(
                PoolError.NOT_CONTIGUOUS, f"lease {lease} retired other tokens at position {start} before"
            )
        return repeated + self._retire(held, fresh)

    def match(self, scope: str, tokens: bytes) -> Match:
        """The longest cached prefix at this moment. Nothing is pinned: :meth:`acquire` is what keeps it."""
        return self._tree.match(scope, tokens) if self.caching else Match(0, ())

    def delete(self, scope: str, tokens: bytes) -> int:
        """Drop a prompt and all that continues it, but for what is pinned or shared; the pages freed."""
        pages = self._tree.delete(scope, tokens)
        self._pages.give(pages)
        self.counters.deleted_pages += len(pages)
        return len(pages)

    def evict(self, n: int) -> int:
        """Free up to ``n`` unpinned pages, least recently used leaves first; the pages freed."""
        pages = self._tree.evict(n)
        self._pages.give(pages)
        self.counters.evicted_pages += len(pages)
        return len(pages)

    # ---- owners --------------------------------------------------------------------------------------------

    def adopt(self, owner: ActorId, lease: int, previous: ActorId, now: float) -> None:
        """Move a lease from ``previous`` to ``owner``; no page is touched. A repeat changes nothing.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER).
        """
        if self._leases.owner_of(lease) == owner:
            return
        held = self._leases.get(previous, lease)
        self._leases.move(held, owner, now)
        self.counters.handed_over_pages += len(held.pages)

    def free_mem(self, owner: ActorId, lease: int) -> int:
        """End a lease: unpin what is indexed, free the rest; the pages freed.

        Raises PoolError (UNKNOWN_LEASE, NOT_OWNER).
        """
        held = self._leases.get(owner, lease)
        self._leases.close(held)
        return self._release(held)

    def owner_of(self, lease: int) -> ActorId | None:
        """Who holds a lease; None when it has ended."""
        return self._leases.owner_of(lease)

    def renew(self, owner: ActorId, now: float) -> None:
        """The owner was heard from."""
        self._leases.renew(owner, now)

    def expire(self, now: float) -> tuple[Reclaimed, ...]:
        """End the leases of owners silent for ``lease_s``; one entry an owner, with or without leases."""
        reclaimed = tuple(self.drop_owner(owner) for owner in self._leases.silent(now))
        self.counters.expired_leases += sum(owner.leases for owner in reclaimed)
        return reclaimed

    def drop_owner(self, owner: ActorId) -> Reclaimed:
        """The owner is gone: end all of its leases."""
        leases = self._leases.drop(owner)
        pages = sum(self._release(lease) for lease in leases)
        self.counters.reclaimed_pages += pages
        return Reclaimed(owner, len(leases), pages)

    def check(self) -> None:
        """Assert that the parts are sound, that every page is in one place, and that the accounts balance."""
        self._pages.check()
        self._tree.check()
        self._leases.check()
        assert self._tree.pins == len(self._leases), f"{self._tree.pins} pins for {len(self._leases)} leases"
        private = [page for lease in self._leases for page in lease.private(self.page_tokens)]
        indexed = self._tree.all_pages()
        assert len(set(private)) == len(private), "a page is private to two leases"
        assert not set(private) & set(indexed), "a page is private to a lease and indexed"
        balance = self.free_pages + len(private) + len(indexed)
        assert balance == self.total, (
            f"{self.free_pages} free + {len(private)} leased + {len(indexed)} indexed, not {self.total}"
        )
        for lease in self._leases:
            self._check_lease(lease)

    # ---- inside --------------------------------------------------------------------------------------------

    def _check_lease(self, lease: Lease) -> None:
        retired = lease.retired_tokens // self.page_tokens
        assert retired <= len(lease.pages), f"lease {lease.id} retired more pages than it has"
        if not self.caching:
            assert lease.kept == lease.pages[:retired], f"lease {lease.id} lost pages without caching"
            assert not lease.pin.tokens, f"lease {lease.id} pins without caching"
            return
        assert lease.pin.tokens == lease.retired_tokens, f"lease {lease.id} does not pin all it retired"
        kept = set(lease.kept)
        own = [page for page in lease.pages[:retired] if page in kept]
        assert own == lease.kept, f"lease {lease.id} keeps pages outside its retired part"
        for page, canonical in zip(lease.pages, self._tree.pages_of(lease.pin), strict=False):
            assert page == canonical or page in kept, (
                f"lease {lease.id} reads page {page}, which it does not hold"
            )

    def _fits(self, pages: int) -> None:
        if pages > self.total:
            raise PoolError(PoolError.TOO_LARGE, f"{pages} pages needed, and the whole pool has {self.total}")

    def _matchable(self, tokens: bytes) -> bytes:
        """The whole pages before the last token, or nothing without caching."""
        if not self.caching:
            return b""
        return span(tokens, 0, max(count(tokens) - 1, 0) // self.page_tokens * self.page_tokens)

    def _take(self, n: int) -> list[int] | None:
        """``n`` free pages, evicting just as many as are missing; None when even that would not do."""
        missing = n - self.free_pages
        if missing > self.evictable_pages:
            return None
        if missing > 0:
            self.evict(missing)
        return self._pages.take(n)

    def _check_span(self, lease: Lease, start: int, tokens: bytes) -> None:
        page_bytes = self.page_tokens * TOKEN_BYTES
        if len(tokens) % page_bytes or start % self.page_tokens:
            raise PoolError(
                PoolError.NOT_WHOLE_PAGES,
                f"{len(tokens)} bytes of tokens at {start} are not whole pages of {self.page_tokens} tokens",
            )
        if not 0 <= start <= lease.retired_tokens:
            raise PoolError(
                PoolError.NOT_CONTIGUOUS,
                f"insert at position {start}, but lease {lease.id} has retired {lease.retired_tokens} tokens",
            )
        if start + count(tokens) > len(lease.pages) * self.page_tokens:
            raise PoolError(
                PoolError.NOT_WHOLE_PAGES,
                f"insert up to {start + count(tokens)}, but lease {lease.id} has {len(lease.pages)} pages",
            )

    def _offered(self, lease: Lease, tokens: bytes) -> list[int]:
        """The lease's own pages that ``tokens``, next to be retired, are in."""
        first = lease.retired_tokens // self.page_tokens
        return lease.pages[first : first + count(tokens) // self.page_tokens]

    def _keep(self, lease: Lease, tokens: bytes) -> None:
        """Retire ``tokens`` without indexing them."""
        pages = self._offered(lease, tokens)
        lease.kept += pages
        lease.retired_tokens += count(tokens)
        self.counters.skipped_pages += len(pages)

    def _retire(self, lease: Lease, tokens: bytes) -> int:
        """Put ``tokens`` into the index; how many of them were there already."""
        pages = self._offered(lease, tokens)
        found = self._tree.insert(lease.pin, tokens, pages)
        lease.kept += found.duplicates
        lease.retired_tokens += count(tokens)
        self.counters.duplicate_pages += len(found.duplicates)
        self.counters.inserted_pages += len(pages) - len(found.duplicates)
        return found.already_tokens

    def _release(self, lease: Lease) -> int:
        """Return the pages and the pin of a lease that is no longer in the books."""
        private = lease.private(self.page_tokens)
        self._pages.give(private)
        self._tree.unpin(lease.pin)
        return len(private)
