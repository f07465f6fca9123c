"""Copies between tiers, one at a time: what waits for what, what the shell is asked to do, and what happens when it
fails."""

import pytest

from memserve.actions import Copy, CopyDone, Kill, Log, Send
from memserve.errors import PoolError, UserError
from memserve.mempool.addresses import Tier, slot
from memserve.mempool.audit import check_pool
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.messages import Gone, Load, Member
from memserve.pool_messages import Acquire, Allocated, AllocMem, FreeMem, Insert
from memserve.tokens import pack

PAGE = 2


def stored(pool, tokens, tiers):
    """Insert a prompt and swap its tail out, as many pages from each tier as given."""
    grant = pool.acquire("p.1", "anne", tokens, 0, 0.0)
    pool.insert("p.1", grant.lease, 0, tokens)
    pool.free_mem("p.1", grant.lease)
    for tier, pages in tiers:
        pool.swap_out(pages, tier)
        for copy in pool.take_copies():
            pool.copied(CopyDone(copy.id))


def test_a_match_longer_than_the_arena_is_cut_and_does_not_wait_for_ever():
    """A match longer than the device tier is cut to what fits, instead of waiting for ever."""
    pool = Pool(Capacity(6, 6, 12, 0.0, 0.0), PAGE, 10.0)
    first, second = pack(range(12)), pack(range(24))
    stored(pool, first, [(0, 6), (1, 6)])
    lease = pool.alloc_new("p.2", "anne", 6, 0, 0.0)
    pin = pool.tree.pin("anne", first)
    slots = pool.room.take(6, Tier.DISK)
    pool.tree.insert(pin, second[len(first) :], slots)
    pool.tree.unpin(pin)
    pool.free_mem("p.2", lease.lease)
    assert pool.peek("anne", second).tokens == 24

    grant = pool.match("p.1", "anne", second, 0.0)
    assert not grant.ready
    assert grant.cached_tokens == 12
    check_pool(pool)


def test_two_who_hold_half_each_do_not_wait_for_one_another():
    """A swap-in that finds no free pages is refused: two callers that hold pages must not wait for each other."""
    pool = Pool(Capacity(4, 4, 0, 0.0, 0.0), PAGE, 10.0)
    leases = []
    for owner, token in (("p.1", 1), ("p.2", 2)):
        stored(pool, pack([token] * 4), [(0, 2)])
        leases.append((owner, pool.match(owner, "anne", pack([token] * 4), 0.0).lease))
        assert pool.acquire(owner, "anne", b"", 2, 0.0).ready
    for owner, lease in leases:
        with pytest.raises(PoolError, match="no_pages"):
            pool.swap_in(owner, lease, 0.0)


def test_a_tier_that_is_too_large_to_be_addressed_says_so():
    """If it ended in a traceback, the user would not know which size to change."""
    with pytest.raises(UserError, match="tier disk of the pool would have 134217729 pages"):
        Pool(Capacity(4, 0, (1 << 27) + 1), PAGE, 10.0)


def test_a_page_is_in_one_piece_with_its_neighbours():
    """Neighbouring pages are swapped as one run."""
    pool = Pool(Capacity(8, 8, 0, 0.0, 0.0), PAGE, 10.0)
    grant = pool.acquire("p.1", "anne", pack(range(16)), 0, 0.0)
    pool.insert("p.1", grant.lease, 0, pack(range(16)))
    pool.free_mem("p.1", grant.lease)
    pool.swap_out(8)
    (copy,) = pool.take_copies()
    assert copy.runs == ((0, slot(Tier.HOST, 0), 8),)


def test_a_disk_that_cannot_be_written_is_left_alone_and_nothing_is_lost():
    """After a failed write the pages stay where they are, and the disk is not used any more."""
    pool = Pool(Capacity(4, 0, 8, 0.0, 0.0), PAGE, 10.0)
    grant = pool.acquire("p.1", "anne", pack(range(8)), 0, 0.0)
    pool.insert("p.1", grant.lease, 0, pack(range(8)))
    pool.free_mem("p.1", grant.lease)
    pool.swap_out(4)
    (copy,) = pool.take_copies()
    pool.copied(CopyDone(copy.id, (1,)))
    check_pool(pool)

    assert pool.peek("anne", pack(range(8))).pages == (0, 1, 2, 3)
    with pytest.raises(PoolError, match="bad_tier"):
        pool.swap_out(1)
    assert len(pool.acquire("p.1", "bob", pack(range(8)), 0, 0.0).pages) == 4  # drops instead


def test_a_grant_waits_for_its_own_room_and_the_next_one_goes_on():
    """A request waits only for the swap-in of its own pages, and the next one is granted meanwhile."""
    core = ShardCore(Pool(Capacity(6, 6, 0, 0.0, 0.0), PAGE, 10.0))
    stored(core.pool, pack([1] * 8), [(0, 4)])
    core.receive("p.1", Acquire(1, "anne", pack([1] * 9), 0), 0.0)  # brings four pages in
    core.receive("p.2", Acquire(1, "anne", pack([2]), 0), 0.0)
    copy, answer = core.take()
    assert isinstance(copy, Copy)
    assert (answer.to, answer.message.call) == ("p.2", 1)
    core.receive("s0.1", CopyDone(copy.id), 0.0)
    (answer,) = core.take()
    assert (answer.to, answer.message.cached_tokens) == ("p.1", 8)
    core.check()


def test_the_dead_are_killed_before_anything_is_copied_into_their_pages():
    """A dead owner is killed before anything is copied into its pages: it might only be stopped."""
    core = ShardCore(Pool(Capacity(4, 4, 0, 0.0, 0.0), PAGE, 10.0))
    stored(core.pool, pack([1] * 8), [(0, 4)])
    core.receive("p.1", Load(Member("p.1", "PrefillWorker", "", 1, "ready")), 0.0)
    core.receive("p.1", Acquire(1, "anne", b"", 4), 0.0)
    core.receive("p.2", Acquire(1, "anne", pack([1] * 8), 0), 0.0)
    core.take()
    core.receive("g.1", Gone(("p.1",)), 0.0)
    assert [type(action) for action in core.take()] == [Kill, Log, Copy]


class Shard:
    """A core whose arena is full of cached pages, with a client that holds one page."""

    def __init__(self, host=4):
        self.core = ShardCore(Pool(Capacity(4, host, 0, 0.0, 0.0), PAGE, 10.0))
        stored(self.core.pool, pack(range(6)), [])
        self.lease = self.core.pool.alloc_new("p.1", "anne", 1, 0, 0.0).lease

    def say(self, sender, message):
        """The copies that follow, and the messages."""
        self.core.receive(sender, message, 0.0)
        self.core.check()
        actions = self.core.take()
        return [one for one in actions if isinstance(one, Copy)], [
            one.message for one in actions if isinstance(one, Send)
        ]


def test_a_lease_that_grows_waits_for_copies_and_drops_nothing():
    """A lease that grows waits for cached pages to be copied to the host tier, and none is dropped."""
    shard = Shard()
    copies, answers = shard.say("p.1", AllocMem(1, shard.lease, 2))
    assert answers == [] and len(copies) == 1
    assert shard.say("p.1", AllocMem(1, shard.lease, 2)) == ([], [])  # a repeat
    _, [answer] = shard.say("s0.1", CopyDone(copies[0].id))
    assert isinstance(answer, Allocated) and len(answer.pages) == 2
    assert shard.core.pool.peek("anne", pack(range(6))).tokens == 6
    assert shard.core.pool.room.evicted_pages == 0


def test_a_lease_that_grows_does_not_wait_for_others():
    """Where no copy makes room, cached pages are dropped, and if that is not enough the call is refused at once."""
    shard = Shard(host=0)
    _, [answer] = shard.say("p.1", AllocMem(1, shard.lease, 2))
    assert isinstance(answer, Allocated) and shard.core.pool.room.evicted_pages == 2
    shard.core.pool.alloc_new("p.2", "anne", 1, 0, 0.0)
    _, [answer] = shard.say("p.1", AllocMem(2, shard.lease, 1))
    assert answer.code == PoolError.NO_PAGES


def test_a_refused_alloc_mem_moves_nothing():
    """If it did, one program that asks for too much would send everybody's cached pages out, and drop the coldest."""
    shard = Shard()
    for call, pages in enumerate((4, 100), 1):
        copies, [answer] = shard.say("p.1", AllocMem(call, shard.lease, pages))
        assert (copies, answer.code) == ([], PoolError.TOO_LARGE)
    copies, [answer] = shard.say("p.2", AllocMem(1, 0, 4))
    assert (copies, answer.code) == ([], PoolError.NO_PAGES)
    assert shard.core.pool.room.evicted_pages == 0


def test_pages_in_host_memory_do_not_keep_a_grant_waiting_for_pages_on_disk():
    """If an insert took the place of pages on their way in, those who wait for them would wait for ever."""
    core = ShardCore(Pool(Capacity(8, 8, 8, 0.0, 0.0), PAGE, 10.0))
    tokens = pack(range(4))
    stored(core.pool, tokens, [(Tier.DEVICE, 2), (Tier.HOST, 2)])
    core.receive("p.1", Acquire(1, "anne", tokens + pack([9]), 0), 0.0)
    (copy,) = core.take()
    lease = core.pool.alloc_new("p.2", "anne", 2, Tier.HOST, 0.0).lease
    core.receive("p.2", Insert(1, lease, 0, tokens), 0.0)
    core.check()
    core.receive("p.2", FreeMem(lease), 0.0)
    core.take()
    core.receive("s0.1", CopyDone(copy.id), 0.0)
    core.check()
    (copy,) = core.take()  # from host memory this time
    core.receive("s0.1", CopyDone(copy.id), 0.0)
    core.check()
    (answer,) = core.take()
    assert (answer.to, answer.message.cached_tokens) == ("p.1", 4)


def test_a_copy_that_fails_ends_the_wait():
    """When the copy fails, cached pages are dropped and the lease grows."""
    shard = Shard()
    copies, _ = shard.say("p.1", AllocMem(1, shard.lease, 1))
    _, answers = shard.say("s0.1", CopyDone(copies[0].id, (copies[0].runs[0][0],)))
    assert [type(one) for one in answers] == [Allocated]


@pytest.mark.parametrize("end", [Gone(("p.1",)), FreeMem(0, 1)])
def test_who_does_not_wait_any_more_gets_nothing(end):
    """An owner that is gone, or has withdrawn its call, gets no pages when the copy ends."""
    shard = Shard()
    copies, _ = shard.say("p.1", AllocMem(1, shard.lease, 1))
    shard.say("p.1", end)
    _, answers = shard.say("s0.1", CopyDone(copies[0].id))
    assert answers == []
    assert shard.core.pool.leased_pages == (0 if isinstance(end, Gone) else 1)


@pytest.mark.parametrize(("least", "cached", "ready"), [(0, 8, False), (4, 8, False), (5, 4, True)])
def test_a_few_tokens_are_not_worth_a_copy(least, cached, ready):
    """Fewer tokens than the break-even are computed instead of swapped in."""
    pool = Pool(Capacity(8, 8, 0, 0.0, 0.0), PAGE, 10.0)
    tokens = pack(range(8))
    stored(pool, tokens, [(0, 2)])
    grant = pool.acquire("p.1", "anne", tokens + pack([9]), 0, 0.0, least)
    assert (grant.cached_tokens, grant.ready) == (cached, ready)
    check_pool(pool)
