"""All invariants of a pool, to be checked when idle, in tests and in the simulator."""

from __future__ import annotations

from memserve.mempool.addresses import Tier, tier_of
from memserve.mempool.leases import Lease
from memserve.mempool.pool import Pool
from memserve.mempool.tree_audit import check_tree


def check_pool(pool: Pool) -> None:
    """Assert that the parts are sound, every page is in one place, and the accounts of every tier balance."""
    pool.room.tiers.check()
    check_tree(pool.tree)
    pool.leases.check()
    assert len(pool.tree.pins) == len(pool.leases), f"{len(pool.tree.pins)} pins, {len(pool.leases)} leases"
    private = [page for lease in pool.leases for page in lease.private(pool.page_tokens)]
    copying, indexed = pool.room.swaps.copying(), pool.tree.all_pages()
    held = [*private, *copying, *indexed]
    assert len(set(held)) == len(held), "a page is in two of: a lease, a copy's target, the index"
    for tier in Tier:
        used = sum(tier_of(page) == tier for page in held)
        free, total = pool.room.free(tier), pool.room.total(tier)
        assert free + used == total, f"{tier.name}: {free} free + {used} leased or indexed, not {total}"
    loading = {lease.id for lease in pool.leases if lease.floor is not None}
    assert loading == set(pool.loading), "leases that wait for copies are filed wrongly"
    for lease in pool.leases:
        _check_lease(pool, lease)


def _check_lease(pool: Pool, lease: Lease) -> None:
    retired = lease.retired_tokens // pool.page_tokens
    assert retired <= len(lease.pages), f"lease {lease.id} retired more pages than it has"
    if not pool.caching:
        assert lease.kept == lease.pages[:retired], f"lease {lease.id} lost pages without caching"
        assert not lease.pin.tokens, f"lease {lease.id} pins without caching"
        return
    assert lease.pin.tokens == lease.retired_tokens, f"lease {lease.id} does not pin all it retired"
    kept = set(lease.kept)
    own = [page for page in lease.pages[:retired] if page in kept]
    assert own == lease.kept, f"lease {lease.id} keeps pages outside its retired part"
    if lease.floor is not None:
        _check_loading(pool, lease)
        return
    for page, canonical in zip(lease.pages, pool.tree.pages_of(lease.pin), strict=False):
        assert page == canonical or page in kept, (
            f"lease {lease.id} reads page {page}, which it does not hold"
        )


def _check_loading(pool: Pool, lease: Lease) -> None:
    assert lease.floor is not None, "a lease at rest loads nothing"
    slow = [node for node in lease.pin.node.path() if node.tier > lease.floor]
    abandoned = any(move.node is None for move in pool.room.swaps.moves())  # at its end, the lease ends too
    for node in slow:
        coming = node.moving is not None and node.moving.inbound
        assert coming or (node.moving is None and abandoned), f"lease {lease.id} waits for no copy"
