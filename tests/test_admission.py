"""Admission: who is accepted, who waits, and who is refused. Limits, deadlines, and each request answered once."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import Request, Submit
from memserve.scheduling.admission import (
    FORGOTTEN_S,
    HELD_S,
    RETRY_S,
    Admission,
    IncomingRequest,
    Refusal,
    held,
)
from memserve.tokens import pack

FRONTEND = ActorId("frontend-0.1")
INF = float("inf")


def wish(
    name: str, scope: str = "a", *, attempt: int = 0, moved: bool = False, age_s: float = 0.0,
    ttft_s: float | None = None, run_s: float = 0.1, soonest_s: float = 0.1, priority: int = 0,
) -> IncomingRequest:  # fmt: skip
    """A request that arrives."""
    request = Request(name, attempt, FRONTEND, scope, pack([1]), 1, 5, (), Sampling(), priority, ttft_s)
    return IncomingRequest(Submit(request, age_s, moved), 100.0, run_s, soonest_s)


def full(places: int, *scopes: str) -> Admission:
    """Admission with ``places`` places, where one request of each scope that is named waits."""
    admission = Admission(places)
    for i, scope in enumerate(scopes):
        assert admission.ask(wish(f"w{i}", scope), 1, 0.0) is None
    return admission


def refusal(admission: Admission, asked: IncomingRequest, now: float = 0.0) -> Refusal:
    """The refusal of a request that must be refused."""
    found = admission.ask(asked, 1, now)
    admission.check()
    assert found is not None
    return found


def test_a_tenant_may_take_half_of_the_places_and_leaves_some_to_others() -> None:
    """A tenant may have as many requests waiting as places stay free, so that nobody fills the queue alone."""
    admission = full(8, *"aaaa")
    assert (refused := refusal(admission, wish("a5"))).code == "tenant_full"
    assert (refused.status, "4 requests waiting" in refused.message) == (429, True)
    assert admission.ask(wish("b1", "b"), 1, 0.0) is None
    assert admission.ask(wish("b2", "b"), 1, 0.0) is None
    assert refusal(admission, wish("b3", "b")).code == "tenant_full"
    assert admission.ask(wish("c1", "c"), 1, 0.0) is None
    assert admission.ask(wish("d1", "d"), 1, 0.0) is None
    assert (refused := refusal(admission, wish("e1", "e"))).code == "cluster_full"
    assert (refused.status, refused.submit.request.id) == (503, "e1")


def test_retry_after_is_the_predicted_wait() -> None:
    """Retry-After is the predicted wait."""
    admission = full(8)
    for i in range(4):
        admission.ask(wish(f"w{i}", run_s=5.0), 2, 0.0)
    refused = admission.ask(wish("more", run_s=5.0), 2, 0.0)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(4 * 5.0 / 2)


def test_the_wait_is_predicted_from_how_fast_requests_leave() -> None:
    """The wait is predicted from the rate at which requests leave, which also counts streams; outages do not count."""
    admission = full(64)
    for i in range(20):
        admission.ask(wish(f"w{i}", run_s=1.0), 4, 0.0)
    assert admission.wait_s(held(wish("x"), 0.0), 4) == pytest.approx(20 / 4)
    for now in range(2, 20, 2):
        admission.served(admission.queue.first(), float(now))
    assert admission.wait_s(held(wish("x"), 20.0), 4) == pytest.approx(11 / 0.5)
    admission.excuse(20.0)
    admission.advance(False, 20.0)
    admission.advance(True, 21.0)
    assert admission.wait_s(held(wish("x"), 21.0), 4) == pytest.approx(11 / 4), "an outage is not measured"


def test_how_fast_requests_leave_is_measured_over_gaps() -> None:
    """The rate is also measured over times in which the queue was empty."""
    admission = full(64)
    for second in range(4):
        admission.ask(wish(f"w{second}", run_s=1.0), 4, 10.0 * second)
        admission.served(admission.queue.first(), 10.0 * second + 1.0)
    admission.ask(wish("first", run_s=1.0), 4, 50.0)
    assert admission.wait_s(held(wish("x"), 50.0), 4) == pytest.approx(1.0)


def test_a_refusal_states_its_margin() -> None:
    """The explanation of a refusal contains the margin that was added to the prediction."""
    admission = full(8)
    asked = attrs.evolve(wish("late", ttft_s=0.5, soonest_s=0.6), margin_s=0.2)
    assert admission.explain(refusal(admission, asked))["margin_ms"] == pytest.approx(200.0)


def test_what_was_let_in_once_is_not_refused_for_lack_of_a_place() -> None:
    """A later attempt, or a request that waited at another scheduler, is accepted even if there is no place."""
    admission = full(2, "a")
    assert refusal(admission, wish("new")).status == 429
    assert admission.ask(wish("again", attempt=1, ttft_s=0.001, age_s=9.0, soonest_s=5.0), 1, 9.0) is None
    assert admission.ask(wish("moved", moved=True, age_s=3.0), 1, 9.0) is None
    admission.check()
    assert admission.queue.first().submit.request.id == "again"


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    """A request whose deadline cannot be met by the prediction is refused at once."""
    admission = full(8, "a", "a")
    assert admission.ask(wish("enough", ttft_s=0.35), 1, 0.0) is None
    refused = refusal(admission, wish("late", ttft_s=0.35))
    assert (refused.code, refused.status) == ("deadline_unreachable", 503)
    assert "within 350 ms" in refused.message and "about 400 ms" in refused.message
    assert refusal(admission, wish("old", age_s=9.0, ttft_s=9.35)).code == "deadline_unreachable"


def test_nobody_can_say_what_comes_when_no_worker_is_ready() -> None:
    """While no worker is ready there is no prediction, and a request is refused when its deadline has nearly passed."""
    admission = full(8)
    assert admission.ask(wish("waits", ttft_s=1.0, soonest_s=INF), 0, 0.0) is None
    assert admission.deadline == pytest.approx(0.9)
    assert admission.advance(False, 0.89) == []
    (refused,) = admission.advance(False, 0.91)
    assert (refused.code, refused.submit.age_s) == ("deadline_missed", pytest.approx(0.91))
    assert not len(admission)


def test_a_request_waits_for_a_worker_to_become_ready_and_not_for_ever() -> None:
    """Without a ready worker a request waits for HELD_S at most."""
    admission = full(8, "a")
    now = 0.0
    while now < 50.0 + HELD_S - 1:
        admission.wanted(("w0", 0), now)
        assert admission.advance(now < 50.0, now) == []
        now += 1.0
    admission.wanted(("w0", 0), now)
    assert admission.deadline <= 50.0 + HELD_S
    (refused,) = admission.advance(False, 50.0 + HELD_S)
    assert (refused.code, refused.status) == ("no_capacity", 503)


def test_the_log_explains_a_refusal() -> None:
    """The explanation of a refusal has all its circumstances, and it is counted."""
    admission = full(2, "a")
    asked = wish("r", age_s=0.5, ttft_s=2.0, priority=3)
    assert admission.explain(refusal(admission, asked)) == {
        "request": "r", "attempt": 0, "code": "tenant_full",
        "reason": "this key has 1 requests waiting, and may not have more than places are left free, 1"
        " (scheduler.held_max = 2)",
        "status": 429, "retry_after_s": RETRY_S[0], "priority": 3, "prompt_tokens": 1, "waited_ms": 500.0,
        "wanted_ttft_ms": 2000.0, "predicted_ttft_ms": pytest.approx(200.0), "margin_ms": 0.0, "waiting": 1, "waiting_of_tenant": 1,
    }  # fmt: skip
    assert admission.gauges()["requests_refused_tenant_full_total"] == 1


class Waiting(RuleBasedStateMachine):
    """Requests that arrive, leave, are asked after and expire in any order: each waits, or has left in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(6)
        self.now = 0.0
        self.names = 0
        self.waits: dict[tuple[str, int], IncomingRequest] = {}
        self.heard: dict[tuple[str, int], float] = {}
        self.served = True

    @rule(
        scope=st.sampled_from("abc"),
        attempt=st.sampled_from((0, 0, 0, 2)),
        moved=st.sampled_from((False, False, True)),
        ttft_s=st.sampled_from((None, 0.5, 5.0, 50.0)),
        run_s=st.sampled_from((0.1, 1.0)),
        priority=st.sampled_from((0, 0, -2, 3)),
    )
    def comes(
        self, scope: str, attempt: int, moved: bool, ttft_s: float | None, run_s: float, priority: int
    ) -> None:
        self.names += 1
        soonest = run_s if self.served else INF
        asked = wish(
            f"r{self.names}", scope, attempt=attempt, moved=moved, ttft_s=ttft_s, run_s=run_s,
            soonest_s=soonest, priority=priority,
        )  # fmt: skip
        key = (f"r{self.names}", attempt)
        free = 6 - len(self.waits)
        mine = sum(one.submit.request.scope == scope for one in self.waits.values())
        refused = self.admission.ask(asked, 2, self.now)
        fits = attempt > 0 or moved or mine < free
        if refused is None:
            assert fits
            self.waits[key], self.heard[key] = asked, self.now
            return
        assert attempt == 0
        assert RETRY_S[0] <= refused.retry_after_s <= RETRY_S[1]
        if refused.code == "deadline_unreachable":
            assert fits and ttft_s is not None and self.served
        else:
            assert not fits
            assert (refused.code, refused.status) == (
                ("cluster_full", 503) if free <= 0 else ("tenant_full", 429)
            )

    @precondition(lambda self: self.waits)
    @rule()
    def is_placed(self) -> None:
        one = self.admission.queue.first()
        del self.waits[one.key]
        self.admission.served(one, self.now)

    @precondition(lambda self: self.waits)
    @rule(data=st.data(), how=st.sampled_from(("asked after", "withdrawn")))
    def is_wanted_or_not(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.waits)))
        if how == "withdrawn":
            self.admission.withdraw(*key, self.now)
            del self.waits[key]
        else:
            assert self.admission.wanted(key, self.now)
            self.heard[key] = self.now
        assert not self.admission.wanted(("nobody", 0), self.now)

    @rule(served=st.booleans(), seconds=st.sampled_from((0.0, 0.3, 3.0, 20.0)))
    def time_passes(self, served: bool, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until or not seconds:
            self.now = min(until, max(self.now, self.admission.deadline))
            self.served = served
            for refused in self.admission.advance(served, self.now):
                key = (refused.submit.request.id, refused.submit.request.attempt)
                del self.waits[key]
                assert refused.code in ("deadline_missed", "no_capacity")
            assert self.admission.deadline > self.now, "the core would be called again and again"
            for key in [one for one in self.waits if self.now - self.heard[one] >= FORGOTTEN_S]:
                del self.waits[key]
            if not seconds:
                break

    @rule()
    def its_frontend_dies(self) -> None:
        self.admission.forget_frontends({FRONTEND}, self.now)
        self.waits.clear()

    @invariant()
    def everyone_is_accounted_for(self) -> None:
        self.admission.check()
        assert {one.key for one in self.admission.queue} == set(self.waits)
        for one in self.admission.queue:
            assert attrs.asdict(one.submit, recurse=False) == attrs.asdict(
                self.waits[one.key].submit, recurse=False
            )


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
