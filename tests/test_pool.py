"""The pool's calls, compared with a model that also writes and reads the pages."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.errors import PoolError
from memserve.mempool.addresses import Home, Tier
from memserve.mempool.audit import check_pool
from memserve.mempool.pool import Pool
from memserve.tokens import count, pack, pages_for, span

PAGE = 2
TOTAL = 12
LEASE_S = 5.0
owners = st.sampled_from(["p.1", "d.1", "d.2"])
scopes = st.sampled_from(["anne", "bob"])
prompts = st.lists(st.integers(0, 1), max_size=12).map(pack)


class ModelLease:
    """What the owner of a lease knows: scope, tokens so far, page table, and how many tokens it has inserted."""

    def __init__(self, owner, scope, tokens, pages, retired):
        self.owner, self.scope, self.tokens, self.pages, self.retired = (
            owner,
            scope,
            tokens,
            list(pages),
            retired,
        )


class PoolAgainstModel(RuleBasedStateMachine):
    """Random calls by owners that die, fall silent, hand over leases and share prefixes, all of them writing one
    memory. The content of a page is what the KV of its tokens depends on: the scope and every token up to its end. A
    request that would read anything else through its page table fails the test."""

    caching = True

    def __init__(self):
        super().__init__()
        self.pool = Pool(TOTAL, PAGE, LEASE_S, caching=self.caching, home=Home(0, 3))
        self.content: dict[int, tuple[str, bytes]] = {}
        self.leases: dict[int, ModelLease] = {}
        self.deadlines: dict[str, float] = {}
        self.now = 0.0

    def write(self, lease, start):
        """Fill the pages from token ``start`` onwards, as a model step would."""
        for index in range(start // PAGE, pages_for(count(lease.tokens), PAGE)):
            self.content[lease.pages[index]] = (lease.scope, span(lease.tokens, 0, (index + 1) * PAGE))

    def heard(self, owner):
        self.deadlines[owner] = self.now + LEASE_S

    def lose(self, owner):
        """Forget the leases of an owner in the model; returns how many pages the pool has free before it does the same."""
        free = self.pool.free_pages
        self.deadlines.pop(owner, None)
        for number in [number for number, lease in self.leases.items() if lease.owner == owner]:
            del self.leases[number]
        return free

    def accounts(self):
        return (
            self.pool.free_pages,
            self.pool.leased_pages,
            self.pool.tree.indexed[Tier.DEVICE],
            self.pool.evictable_pages,
        )

    def draw_lease(self, data):
        return data.draw(st.sampled_from(sorted(self.leases)))

    @rule(owner=owners, scope=scopes, tokens=prompts, extra=st.integers(0, 4))
    def acquire(self, owner, scope, tokens, extra):
        need = pages_for(count(tokens), PAGE) + extra
        room = self.pool.free_pages + self.pool.evictable_pages
        matchable = max(count(tokens) - 1, 0) // PAGE * PAGE
        expected = self.pool.peek(scope, span(tokens, 0, matchable))
        before = self.accounts()
        grant = self.pool.acquire(owner, scope, tokens, extra, self.now)
        if grant is None:
            assert need > room
            assert self.accounts() == before, "an acquire that was not granted evicted something"
            return
        self.heard(owner)
        assert len(grant.pages) == need
        assert (grant.cached_tokens, grant.pages[: len(expected.pages)]) == (expected.tokens, expected.pages)
        lease = ModelLease(owner, scope, tokens, grant.pages, grant.cached_tokens)
        self.leases[grant.lease] = lease
        self.write(lease, grant.cached_tokens)

    @rule(owner=owners, tokens=st.integers(0, 4), extra=st.integers(TOTAL, TOTAL + 3))
    def acquire_too_much(self, owner, tokens, extra):
        if pages_for(tokens, PAGE) + extra > TOTAL:
            with pytest.raises(PoolError, match="too_large"):
                self.pool.acquire(owner, "anne", pack([0] * tokens), extra, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), n=st.integers(0, 3), more=prompts)
    def alloc_and_generate(self, data, n, more):
        number = self.draw_lease(data)
        lease = self.leases[number]
        room = self.pool.free_pages + self.pool.evictable_pages
        before = self.accounts()
        if len(lease.pages) + n > TOTAL or n > room:
            with pytest.raises(PoolError, match="too_large" if len(lease.pages) + n > TOTAL else "no_pages"):
                self.pool.alloc_mem(lease.owner, number, n, self.now)
            assert self.accounts() == before, "a refused call changed something"
        else:
            lease.pages += self.pool.alloc_mem(lease.owner, number, n, self.now)
            self.heard(lease.owner)
        start = count(lease.tokens)
        lease.tokens += span(more, 0, len(lease.pages) * PAGE - start)
        self.write(lease, start)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def insert(self, data):
        number = self.draw_lease(data)
        lease = self.leases[number]
        full = count(lease.tokens) // PAGE * PAGE
        start = data.draw(st.integers(0, lease.retired // PAGE)) * PAGE
        stop = data.draw(st.integers(start // PAGE, full // PAGE)) * PAGE
        known = self.pool.peek(lease.scope, span(lease.tokens, 0, stop)).tokens
        already = self.pool.insert(lease.owner, number, start, span(lease.tokens, start, stop))
        assert already == max(min(known, stop) - start, 0)
        lease.retired = max(lease.retired, stop)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), ragged=st.integers(1, PAGE * 4 - 1))
    def insert_wrongly(self, data, ragged):
        number = self.draw_lease(data)
        lease = self.leases[number]
        room = len(lease.pages) * PAGE - lease.retired
        page = pack([7] * PAGE)
        wrong = [
            (lease.owner, number, lease.retired, page[:ragged], "not_whole_pages"),
            (lease.owner, number, lease.retired + 1, page, "not_whole_pages"),
            (lease.owner, number, lease.retired, page * (room // PAGE + 1), "does_not_fit"),
            (lease.owner, number, lease.retired + PAGE, page, "not_contiguous"),
            (lease.owner, number, -PAGE, page, "not_contiguous"),
            ("p.9", number, lease.retired, page, "not_owner"),
            (lease.owner, number + 1000, lease.retired, page, "unknown_lease"),
        ]
        if lease.retired and self.caching:
            wrong.append((lease.owner, number, 0, page, "tokens_changed"))  # other tokens than were retired
        owner, lease_id, start, tokens, code = data.draw(st.sampled_from(wrong))
        with pytest.raises(PoolError, match=code):
            self.pool.insert(owner, lease_id, start, tokens)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), new=owners, wrong=owners)
    def adopt(self, data, new, wrong):
        number = self.draw_lease(data)
        lease = self.leases[number]
        if wrong not in (lease.owner, new) and new != lease.owner:
            with pytest.raises(PoolError, match="not_owner"):
                self.pool.adopt(new, number, wrong, self.now)
        handed = self.pool.counters.handed_over_pages
        moves = new != lease.owner
        self.pool.adopt(new, number, lease.owner, self.now)
        self.pool.adopt(new, number, lease.owner, self.now)  # a repeat
        if moves:
            self.heard(new)
        lease.owner = new
        assert self.pool.counters.handed_over_pages - handed == moves * len(lease.pages)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def free_mem(self, data):
        number = self.draw_lease(data)
        lease = self.leases.pop(number)
        with pytest.raises(PoolError, match="not_owner"):
            self.pool.free_mem("p.9", number)
        free = self.pool.free_pages
        assert self.pool.free_mem(lease.owner, number) == self.pool.free_pages - free
        with pytest.raises(PoolError, match="unknown_lease"):
            self.pool.free_mem(lease.owner, number)

    @rule(owner=owners)
    def drop_owner(self, owner):
        held = sum(lease.owner == owner for lease in self.leases.values())
        free = self.lose(owner)
        lost = self.pool.drop_owner(owner)
        assert (lost.leases, lost.pages) == (held, self.pool.free_pages - free)

    @rule(owner=owners)
    def renew(self, owner):
        self.pool.renew(owner, self.now)
        self.heard(owner)

    @rule(passed=st.integers(0, 4))
    def expire(self, passed):
        self.now += passed
        silent = {owner for owner, deadline in self.deadlines.items() if deadline <= self.now}
        for owner in silent:
            self.lose(owner)
        assert {lost.owner for lost in self.pool.expire(self.now)} == silent
        assert self.pool.deadline > self.now

    @rule(n=st.integers(0, 4))
    def evict(self, n):
        evictable = self.pool.evictable_pages
        assert self.pool.evict(n) == min(n, evictable)

    @rule(scope=scopes, tokens=prompts)
    def delete(self, scope, tokens):
        free = self.pool.free_pages
        assert self.pool.delete(scope, tokens) == self.pool.free_pages - free

    @rule(scope=scopes, tokens=prompts)
    def match(self, scope, tokens):
        found = self.pool.peek(scope, tokens)
        for index, page in enumerate(found.pages):
            assert self.content[page] == (scope, span(tokens, 0, (index + 1) * PAGE))

    @invariant()
    def accounts_balance(self):
        check_pool(self.pool)
        assert self.pool.free_pages + self.pool.leased_pages + self.pool.tree.indexed[Tier.DEVICE] == TOTAL
        assert len(self.pool.leases) == len(self.leases)

    @invariant()
    def every_running_request_reads_its_own_tokens(self):
        for lease in self.leases.values():
            for index in range(pages_for(count(lease.tokens), PAGE)):
                expected = (lease.scope, span(lease.tokens, 0, (index + 1) * PAGE))
                assert self.content[lease.pages[index]] == expected


class PoolWithoutCaching(PoolAgainstModel):
    """The same with caching off: no page is ever indexed."""

    caching = False

    @invariant()
    def nothing_is_indexed(self):
        assert self.pool.tree.indexed[Tier.DEVICE] == 0


RUN = settings(max_examples=80, stateful_step_count=40, deadline=None)
PoolAgainstModel.TestCase.settings = RUN
PoolWithoutCaching.TestCase.settings = settings(RUN, max_examples=25)
TestPool = PoolAgainstModel.TestCase
TestPool.__doc__ = (
    "A page in two places is one request reading another's KV; a page in none is lost for ever."
)
TestPoolWithoutCaching = PoolWithoutCaching.TestCase
TestPoolWithoutCaching.__doc__ = "A comparison without caching would be worthless if something were cached."


def test_one_token_is_always_left_to_compute():
    """At least one token of a prompt is never granted as cached: the first token is sampled from its logits."""
    pool = Pool(10, 4, LEASE_S)
    grant = pool.acquire("p.1", "anne", pack(range(8)), 0, 0.0)
    pool.insert("p.1", grant.lease, 0, pack(range(8)))

    assert pool.acquire("p.1", "anne", pack(range(8)), 0, 0.0).cached_tokens == 4
    assert pool.acquire("p.1", "anne", pack(range(9)), 0, 0.0).cached_tokens == 8
    assert (pool.counters.requested_tokens, pool.counters.matched_tokens) == (25, 12)


def test_a_duplicate_page_stays_with_its_request():
    """When two requests insert the same prefix, the second keeps its own pages until it frees them: its steps read them."""
    pool = Pool(10, 4, LEASE_S)
    first = pool.acquire("p.1", "anne", pack(range(8)), 0, 0.0)
    second = pool.acquire("p.2", "anne", pack(range(12)), 0, 0.0)
    pool.insert("p.1", first.lease, 0, pack(range(8)))

    assert pool.insert("p.2", second.lease, 0, pack(range(12))) == 8
    assert pool.peek("anne", pack(range(12))).pages == (*first.pages, second.pages[2])
    assert pool.leased_pages == 2
    assert pool.free_mem("p.2", second.lease) == 2
    check_pool(pool)


def test_the_next_turn_finds_prompt_and_answer():
    """Pages of prompt and answer that were inserted before the lease ended are cached for the next turn of a chat."""
    pool = Pool(10, 4, LEASE_S)
    grant = pool.acquire("p.1", "anne", pack(range(6)), 1, 0.0)
    pool.insert("p.1", grant.lease, 0, pack(range(4)))
    pool.adopt("d.1", grant.lease, "p.1", 0.0)
    pool.insert("d.1", grant.lease, 4, pack(range(4, 12)))
    pool.free_mem("d.1", grant.lease)

    assert pool.acquire("p.1", "anne", pack(range(20)), 0, 0.0).cached_tokens == 12
    assert pool.counters.handed_over_pages == 3


def test_acquire_never_evicts_what_it_has_just_matched():
    """An acquire that has to evict takes other pages than those it matched."""
    pool = Pool(4, 2, LEASE_S)
    for tokens in ([1, 1, 1, 1], [2, 2, 2, 2]):
        grant = pool.acquire("p.1", "anne", pack(tokens), 0, 0.0)
        pool.insert("p.1", grant.lease, 0, pack(tokens))
        pool.free_mem("p.1", grant.lease)
    grant = pool.acquire("p.1", "anne", pack([1, 1, 1, 1, 5]), 1, 0.0)

    assert grant.cached_tokens == 4
    assert pool.peek("anne", pack([2, 2, 2, 2])).tokens == 0
    assert pool.acquire("p.1", "anne", pack([1, 1, 1]), 0, 0.0) is None
    check_pool(pool)


def test_leases_of_an_earlier_run_are_unknown():
    """A restarted pool does not know the lease ids of its predecessor: a worker's late free must not end another's lease."""
    old = Pool(4, 2, LEASE_S, home=Home(0, 0x9F3A1C22)).acquire("p.1", "anne", pack([1]), 0, 0.0)
    new = Pool(4, 2, LEASE_S, home=Home(0, 1))
    new.acquire("p.1", "anne", pack([1]), 0, 0.0)

    with pytest.raises(PoolError, match="unknown_lease"):
        new.free_mem("p.1", old.lease)


def test_an_acquire_that_must_wait_evicts_nothing():
    """A call that cannot be granted evicts nothing: otherwise each retry would shrink the cache for nothing."""
    pool = Pool(6, 2, LEASE_S)
    running = pool.acquire("p.1", "anne", pack([1, 1, 1, 1]), 2, 0.0)
    pool.insert("p.1", running.lease, 0, pack([1, 1, 1, 1]))
    ended = pool.acquire("p.1", "anne", pack([2, 2]), 0, 0.0)
    pool.insert("p.1", ended.lease, 0, pack([2, 2]))
    pool.free_mem("p.1", ended.lease)

    assert (pool.free_pages, pool.evictable_pages) == (1, 1)
    assert pool.acquire("p.1", "anne", pack([3, 3]), 2, 0.0) is None
    other = pool.acquire("p.2", "bob", b"", 0, 0.0)
    with pytest.raises(PoolError, match="no_pages"):
        pool.alloc_mem("p.2", other.lease, 3, 0.0)
    assert (pool.free_pages, pool.evictable_pages) == (1, 1)
