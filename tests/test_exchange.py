"""Two shards, and clients that use every call over both and die at random: balanced accounts and right bytes."""

from __future__ import annotations

import attrs
import pytest

from exchange_world import PAGE_BYTES, Pair
from memserve.actions import Copy, CopyDone, Kill, MoverOrder, Overslept, Send
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Tier
from memserve.mempool.room import Capacity
from memserve.messages import Gone, Load, Member
from memserve.pool_messages import (
    Acquire,
    Acquired,
    AllocMem,
    Arrival,
    Insert,
    Inserted,
    NextArrival,
    Prefetch,
    Source,
)
from memserve.tokens import TOKEN_BYTES, pack
from memserve.transfer.actions import Probe
from memserve.transfer_messages import Granularity, Purpose, TransferGranted, TransferOffer, TransferSent
from shard_clients import PAGE
from test_swaps import stored

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


def test_prefixes_that_are_lost_on_their_way_in_hold_no_handoff_up() -> None:
    """If one of two was forgotten, the requests that are handed over meanwhile would wait for it for ever."""
    site = Pair(0, (Capacity(12, 0, 8), Capacity(12))).sites[0]
    core, tokens = site.core, pack(range(4 * PAGE))
    stored(core.pool, tokens[: 2 * PAGE * TOKEN_BYTES], [(Tier.DEVICE, 2)])
    sources = [Source(site.other.core.me, 4 * PAGE, 1.0, request=f"r{i}", ahead=True) for i in (1, 2)]
    for source in sources:
        core.receive("p.1", Prefetch("anne", tokens, source), 0.0)
    (copy,) = [action for action in core.take() if isinstance(action, Copy)]
    for i, source in enumerate(sources, 1):
        core.receive(f"d.{i}", Acquire(1, "anne", tokens, 0, attrs.evolve(source, ahead=False)), 0.0)
    core.receive(core.me, CopyDone(copy.id, (copy.runs[0][0],)), 0.0)
    core.check()
    heard: list[ActorId] = []
    for second in range(1, 6):
        core.advance(float(second))
        core.check()
        heard += [
            one.to for one in core.take() if isinstance(one, Send) and isinstance(one.message, Acquired)
        ]
    assert sorted(heard) == ["d.1", "d.2"]


def offer(pages: int) -> TransferOffer:
    """A transfer of the other shard's, of new pages for a client here."""
    size, way = (PAGE_BYTES, 1, Granularity.AGGREGATED), ("host", 1, ("mapped",))
    return TransferOffer(1, pages, *size, *way, 5.0, Purpose(owner="c.1", caller="c.2"))


def test_the_dead_are_killed_before_another_shard_is_told_of_their_pages() -> None:
    """If the grant went first, a worker in the middle of a step could write over what the other shard sends."""
    site = Pair(0, (Capacity(4), Capacity(4))).sites[0]
    core = site.core
    core.receive("p.1", Load(Member("p.1", "PrefillWorker", "", 1, "ready")), 0.0)
    core.receive("p.1", Acquire(1, "anne", b"", 4), 0.0)
    core.take()
    core.receive("g.1", Gone(("p.1",)), 0.0)  # both come in one turn of the shell
    core.receive("s1.1", offer(4), 0.0)
    killed, *rest = core.take()
    assert isinstance(killed, Kill)
    assert [type(one.message) for one in rest if isinstance(one, Send)] == [TransferGranted]


def test_a_shard_that_was_stopped_keeps_what_has_arrived() -> None:
    """The claim is still in its inbox: the sender was told that its pages are there."""
    core = Pair(0, (Capacity(4), Capacity(4))).sites[0].core
    core.receive("s1.1", offer(4), 0.0)
    core.receive("s1.1", TransferSent(1), 0.0)
    core.receive(core.me, Overslept(), 60.0)
    core.advance(60.0)
    core.receive("c.1", NextArrival(1), 60.0)
    assert [type(one.message) for one in core.take() if isinstance(one, Send)][-1] is Arrival


def test_pages_that_a_transfer_fills_cannot_be_inserted() -> None:
    """If they could, others would match bytes that are not there yet."""
    core = Pair(0, (Capacity(4), Capacity(4))).sites[0].core
    core.receive("c.1", AllocMem(1, 0, 2, 0, "x"), 0.0)
    lease = core.take()[-1].message
    there = core.pool.home.addresses(lease.pages)
    core.receive("s1.1", attrs.evolve(offer(2), purpose=Purpose(there, lease.lease, "c.1")), 0.0)
    core.receive("c.1", Insert(2, lease.lease, 0, pack(range(2 * PAGE))), 0.0)
    assert core.take()[-1].message.code == PoolError.MOVING
    core.receive("s1.1", TransferSent(1), 0.0)
    core.receive("c.1", Insert(3, lease.lease, 0, pack(range(2 * PAGE))), 0.0)
    assert core.take()[-1].message == Inserted(3, 0)


def test_pages_of_a_sender_that_has_ended_come_free_without_an_announcement() -> None:
    """A program's own shard belongs to no cluster: each that crashed in the middle would cost pages for good."""
    core = Pair(0, (Capacity(4), Capacity(4))).sites[0].core
    core.receive("s1.1", offer(4), 0.0)
    core.advance(5.0)
    core.advance(20.0)
    assert core.pool.free_pages == 0
    probes = [one.order for one in core.take() if isinstance(one, MoverOrder)]
    assert probes and set(probes) == {Probe("s1.1", 1)}
    core.receive(core.me, Gone(("s1.1",)), 20.0)
    core.check()
    assert core.pool.free_pages == 4
