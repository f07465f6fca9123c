"""Whose request is next: by priority class, and within a class by fair shares between tenants.

Within a class this is start-time fair queueing (Goyal, Vin and Cheng, 1996) by tokens, as virtual token counters do it
for models (Sheng et al., OSDI 2024). Each tenant has a virtual time, at which its next request starts; the least is next,
and a request moves its tenant's time on by its tokens. A tenant that comes anew starts at the time of what left last:
nobody saves up shares, and nobody who waited loses any. While two tenants wait, what each has been given differs by no
more than their two largest requests, however many either sends.

A lower class waits for the higher ones, but not for ever: one turn in TURNS goes to the class that was passed over the
longest.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import heappop, heappush

import attrs

from memserve.messages import Submit

TURNS = 8
"""One turn in so many is a lower class's."""


@attrs.define(eq=False)
class HeldRequest:
    """A request that waits in the scheduler."""

    submit: Submit
    rank: int
    """Its class; lower is earlier."""
    tokens: float
    """Prompt and expected answer: what it takes of its tenant's share."""
    run_s: float
    """Predicted to run its prompt."""
    since: float
    """When its Frontend got it; in a tenant's class, the one that waits longest is next."""
    heard_at: float
    """When its Frontend last said that it still wants it."""
    by: float = float("inf")
    """When its first token must be there."""

    @property
    def key(self) -> tuple[str, int]:
        """Request and attempt."""
        return self.submit.request.id, self.submit.request.attempt

    @property
    def scope(self) -> str:
        """Its tenant."""
        return self.submit.request.scope

    @property
    def latest(self) -> float:
        """When it must leave at the latest to have its first token in time."""
        return self.by - self.run_s


@attrs.define(eq=False)
class Tenant:
    """What waits of one tenant in one class."""

    start: float
    """Virtual time at which its next request starts."""
    held: list[HeldRequest] = attrs.field(factory=list)
    run_s: float = 0.0
    """Of all of them."""
    listed: bool = False
    """Its class has this start in its order."""


@attrs.define
class FairClass:
    """One priority class. Its tenants are forgotten when nothing waits in it any more."""

    passed_at: int
    """The turn at which it was served last, or began to wait."""
    waiting: int = 0
    _now: float = 0.0
    """Virtual time: the start of what left last."""
    _tenants: dict[str, Tenant] = attrs.field(factory=dict)
    _order: list[tuple[float, str]] = attrs.field(factory=list)
    """A heap of starts and tenants; one whose start is no longer its tenant's, or who has nothing, is passed over."""

    def add(self, one: HeldRequest) -> None:
        """Let a request wait."""
        tenant = self._tenants.get(one.scope)
        if tenant is None:
            tenant = self._tenants[one.scope] = Tenant(self._now)
        if tenant.start < self._now:
            tenant.start, tenant.listed = self._now, False
        insort(tenant.held, one, key=lambda other: other.since)
        tenant.run_s += one.run_s
        self.waiting += 1
        self._list(tenant, one.scope)

    def first(self) -> HeldRequest:
        """The next to leave; there must be one."""
        while True:
            start, scope = self._order[0]
            tenant = self._tenants[scope]
            if tenant.held and tenant.start == start:
                return tenant.held[0]
            heappop(self._order)
            tenant.listed &= tenant.start != start

    def serve(self, one: HeldRequest, turn: int) -> None:
        """``first`` leaves, and its tenant pays for it."""
        tenant = self._tenants[one.scope]
        self._now, self.passed_at = tenant.start, turn
        tenant.start, tenant.listed = tenant.start + one.tokens, False
        self.drop(one)
        self._list(tenant, one.scope)

    def drop(self, one: HeldRequest) -> None:
        """It leaves without having been served."""
        tenant = self._tenants[one.scope]
        tenant.held.remove(one)
        tenant.run_s = tenant.run_s - one.run_s if tenant.held else 0.0
        self.waiting -= 1

    def _list(self, tenant: Tenant, scope: str) -> None:
        if tenant.held and not tenant.listed:
            tenant.listed = True
            heappush(self._order, (tenant.start, scope))

    def ahead_s(self, scope: str, run_s: float) -> float:
        """Seconds of prompts that leave before a request of ``scope`` that comes now."""
        own = self._tenants.get(scope)
        mine = run_s + (own.run_s if own else 0.0)
        others = (min(one.run_s, mine) for one in self._tenants.values() if one is not own)
        return mine - run_s + sum(others)

    @property
    def run_s(self) -> float:
        """Seconds of all prompts that wait here."""
        return sum(one.run_s for one in self._tenants.values())

    def check(self) -> None:
        """Assert every invariant."""
        assert self.waiting == sum(len(tenant.held) for tenant in self._tenants.values())
        for scope, tenant in self._tenants.items():
            assert all(one.scope == scope for one in tenant.held)
            listed = self._order.count((tenant.start, scope))
            assert listed == tenant.listed and (listed or not tenant.held), f"{scope} has {listed} turns"


@attrs.define
class FairQueue:
    """All that waits, by class and tenant."""

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

    def of_tenant(self, scope: str) -> int:
        """How many requests of a tenant wait."""
        return self._of_tenant.get(scope, 0)

    def add(self, one: HeldRequest) -> None:
        """Let a request wait; it must not wait yet."""
        assert one.key not in self._held, f"{one.key} waits already"
        self._held[one.key] = one
        self._of_tenant[one.scope] = self.of_tenant(one.scope) + 1
        if one.rank not in self._classes:
            self._classes[one.rank] = FairClass(self._turn)
        self._classes[one.rank].add(one)

    def first(self) -> HeldRequest:
        """The next to leave; there must be one."""
        return self._classes[self._rank()].first()

    def serve(self, one: HeldRequest) -> None:
        """``first`` leaves."""
        self._turn += 1
        self._classes[one.rank].serve(one, self._turn)
        self._forget(one)

    def drop(self, one: HeldRequest) -> None:
        """Any one leaves without having been served."""
        self._classes[one.rank].drop(one)
        self._forget(one)

    def ahead_s(self, rank: int, scope: str, run_s: float) -> float:
        """Seconds of prompts that leave before a request that comes now, lower classes' turns left out."""
        higher = sum(one.run_s for other, one in self._classes.items() if other < rank)
        here = self._classes.get(rank)
        return higher + (here.ahead_s(scope, run_s) if here else 0.0)

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
        self._of_tenant[one.scope] -= 1
        if not self._of_tenant[one.scope]:
            del self._of_tenant[one.scope]
        here = self._classes[one.rank]
        if not here.waiting:
            del self._classes[one.rank]
