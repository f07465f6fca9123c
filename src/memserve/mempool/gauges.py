"""A pool's figures, for heartbeats, metrics and ``memserve status``."""

from __future__ import annotations

import attrs

from memserve.mempool.addresses import Tier
from memserve.mempool.pool import Pool

NAMES = {Tier.DEVICE: "pages", Tier.HOST: "host_pages", Tier.DISK: "disk_pages"}
"""Prefix of the names of each tier's figures."""


def pool_gauges(pool: Pool) -> dict[str, float]:
    """A pool's figures by name, with units in the names.

    ``_total`` figures only grow, except the sizes of the tiers.
    """
    swaps = pool.room.swaps
    figures = attrs.asdict(pool.counters)
    figures |= {
        "evicted_pages": pool.room.evicted_pages,
        "swapped_out_pages": swaps.out_pages,
        "swapped_in_pages": swaps.in_pages,
        "bad_pages": swaps.bad_pages,
    }
    tiers = [_pages(pool, tier) for tier in Tier if tier in pool.room.tiers]
    return {
        **{name: value for tier in tiers for name, value in tier.items()},
        "leases": len(pool.leases),
        "copies_under_way": len(swaps),
        **{f"{name}_total": value for name, value in figures.items()},
    }


def _pages(pool: Pool, tier: Tier) -> dict[str, float]:
    name, room = NAMES[tier], pool.room
    return {
        f"{name}_total": room.total(tier),
        f"{name}_free": room.free(tier),
        f"{name}_leased": room.leased(tier),
        f"{name}_indexed": pool.tree.indexed[tier],
        f"{name}_evictable": pool.tree.evictable[tier],
    }
