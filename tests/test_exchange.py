"""Two shards, and clients that use every call over both and die at random: balanced accounts and right bytes."""

from __future__ import annotations

import pytest

from exchange_world import Pair
from memserve.errors import PoolError
from memserve.mempool.addresses import Tier
from memserve.mempool.room import Capacity

SIZES = [
    (Capacity(20, 10, 12, 0.2, 0.4), Capacity(20, 10, 12, 0.2, 0.4)),
    (Capacity(14, 0, 20, 0.1, 0.3), Capacity(30)),
    (Capacity(40), Capacity(40)),
    (Capacity(16, 8), Capacity(12)),
]


@pytest.mark.parametrize("seed", range(24))
def test_random_calls_over_two_shards(seed: int) -> None:
    """Random fetches, handoffs, transfers and other calls over a connection that loses and repeats messages leave
    nothing leased."""
    pair = Pair(seed, SIZES[seed % len(SIZES)])
    pair.run(800)
    pair.end()
    for site in pair.sites:
        pool = site.core.pool
        assert not len(pool.leases), list(pool.leases)
        assert not any(pool.room.leased(tier) for tier in Tier)
        assert not len(site.core.exchange.outgoing)
        assert not len(site.core.exchange.incoming)


def test_the_random_calls_do_reach_what_they_are_for() -> None:
    """The random calls meet every kind of success and failure of a transfer often enough to test them."""
    seen: dict[str, int] = {}
    for seed in range(8):
        pair = Pair(seed, SIZES[seed % len(SIZES)])
        pair.run(1500)
        for site in pair.sites:
            seen = {name: seen.get(name, 0) + site.seen.get(name, 0) for name in {*seen, *site.seen}}
    wanted = {"Wrote", "WriteFailed", "fetched", "Transferred", "Arrival", "filled", "claimed", "died"}
    codes = {PoolError.CUT, PoolError.NO_PAGES, PoolError.DEADLINE, PoolError.MOVING, PoolError.BAD_TIER}
    assert not {name for name in wanted | codes if seen.get(name, 0) < 3}, seen
