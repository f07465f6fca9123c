"""Which request is next: fair shares within a bound, priorities, and nobody waits for ever."""

from __future__ import annotations

from itertools import combinations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import Request, Submit
from memserve.scheduling.fair_queue import TURNS, FairQueue, HeldRequest
from memserve.scopes import salted
from memserve.tokens import pack

FRONTEND = ActorId("frontend-0.1")


def held(
    name: str, scope: str = "a", rank: int = 0, tokens: float = 100.0, since: float = 0.0, run_s: float = 1.0
) -> HeldRequest:
    """A request that waits."""
    request = Request(name, 0, FRONTEND, scope, pack([1]), 1, 5, (), Sampling(), rank)
    return HeldRequest(Submit(request), rank, tokens, run_s, since, since)


def drained(queue: FairQueue) -> list[str]:
    """The names of all waiting requests in the order in which they leave."""
    names = []
    while len(queue):
        one = queue.first()
        queue.serve(one)
        names.append(one.submit.request.id)
    return names


def filled(*waiting: HeldRequest) -> FairQueue:
    """A queue in which these requests wait."""
    queue = FairQueue()
    for one in waiting:
        queue.add(one)
    return queue


def test_a_tenant_that_floods_waits_for_itself() -> None:
    """A tenant with few requests is served soon, however many another tenant has waiting."""
    flood = [held(f"flood-{i}", "flood") for i in range(100)]
    queue = filled(*flood)
    for _ in range(10):
        queue.serve(queue.first())
    queue.add(held("one", "small"))
    queue.add(held("two", "small"))
    names = drained(queue)
    assert names.index("one") <= 1
    assert names.index("two") <= 3


def test_salts_do_not_multiply_a_tenant_s_share() -> None:
    """Requests of one key with many different salts wait as one tenant's."""
    queue = filled(*(held(f"flood-{i}", salted("flood", f"salt {i}")) for i in range(100)))
    for _ in range(10):
        queue.serve(queue.first())
    queue.add(held("one", "small"))
    queue.add(held("two", salted("small", "s")))
    names = drained(queue)
    assert (names.index("one") <= 1, names.index("two") <= 3) == (True, True)


def test_shares_are_of_tokens_not_of_requests() -> None:
    """Tenants share tokens equally, whatever the length of their prompts."""
    queue = filled(
        *(held(f"long-{i}", "long", tokens=1000.0) for i in range(20)),
        *(held(f"short-{i}", "short") for i in range(100)),
    )
    first = drained(queue)[:55]
    assert abs(sum(name.startswith("long") for name in first) - 5) <= 1


def test_who_comes_back_has_saved_up_nothing() -> None:
    """A tenant that was idle gets its equal share when it returns, and no more."""
    queue = filled(*(held(f"a{i}", "a") for i in range(50)), held("b", "b"))
    names = [queue.first().submit.request.id for _ in range(30) if queue.serve(queue.first()) is None]
    assert len(names) == 30
    for i in range(20):
        queue.add(held(f"b{i}", "b"))
    after = drained(queue)[:10]
    assert sum(name.startswith("b") for name in after) <= 6


def test_a_tenants_own_requests_leave_in_the_order_of_their_coming() -> None:
    """A tenant's requests leave by the time since when they wait: after a scheduler's restart they may arrive in any
    order."""
    queue = filled(held("late", since=3.0), held("early", since=1.0), held("middle", since=2.0))
    assert drained(queue) == ["early", "middle", "late"]


def test_a_higher_class_is_first_and_a_lower_one_has_its_turns() -> None:
    """Higher priorities come first, and lower ones get every eighth turn, so that they do not wait for ever."""
    queue = filled(
        *(held(f"high-{i}", rank=-1) for i in range(32)),
        *(held(f"low-{i}", rank=5) for i in range(2)),
        *(held(f"lowest-{i}", rank=9) for i in range(2)),
    )
    names = drained(queue)
    assert [i for i, name in enumerate(names[:32]) if name.startswith("low")] == [7, 15, 23, 31]
    assert [name.partition("-")[0] for name in names if name.startswith("low")] == ["low", "lowest"] * 2


def test_what_is_ahead_is_a_fair_part_of_it() -> None:
    """The predicted wait counts only what is served before a new request: of a flood, a fair part."""
    queue = filled(*(held(f"a{i}", "a", run_s=2.0) for i in range(50)), held("u", "b", rank=-1, run_s=3.0))
    assert queue.ahead_s(0, "a", 2.0) == 103.0
    assert queue.ahead_s(0, "new", 2.0) == 5.0
    assert queue.ahead_s(-2, "new", 2.0) == 0.0


SCOPES = ("a", "b", "c")
RANKS = (-1, 0, 7)


class Fairness(RuleBasedStateMachine):
    """Random arrivals and departures, compared with what each tenant and class must have got."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue()
        self.here: dict[tuple[str, int], HeldRequest] = {}
        self.names = 0
        self.got: dict[tuple[int, str, str], dict[str, float]] = {}
        """By class and pair of tenants: the tokens that each got since both wait."""
        self.largest = dict.fromkeys(SCOPES, 0.0)
        self.passed: dict[int, int] = {}
        """By class: turns since it was last served, while it has requests waiting."""

    @rule(scope=st.sampled_from(SCOPES), rank=st.sampled_from(RANKS), tokens=st.integers(1, 1000))
    def comes(self, scope: str, rank: int, tokens: int) -> None:
        self.names += 1
        one = held(f"r{self.names}", scope, rank, float(tokens), float(self.names), tokens / 100)
        self.largest[scope] = max(self.largest[scope], one.tokens)
        self.queue.add(one)
        self.here[one.key] = one

    @precondition(lambda self: self.here)
    @rule(times=st.integers(1, 5))
    def leaves(self, times: int) -> None:
        for _ in range(min(times, len(self.here))):
            one = self.queue.first()
            assert self.here.pop(one.key) is one
            assert one.since == min(
                other.since for other in [*self.here.values(), one] if same(other, one)
            ), "not in order"
            self.queue.serve(one)
            self.note(one)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def gives_up(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.here)))
        self.queue.drop(self.here.pop(key))

    def note(self, one: HeldRequest) -> None:
        for (rank, *pair), got in self.got.items():
            if rank == one.rank and one.tenant in pair:
                got[one.tenant] += one.tokens
        for rank in self.passed:
            self.passed[rank] += 1
        self.passed[one.rank] = 0

    @invariant()
    def shares_are_fair(self) -> None:
        self.queue.check()
        assert len(self.queue) == len(self.here)
        waiting = {(one.rank, one.tenant) for one in self.here.values()}
        for rank in RANKS:
            for one, other in combinations(SCOPES, 2):
                if {(rank, one), (rank, other)} <= waiting:
                    got = self.got.setdefault((rank, one, other), {one: 0.0, other: 0.0})
                    assert abs(got[one] - got[other]) <= self.largest[one] + self.largest[other]
                else:
                    self.got.pop((rank, one, other), None)

    @invariant()
    def nobody_starves(self) -> None:
        ranks = {one.rank for one in self.here.values()}
        self.passed = {rank: self.passed.get(rank, 0) for rank in ranks}
        assert all(turns <= TURNS * len(RANKS) for turns in self.passed.values()), self.passed


def same(one: HeldRequest, other: HeldRequest) -> bool:
    """Whether two requests are of one tenant and class."""
    return (one.rank, one.tenant) == (other.rank, other.tenant)


TestFairness = Fairness.TestCase
TestFairness.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
