"""Three tiers under one pool, against a model with real bytes: in any order of calls and copies, nobody reads wrong
pages."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.actions import Copy, CopyDone
from memserve.errors import PoolError
from memserve.mempool.addresses import Home, Tier, tier_of
from memserve.mempool.audit import check_pool
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.tokens import count, pack, pages_for, span
from shard_clients import World

PAGE = 2
owners = st.sampled_from(["p.1", "d.1", "d.2"])
scopes = st.sampled_from(["anne", "bob"])
prompts = st.lists(st.integers(0, 1), min_size=3, max_size=12).map(pack)


def content(scope: str, tokens: bytes, page: int) -> tuple[str, bytes]:
    """What the KV of a page depends on: the scope and every token up to its end."""
    return scope, span(tokens, 0, (page + 1) * PAGE)


def attempt(call, *arguments):
    """The result of a call, and the code with which it was refused."""
    try:
        return call(*arguments), None
    except PoolError as refused:
        return None, refused.code


class Model:
    """A lease as its owner knows it."""

    def __init__(self, owner, scope, tokens, grant, whole):
        self.owner, self.scope, self.tokens, self.whole = owner, scope, tokens, whole
        self.pages, self.retired = list(grant.pages), grant.cached_tokens


class TieredPool(RuleBasedStateMachine):
    """A memory of pages whose copies end in any order, and where some pages on disk come back damaged.

    While a copy runs, its target must not change, nor its source if the result is still wanted. The model copies when
    the copy ends, so that a page that was given out too early shows as wrong bytes.
    """

    capacity = Capacity(8, host=6, disk=8, swap_low=0.2, swap_high=0.4)

    def __init__(self):
        super().__init__()
        self.pool = Pool(self.capacity, PAGE, 1000.0, home=Home(2, 3))
        self.memory: dict[int, tuple[str, bytes] | None] = {}
        self.leases: dict[int, Model] = {}
        self.loading: dict[int, Model] = {}
        self.copies: list[Copy] = []

    # ---- what owners do ------------------------------------------------------------------------------------

    def granted(self, grant, lease):
        """The owner checks what is cached, and fills the rest."""
        self.leases[grant.lease] = lease
        lease.pages, lease.retired = list(grant.pages), grant.cached_tokens
        for index in range(grant.cached_tokens // PAGE):
            assert self.memory[grant.pages[index]] == content(lease.scope, lease.tokens, index)
        self.fill(lease)

    def fill(self, lease):
        for index in range(
            lease.retired // PAGE, min(len(lease.pages), pages_for(count(lease.tokens), PAGE))
        ):
            self.memory[lease.pages[index]] = content(lease.scope, lease.tokens, index)

    def opened(self, grant, lease):
        if grant.ready:
            self.granted(grant, lease)
        else:
            self.loading[grant.lease] = lease

    def draw(self, data):
        return data.draw(st.sampled_from(sorted(self.leases)))

    @rule(owner=owners, scope=scopes, tokens=prompts, extra=st.integers(0, 2))
    def acquire(self, owner, scope, tokens, extra):
        if pages_for(count(tokens), PAGE) + extra > self.capacity.device:
            with pytest.raises(PoolError, match="too_large"):
                self.pool.acquire(owner, scope, tokens, extra, 0.0)
            return
        grant = self.pool.acquire(owner, scope, tokens, extra, 0.0)
        if grant is not None:
            assert len(grant.pages) == pages_for(count(tokens), PAGE) + extra
            self.opened(grant, Model(owner, scope, tokens, grant, whole=True))
            if grant.ready:
                assert not any(map(tier_of, grant.pages))

    @rule(scope=scopes, tokens=prompts, again=prompts)
    def finished_requests(self, scope, tokens, again):
        """Requests that come and end, which fills the index."""
        for prompt in (tokens, again):
            grant = self.pool.acquire("d.3", scope, prompt, 0, 0.0)
            if grant is None:
                continue
            lease = Model("d.3", scope, prompt, grant, whole=True)
            if not grant.ready:
                self.loading[grant.lease] = lease
                continue
            self.granted(grant, lease)
            full = count(prompt) // PAGE * PAGE
            self.pool.insert("d.3", grant.lease, lease.retired, span(prompt, lease.retired, full))
            self.pool.free_mem("d.3", grant.lease)
            del self.leases[grant.lease]

    @rule(owner=owners, scope=scopes, tokens=prompts)
    def match(self, owner, scope, tokens):
        grant = self.pool.match(owner, scope, tokens, 0.0)
        if grant is not None:
            self.opened(grant, Model(owner, scope, tokens, grant, whole=False))

    @rule(scope=scopes, tokens=prompts)
    def prefetch(self, scope, tokens):
        grant = self.pool.prefetch("ahead.1", scope, tokens, 0.0)
        if grant is not None:
            assert not grant.ready
            self.loading[grant.lease] = None

    @rule(owner=owners, scope=scopes, n=st.integers(0, 3), tier=st.sampled_from([0, 1]), tokens=prompts)
    def alloc_new(self, owner, scope, n, tier, tokens):
        room = self.pool.room.free(Tier(tier)) + self.pool.tree.evictable[tier]
        if n > room:
            with pytest.raises(PoolError, match="no_pages"):
                self.pool.alloc_new(owner, scope, n, tier, 0.0)
            return
        grant = self.pool.alloc_new(owner, scope, n, tier, 0.0)
        self.granted(grant, Model(owner, scope, span(tokens, 0, n * PAGE), grant, whole=True))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), n=st.integers(0, 2), tier=st.sampled_from([0, 1]), more=prompts)
    def alloc_mem(self, data, n, tier, more):
        number = self.draw(data)
        lease = self.leases[number]
        if not lease.whole:
            return
        pages, refused = attempt(self.pool.alloc_mem, lease.owner, number, n, 0.0, tier)
        assert refused in (None, PoolError.NO_PAGES, PoolError.TOO_LARGE)
        lease.pages += pages or ()
        start = count(lease.tokens)
        lease.tokens += span(more, 0, len(lease.pages) * PAGE - start)
        for index in range(start // PAGE, pages_for(count(lease.tokens), PAGE)):
            if index >= lease.retired // PAGE:
                self.memory[lease.pages[index]] = content(lease.scope, lease.tokens, index)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def insert(self, data):
        number = self.draw(data)
        lease = self.leases[number]
        if lease.whole:
            stop = data.draw(st.integers(lease.retired // PAGE, count(lease.tokens) // PAGE)) * PAGE
            self.pool.insert(lease.owner, number, lease.retired, span(lease.tokens, lease.retired, stop))
            lease.retired = max(lease.retired, stop)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def swap_in(self, data):
        number = self.draw(data)
        lease = self.leases[number]
        grant, refused = attempt(self.pool.swap_in, lease.owner, number, 0.0)
        assert refused in (None, PoolError.PINNED, PoolError.NO_PAGES)
        if grant is not None and not grant.ready:
            self.loading[number] = self.leases.pop(number)
            with pytest.raises(PoolError, match="moving"):
                self.pool.alloc_mem(lease.owner, number, 1, 0.0)

    @precondition(lambda self: self.leases or self.loading)
    @rule(data=st.data())
    def free_mem(self, data):
        number = data.draw(st.sampled_from(sorted([*self.leases, *self.loading])))
        owner = self.pool.owner_of(number)
        self.leases.pop(number, None)
        self.loading.pop(number, None)
        self.pool.free_mem(owner, number)

    @rule(owner=owners)
    def die(self, owner):
        for held in (self.leases, self.loading):
            for number in [number for number, lease in held.items() if lease and lease.owner == owner]:
                del held[number]
        self.pool.drop_owner(owner)

    # ---- what the shard does -------------------------------------------------------------------------------

    @rule(n=st.integers(0, 4), tier=st.sampled_from([0, 1, 2]))
    def evict(self, n, tier):
        evictable = self.pool.tree.evictable[tier]
        assert min(n, evictable) <= self.pool.evict(n, tier) <= evictable

    @rule(scope=scopes, tokens=prompts)
    def delete(self, scope, tokens):
        self.pool.delete(scope, tokens)

    @rule(n=st.integers(0, 4), tier=st.sampled_from([0, 1]))
    def swap_out(self, n, tier):
        self.pool.swap_out(n, tier)

    @rule()
    def balance(self):
        self.pool.room.balance()

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), damaged=st.integers(0, 3), torn=st.integers(0, 5))
    def copied(self, data, damaged, torn):
        """A copy ends; sometimes a page from disk is reported as damaged."""
        copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        bad = []
        for source, target, n in copy.runs:
            for i in range(n):
                if tier_of(source) == Tier.DISK and damaged == 0 and i == torn:
                    bad.append(source + i)
                    self.memory[target + i] = None
                else:
                    self.memory[target + i] = self.memory.get(source + i)
        for number in self.pool.copied(CopyDone(copy.id, tuple(bad))):
            del self.loading[number]
        for grant in self.pool.settle():
            lease = self.loading.pop(grant.lease)
            if lease is None:
                self.pool.free_mem("ahead.1", grant.lease)
            elif lease.whole:
                self.granted(grant, lease)
            else:
                self.leases[grant.lease] = lease
                lease.pages, lease.retired = list(grant.pages), grant.cached_tokens

    # ---- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def copies_are_asked_for_once(self):
        self.copies += self.pool.take_copies()
        assert len(self.copies) == len(self.pool.room.swaps)

    @invariant()
    def accounts_balance(self):
        check_pool(self.pool)
        assert len(self.pool.leases) == len(self.leases) + len(self.loading)

    @invariant()
    def every_page_holds_its_tokens(self):
        for lease in self.leases.values():
            filled = pages_for(count(lease.tokens), PAGE) if lease.whole else lease.retired // PAGE
            for index in range(filled):
                assert self.memory[lease.pages[index]] == content(lease.scope, lease.tokens, index)
        for node in self.pool.tree.nodes():
            path = list(node.path())
            tokens = b"".join(one.key for one in reversed(path))
            first = count(tokens) // PAGE - len(node.pages)
            for i, page in enumerate(node.pages):
                assert self.memory[page] == content(path[-1].scope, tokens, first + i), (
                    "wrong bytes in the index"
                )

    def teardown(self):
        """Let all copies end and drop all owners: no page stays leased."""
        self.copies_are_asked_for_once()
        while self.copies:
            copy = self.copies.pop()
            self.pool.copied(CopyDone(copy.id))
            self.pool.settle()
            self.copies += self.pool.take_copies()
        assert not self.pool.loading
        for owner in ("p.1", "d.1", "d.2", "d.3", "ahead.1"):
            self.pool.drop_owner(owner)
        check_pool(self.pool)
        assert not any(self.pool.room.leased(tier) for tier in Tier)


class WithoutHost(TieredPool):
    """Without host memory, pages go from the device straight to disk."""

    capacity = Capacity(8, disk=8, swap_low=0.2, swap_high=0.4)

    @rule(n=st.integers(0, 4), tier=st.sampled_from([0, 2]))
    def evict(self, n, tier):
        evictable = self.pool.tree.evictable[tier]
        assert min(n, evictable) <= self.pool.evict(n, tier) <= evictable

    @rule(n=st.integers(0, 4))
    def swap_out(self, n):
        self.pool.swap_out(n)

    @rule(owner=owners, scope=scopes, n=st.integers(0, 3))
    def alloc_new(self, owner, scope, n):
        with pytest.raises(PoolError, match="bad_tier"):
            self.pool.alloc_new(owner, scope, n, 1, 0.0)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def alloc_mem(self, data):
        with pytest.raises(PoolError, match="bad_tier"):
            number = self.draw(data)
            self.pool.alloc_mem(self.leases[number].owner, number, 1, 0.0, 1)


RUN = settings(max_examples=100, stateful_step_count=50, deadline=None)
TieredPool.TestCase.settings = RUN
WithoutHost.TestCase.settings = settings(RUN, max_examples=40)
TestTieredPool = TieredPool.TestCase
TestTieredPool.__doc__ = "A page handed out while it is copied is one request reading another's KV."
TestWithoutHost = WithoutHost.TestCase
TestWithoutHost.__doc__ = "A shard may have a disk and no host memory to spare."


@pytest.mark.parametrize("seed", range(25))
def test_random_calls_of_clients_that_die(seed):
    """Random calls, repeated, withdrawn and mixed with copies and deaths: the accounts balance and each page has one
    owner."""
    sizes = [Capacity(14, 10, 12, 0.2, 0.4), Capacity(12, 0, 20, 0.1, 0.3), Capacity(16, 8), Capacity(16)]
    world = World(seed, sizes[seed % 4])
    world.lost_messages = seed % 2 == 1
    for _ in range(600):
        world.step()
    world.end()
    pool = world.core.pool
    assert not len(pool.leases)
    assert not any(pool.room.leased(tier) for tier in Tier)
    if not world.lost_messages:
        assert world.mirror.prefixes() == prefixes(pool)


def test_the_random_calls_do_reach_what_they_are_for():
    """The random calls meet every kind of copy, damaged pages, deaths and refusals often enough to test them."""
    seen: dict[str, int] = {}
    for seed in (0, 1, 4):
        world = World(seed, Capacity(14, 10, 12, 0.2, 0.4))
        for _ in range(800):
            world.step()
        seen = {name: seen.get(name, 0) + world.seen.get(name, 0) for name in {*seen, *world.seen}}
    wanted = {
        "DEVICE to HOST",
        "HOST to DISK",
        "HOST to DEVICE",
        "DISK to DEVICE",
        "bad",
        "died",
        "Acquired",
        "Freed",
    }
    assert not {name for name in wanted if seen.get(name, 0) < 5}, seen
    assert {PoolError.NO_PAGES, PoolError.QUEUE_FULL, PoolError.MOVING} & seen.keys(), seen


def prefixes(pool: Pool) -> dict[tuple[str, bytes], int]:
    """Every cached prefix in whole pages, with the tier of its last page."""
    found = {}
    for node in pool.tree.nodes():
        path = list(node.path())
        tokens = b"".join(one.key for one in reversed(path))
        for i in range(len(node.pages)):
            found[path[-1].scope, tokens[: len(tokens) - i * pool.tree.page_bytes]] = node.tier
    return found
