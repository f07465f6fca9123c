"""The order of waiting requests: by priority class, and within a class by fair shares between tenants.

Within a class this is start-time fair queueing (Goyal, Vin and Cheng, 1996) by tokens, as virtual token
counters do it for models (Sheng et al., OSDI 2024). Each tenant has a virtual time at which its next request
starts. The tenant with the least virtual time is next, and a request advances its tenant's virtual time by
its tokens. A tenant that comes back starts at the virtual time of the request that left last: no tenant saves
up shares, and no tenant that waited loses any. While two tenants wait, what they have been given differs by
no more than the sum of their largest requests, however many either sends.

A lower class waits for the higher ones, but not forever: one turn in TURNS goes to the class that was passed
over the longest.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import heappop, heappush

import attrs

from memserve.messages import Submit

TURNS = 8
"""One turn in this many goes to the class that was passed over the longest."""


@attrs.define(eq=False)
class HeldRequest:
    """A request that waits in the scheduler."""

    submit: Submit
    rank: int
    """Priority class; lower goes first."""
    tokens: float
    """Prompt tokens plus expected answer tokens: its charge against the tenant's share."""
    run_s: float
    """Predicted seconds to run its prompt."""
    since: float
    """When its Frontend received it; of a tenant's requests in a class, the oldest is next."""
    heard_at: float
    """When its Frontend last showed that it still wants the request."""
    by: float = float("inf")
    """Deadline of its first token."""

    @property
    def key(self) -> tuple[str, int]:
        """Request and attempt."""
        return self.submit.request.id, self.submit.request.attempt

    @property
    def tenant(self) -> str:
        """The scope of its tenant."""
        return self.submit.request.tenant

    @property
    def latest(self) -> float:
        """The latest time to leave the queue for a first token in time."""
        return self.by - self.run_s


@attrs.define(eq=False)
class Tenant:
    """One tenant's waiting requests in one class."""

    start: float
    """Virtual time at which the tenant's next request starts."""
    held: list[HeldRequest] = attrs.field(factory=list)
    run_s: float = 0.0
    """Predicted seconds of all its waiting prompts."""
    listed: bool = False
    """The class's heap contains this start."""


@attrs.define
class FairClass:
    """One priority class. Its tenants are forgotten when nothing waits in it any more."""

    passed_at: int
    """The turn at which the class was last served, or began to wait."""
    waiting: int = 0
    _now: float = 0.0
    """Virtual time: the start of the request that left last."""
    _tenants: dict[str, Tenant] = attrs.field(factory=dict)
    _order: list[tuple[float, str]] = attrs.field(factory=list)
    """A heap of (start, tenant). Entries with an outdated start or nothing waiting are skipped."""

    def add(self, one: HeldRequest) -> None:
        """Queue a request."""
        tenant = self._tenants.get(one.tenant)
        if tenant is None:
            tenant = self._tenants[one.tenant] = Tenant(self._now)
        if tenant.start < self._now:
            tenant.start, tenant.listed = self._now, False
        insort(tenant.held, one, key=lambda other: other.since)
        tenant.run_s += one.run_s
        self.waiting += 1
        self._list(tenant, one.tenant)

    def first(self) -> HeldRequest:
        """The next request to leave; the class must not be empty."""
        while True:
            start, name = self._order[0]
            tenant = self._tenants[name]
            if tenant.held and tenant.start == start:
                return tenant.held[0]
            heappop(self._order)
            tenant.listed &= tenant.start != start

    def serve(self, one: HeldRequest, turn: int) -> None:
        """Remove the request that ``first`` gave, and charge its tenant for it."""
        tenant = self._tenants[one.tenant]
        self._now, self.passed_at = tenant.start, turn
        tenant.start, tenant.listed = tenant.start + one.tokens, False
        self.drop(one)
        self._list(tenant, one.tenant)

    def drop(self, one: HeldRequest) -> None:
        """Remove a request that was not served."""
        tenant = self._tenants[one.tenant]
        tenant.held.remove(one)
        tenant.run_s = tenant.run_s - one.run_s if tenant.held else 0.0
        self.waiting -= 1

    def _list(self, tenant: Tenant, name: str) -> None:
        if tenant.held and not tenant.listed:
            tenant.listed = True
            heappush(self._order, (tenant.start, name))

    def ahead_s(self, tenant: str, run_s: float) -> float:
        """Seconds of the prompts that leave before a request of ``tenant`` that arrives now."""
        own = self._tenants.get(tenant)
        mine = run_s + (own.run_s if own else 0.0)
        others = (min(one.run_s, mine) for one in self._tenants.values() if one is not own)
        return mine - run_s + sum(others)

    @property
    def run_s(self) -> float:
        """Seconds of all prompts that wait in this class."""
        return sum(one.run_s for one in self._tenants.values())

    def check(self) -> None:
        """Assert every invariant."""
        assert self.waiting == sum(len(tenant.held) for tenant in self._tenants.values())
        for name, tenant in self._tenants.items():
            assert all(one.tenant == name for one in tenant.held)
            listed = self._order.count((tenant.start, name))
            assert listed == tenant.listed and (listed or not tenant.held), f"{name} has {listed} turns"


@attrs.define
class FairQueue:
    """All waiting requests, by class and tenant."""

    _classes: dict[int, FairClass] = attrs.field(factory=dict)
    _held: dict[tuple[str, int], HeldRequest] = attrs.field(factory=dict)
    _of_tenant: dict[str, int] = attrs.field(factory=dict)
    _turn: int = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldRequest]:
        return iter(list(self._held.values()))

    def get(self, key: tuple[str, int]) -> HeldRequest | None:
        """The request, if it waits."""
        return self._held.get(key)

    def of_tenant(self, tenant: str) -> int:
        """Number of waiting requests of a tenant."""
        return self._of_tenant.get(tenant, 0)

    def add(self, one: HeldRequest) -> None:
        """Queue a request, which must not be in the queue yet."""
        assert one.key not in self._held, f"{one.key} waits already"
        self._held[one.key] = one
        self._of_tenant[one.tenant] = self.of_tenant(one.tenant) + 1
        if one.rank not in self._classes:
            self._classes[one.rank] = FairClass(self._turn)
        self._classes[one.rank].add(one)

    def first(self) -> HeldRequest:
        """The next request to leave; the queue must not be empty."""
        return self._classes[self._rank()].first()

    def serve(self, one: HeldRequest) -> None:
        """Remove the request that ``first`` gave."""
        self._turn += 1
        self._classes[one.rank].serve(one, self._turn)
        self._forget(one)

    def drop(self, one: HeldRequest) -> None:
        """Remove any request that was not served."""
        self._classes[one.rank].drop(one)
        self._forget(one)

    def ahead_s(self, rank: int, tenant: str, run_s: float) -> float:
        """Seconds of the prompts that leave before a request that arrives now.

        The turns of lower classes are not counted.
        """
        higher = sum(one.run_s for other, one in self._classes.items() if other < rank)
        here = self._classes.get(rank)
        return higher + (here.ahead_s(tenant, run_s) if here else 0.0)

    def check(self) -> None:
        """Assert every invariant."""
        inside = [
            one.key for each in self._classes.values() for t in each._tenants.values() for one in t.held
        ]
        assert sorted(inside) == sorted(self._held), "a request is lost, or waits twice"
        assert sum(self._of_tenant.values()) == len(self._held)
        for each in self._classes.values():
            each.check()

    def _rank(self) -> int:
        ranks = self._classes
        if len(ranks) > 1 and self._turn % TURNS == TURNS - 1:
            return min(ranks, key=lambda rank: (ranks[rank].passed_at, rank))
        return min(ranks)

    def _forget(self, one: HeldRequest) -> None:
        del self._held[one.key]
        self._of_tenant[one.tenant] -= 1
        if not self._of_tenant[one.tenant]:
            del self._of_tenant[one.tenant]
        here = self._classes[one.rank]
        if not here.waiting:
            del self._classes[one.rank]
