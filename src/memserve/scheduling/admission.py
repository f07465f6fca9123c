"""The scheduler's hold-back queue: which requests are admitted, which wait, and which must come back later.

While no worker has room, requests wait here and not at the workers, so that later requests of a higher
priority, and tenants that have had less, can still go first. :mod:`memserve.scheduling.fair_queue` decides
which is next. This module bounds the queue, keeps deadlines, and predicts waiting times.

The queue has ``held_max`` places. A tenant may take one more while it has fewer than are left free: alone it
can have half of the places, next to n other tenants that do the same one (n + 2)th, and a newcomer always
finds some. A request that does not fit is refused at once, and so is a request whose deadline leaves no time.
A request that was admitted once (an attempt after a worker's death, a request that waited at a scheduler that
is gone) is never refused for lack of a place.

A Frontend inquires after a request that waits (Inquire). A request that no Frontend inquires after is
forgotten: its Frontend is gone, or has taken it to another scheduler. If neither is the case, the Frontend's
next Inquire is answered with no, and it submits the request again.
"""

from __future__ import annotations

import attrs

from memserve.identity import ActorId
from memserve.messages import Submit
from memserve.scheduling.fair_queue import FairQueue, HeldRequest

HELD_S = 60.0
"""Longest time that a request waits while no worker is ready."""
FORGOTTEN_S = 12.0
"""Time without an Inquire after which a waiting request is forgotten: four inquiry intervals."""
ADMISSION_CODES = ("cluster_full", "tenant_full", "deadline_unreachable", "deadline_missed")
"""Refusal codes that a request which has begun never gets."""
RESUMED = -1_000
"""Rank of attempts after the first, ahead of any client's priority: their streams have begun."""
PACE_S = 2.0
"""Shortest period over which the rate at which requests leave is measured."""
SLOWEST = 0.02
"""A measured rate counts as at least this share of the predicted rate."""
RETRY_S = (1.0, 60.0)
"""Bounds of Retry-After, in seconds."""
NO_WORKER_RETRY_S = 2.0
"""Retry-After when no worker has been ready for HELD_S."""


@attrs.frozen
class Refusal:
    """Why a request is not served now, and when it may be."""

    submit: Submit
    """The refused Submit, with the request's age at the refusal."""
    code: str
    message: str
    status: int
    retry_after_s: float
    predicted_s: float
    """Predicted seconds to the first token, had the request been admitted; infinity if unknown."""
    margin_s: float = 0.0
    """The part of ``predicted_s`` that was added because earlier predictions were late."""


@attrs.frozen
class IncomingRequest:
    """A request that arrives, as admission sees it."""

    submit: Submit
    tokens: float
    """Prompt tokens plus expected answer tokens."""
    run_s: float
    """Predicted seconds to run its prompt."""
    soonest_s: float
    """Seconds to the first token if placed now, margin included; infinity while no worker is ready."""
    margin_s: float = 0.0
    """The margin in ``soonest_s``, see :mod:`memserve.scheduling.punctuality`."""


@attrs.define
class Pace:
    """The rate at which waiting requests leave, in seconds of predicted prompt time a second.

    By prediction, it is about the number of workers.
    """

    rate: float | None = None
    """The rate; None before it is measured."""
    _since: float | None = None
    """Time up to which the rate has been measured; None while nothing waits."""
    _took: float = 0.0
    _left: float = 0.0

    def measure(self, waiting: bool, left_s: float, now: float) -> None:
        """Record that prompts of ``left_s`` seconds have left the queue.

        Only the time in which something waits is counted, in one piece or several.
        """
        if self._since is not None:
            self._left += left_s
            self._took += now - self._since
            if self._took >= PACE_S:
                rate = self._left / self._took
                self.rate = rate if self.rate is None else (self.rate + rate) / 2
                self._took = self._left = 0.0
        self._since = now if waiting else None

    def at(self, workers: int) -> float:
        """The present rate, or before any measurement the predicted rate of ``workers``."""
        predicted = float(max(1, workers))
        return predicted if self.rate is None else max(SLOWEST * predicted, self.rate)


@attrs.define
class Admission:
    """See the module's docstring."""

    held_max: int = 2_048
    queue: FairQueue = attrs.field(factory=FairQueue)
    counters: dict[str, float] = attrs.field(factory=dict)
    _pace: Pace = attrs.field(factory=Pace)
    _unserved_since: float | None = None
    """Time since when no worker has been ready; None while one is."""
    _look_at: float = float("inf")
    """No waiting request ends by itself before this time."""

    def __len__(self) -> int:
        return len(self.queue)

    # ---- in -------------------------------------------------------------------------------------------------

    def ask(self, wish: IncomingRequest, workers: int, now: float) -> Refusal | None:
        """Queue a request, or return its refusal. It must not be in the queue already."""
        submit, tenant = wish.submit, wish.submit.request.tenant
        one = held(wish, now)
        wait = self.wait_s(one, workers)
        predicted = wait + wish.soonest_s
        words = self._no_place(tenant) if submit.request.attempt == 0 and not submit.held else None
        if words is not None:
            return self._refused(submit, *words, predicted, wait)
        if wish.soonest_s < float("inf") and now + predicted > one.by:
            return self.late(submit, predicted, wish.margin_s)
        self.queue.add(one)
        self._look_at = min(self._look_at, self._due(one))
        self._pace.measure(True, 0.0, now)
        self._count("requests_held_total")
        return None

    def _no_place(self, tenant: str) -> tuple[str, str, int] | None:
        """Code, text and HTTP status if a tenant's next request has no place; None if it has one."""
        free = self.held_max - len(self.queue)
        rule = f"scheduler.held_max = {self.held_max}"
        if free <= 0:
            text = f"the cluster is full: {len(self.queue)} requests wait for a worker already ({rule})"
            return "cluster_full", text, 503
        mine = self.queue.of_tenant(tenant)
        if mine >= free:
            text = f"this key has {mine} requests waiting, and may not have more than places are left free, {free} ({rule})"
            return "tenant_full", text, 429
        return None

    def late(self, submit: Submit, predicted_s: float, margin_s: float = 0.0) -> Refusal:
        """The refusal of a request whose first token would come too late."""
        wanted = submit.request.ttft_s or 0.0
        text = (
            f"the first token is wanted within {wanted * 1e3:.0f} ms of the request, and would come after about"
            f" {(submit.age_s + predicted_s) * 1e3:.0f} ms"
        )
        wait = submit.age_s + predicted_s - wanted
        refusal = self._refused(submit, "deadline_unreachable", text, 503, predicted_s, wait)
        return attrs.evolve(refusal, margin_s=margin_s)

    # ---- out ------------------------------------------------------------------------------------------------

    def served(self, one: HeldRequest, now: float) -> None:
        """Remove ``queue.first()``, which was placed."""
        self.queue.serve(one)
        self._pace.measure(len(self.queue) > 0, one.run_s, now)
        self._count("held_left_total")
        self._count("held_waited_s_total", now - one.since)

    def refuse_first(self, one: HeldRequest, predicted_s: float, margin_s: float, now: float) -> Refusal:
        """Remove and refuse ``queue.first()``, whose first token would come too late."""
        self._drop(one, now)
        return self.late(attrs.evolve(one.submit, age_s=now - one.since), predicted_s, margin_s)

    def withdraw(self, request: str, attempt: int, now: float) -> None:
        """Drop this attempt of a request, which is no longer wanted, and all earlier attempts."""
        for number in range(attempt + 1):
            self._forget((request, number), now)

    def forget_frontends(self, frontends: set[ActorId], now: float) -> None:
        """Drop the requests of dead Frontends."""
        for one in self.queue:
            if one.submit.request.frontend in frontends:
                self._drop(one, now)

    def wanted(self, key: tuple[str, int], now: float) -> bool:
        """Note that a request's Frontend inquires after it; whether the request waits here."""
        one = self.queue.get(key)
        if one is not None:
            one.heard_at = now
        return one is not None

    # ---- time -----------------------------------------------------------------------------------------------

    def excuse(self, now: float) -> None:
        """Count all requests as inquired after now.

        This scheduler was stopped itself, and what its Frontends asked in that time is still in its inbox.
        """
        for one in self.queue:
            one.heard_at = now

    def advance(self, served: bool, now: float) -> list[Refusal]:
        """Refuse requests that waited too long and forget those without an Inquire.

        ``served``: whether some worker is ready.
        """
        if served != (self._unserved_since is None):
            self._unserved_since, self._look_at = None if served else now, now
            self._pace = Pace()  # the rate at which requests leave while no worker takes them says nothing
        if now < self._look_at:
            return []
        refused = []
        for one in self.queue:
            if now >= one.heard_at + FORGOTTEN_S:
                self._drop(one, now)
                self._count("held_forgotten_total")
            elif now >= self._ends_at(one):
                self._drop(one, now)
                refused.append(self._too_long(one, now))
        self._look_at = min((self._due(one) for one in self.queue), default=float("inf"))
        return refused

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next."""
        return self._look_at if len(self.queue) else float("inf")

    def _due(self, one: HeldRequest) -> float:
        return min(one.heard_at + FORGOTTEN_S, self._ends_at(one))

    def _ends_at(self, one: HeldRequest) -> float:
        """When the request has waited for too long."""
        given_up_at = float("inf")
        if self._unserved_since is not None:
            given_up_at = max(self._unserved_since, one.since) + HELD_S
        return min(given_up_at, one.latest)

    def _too_long(self, one: HeldRequest, now: float) -> Refusal:
        waited = now - one.since
        submit = attrs.evolve(one.submit, age_s=waited)
        if now >= one.latest:
            text = (
                f"the first token was wanted within {(submit.request.ttft_s or 0.0) * 1e3:.0f} ms, and no worker had"
                f" room for the request in time; it waited for {waited * 1e3:.0f} ms"
            )
            return self._refused(submit, "deadline_missed", text, 503, one.run_s, one.run_s)
        text = f"no worker became ready within {HELD_S:.0f} s"
        return self._refused(submit, "no_capacity", text, 503, float("inf"), NO_WORKER_RETRY_S)

    # ---- figures --------------------------------------------------------------------------------------------

    def wait_s(self, one: HeldRequest, workers: int) -> float:
        """Predicted seconds in the queue for a request that arrives now."""
        if not len(self.queue):
            return 0.0
        return self.queue.ahead_s(one.rank, one.tenant, one.run_s) / self._pace.at(workers)

    def explain(self, refusal: Refusal) -> dict[str, object]:
        """Everything about a refusal, for its one log line."""
        submit, request = refusal.submit, refusal.submit.request
        predicted = refusal.predicted_s
        return {
            "request": request.id,
            "attempt": request.attempt,
            "code": refusal.code,
            "reason": refusal.message,
            "status": refusal.status,
            "retry_after_s": refusal.retry_after_s,
            "priority": request.priority,
            "prompt_tokens": request.prompt_tokens,
            "waited_ms": submit.age_s * 1e3,
            "wanted_ttft_ms": None if request.ttft_s is None else request.ttft_s * 1e3,
            "predicted_ttft_ms": predicted * 1e3 if predicted < float("inf") else None,
            "margin_ms": refusal.margin_s * 1e3,
            "waiting": len(self.queue),
            "waiting_of_tenant": self.queue.of_tenant(request.tenant),
        }

    def gauges(self) -> dict[str, float]:
        """The queue's part of the scheduler's gauges."""
        return {"requests_held": float(len(self.queue)), **self.counters}

    def check(self) -> None:
        """Assert every invariant."""
        self.queue.check()
        firsts = sum(one.rank != RESUMED and not one.submit.held for one in self.queue)
        assert firsts <= self.held_max, f"{firsts} requests wait"

    # ---- small helpers --------------------------------------------------------------------------------------

    def _forget(self, key: tuple[str, int], now: float) -> None:
        one = self.queue.get(key)
        if one is not None:
            self._drop(one, now)

    def _drop(self, one: HeldRequest, now: float) -> None:
        self.queue.drop(one)
        self._pace.measure(len(self.queue) > 0, 0.0, now)

    def _refused(
        self,
        submit: Submit,
        code: str,
        message: str,
        status: int,
        predicted_s: float,
        retry_s: float,
    ) -> Refusal:
        self._count(f"requests_refused_{code}_total")
        retry = min(max(retry_s, RETRY_S[0]), RETRY_S[1])
        return Refusal(submit, code, message, status, retry, predicted_s)

    def _count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + amount


def held(wish: IncomingRequest, now: float) -> HeldRequest:
    """The queue entry for an incoming request."""
    request = wish.submit.request
    since = now - wish.submit.age_s
    first = request.attempt == 0
    by = since + request.ttft_s if first and request.ttft_s is not None else float("inf")
    rank = request.priority if first else RESUMED
    return HeldRequest(wish.submit, rank, wish.tokens, wish.run_s, since, now, by)
