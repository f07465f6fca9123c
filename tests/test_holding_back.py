"""The scheduler holds requests back while no worker has room: when, in which order, and each is answered once."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.actions import Log, Send
from memserve.costs import StepCosts
from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import (
    Cancel,
    Inquire,
    Inquired,
    Load,
    Member,
    Planned,
    Prefill,
    Rejected,
    Request,
    Submit,
)
from memserve.scheduling.admission import FORGOTTEN_S, Admission
from memserve.scheduling.policies import LeastLoad
from memserve.scheduling.pricing import Cost
from memserve.scheduling.scheduler import SchedulerCore
from memserve.tokens import pack

COSTS = StepCosts(((1.0, 0.001), (1001.0, 1.001)), chunk_tokens=512)
"""One token per millisecond."""
ME = Member(ActorId("scheduler-0.1"), "GlobalScheduler", "ipc://s", 1, "ready")
SHARD = Member(ActorId("s0.1"), "MemPoolShard", "ipc://s0", 1, "ready")
FRONTEND = Member(ActorId("frontend-0.1"), "Frontend", "ipc://f", 1, "ready")


def worker(name: str = "w0", tokens: float = 0.0, rows: float = 0.0, **more) -> Member:
    """A worker that reports so many tokens waiting and so many streams."""
    load = {"waiting_tokens": tokens, "decode_rows": rows, "context_tokens": 100.0 * rows, "rows_max": 8.0}
    member = Member(
        ActorId(f"{name}.1"), "DecodeWorker", f"ipc://{name}", 1, "ready", "both", SHARD.id, load, COSTS
    )
    return attrs.evolve(member, **more)


def submit(
    name: str, tokens: int = 100, *, scope: str = "a", attempt: int = 0, priority: int = 0,
    ttft_s: float | None = None, held: bool = False,
) -> Submit:  # fmt: skip
    """A request of so many tokens that shares no prefix with others."""
    prompt = pack([sum(map(ord, name)) % 1000, *range(tokens - 1)])
    return Submit(
        Request(name, attempt, FRONTEND.id, scope, prompt, tokens, 20, (), Sampling(), priority, ttft_s),
        held=held,
    )


def scheduler(*members: Member, hold_back_s: float = 0.5, held_max: int = 64) -> SchedulerCore:
    """A core that received a Load of each member at time 0."""
    core = SchedulerCore(ME, "cost", Cost(), admission=Admission(held_max), hold_back_s=hold_back_s)
    for one in (SHARD, FRONTEND, *members):
        core.receive(one.id, Load(one), 0.0)
    core.advance(0.0)
    core.take()
    return core


def said(core: SchedulerCore, kind: type) -> list:
    """The core's messages of one type, or its log lines."""
    core.check()
    actions = core.take()
    if kind is Log:
        return [one for one in actions if isinstance(one, Log)]
    return [one.message for one in actions if isinstance(one, Send) and isinstance(one.message, kind)]


def names(messages: list) -> list[str]:
    """The ids of the messages' requests."""
    return [one.request if isinstance(one.request, str) else one.request.id for one in messages]


def test_requests_wait_while_every_worker_has_enough_and_leave_in_time() -> None:
    """A request is held while each worker has more than hold_back_s of work, and placed when one has that left."""
    core = scheduler(worker("w0", tokens=800), worker("w1", tokens=2000))
    core.receive(FRONTEND.id, submit("r"), 0.0)
    assert said(core, Inquired) == [Inquired("r", 0, held=True)]
    core.advance(0.0)
    # w0's 800 tokens take 0.8 s: by then half a second is left of them.
    assert core.deadline == pytest.approx(0.3, abs=0.01)
    core.advance(core.deadline - 0.001)
    assert said(core, Planned) == []
    core.advance(core.deadline)
    assert [one.plan.prefill for one in said(core, Planned)] == ["w0.1"]


def test_a_report_of_room_lets_what_waits_leave() -> None:
    """A report of free room has the next held request placed, earlier than predicted."""
    core = scheduler(worker("w0", tokens=5000))
    for name in ("first", "second"):
        core.receive(FRONTEND.id, submit(name, 600), 0.0)
    core.receive(ActorId("w0.1"), Load(worker("w0")), 0.1)
    assert names(said(core, Prefill)) == ["first"]
    core.receive(ActorId("w0.1"), Load(worker("w0")), 0.7)
    assert names(said(core, Prefill)) == ["second"]


def test_a_worker_whose_batch_is_full_has_no_room() -> None:
    """A worker with more streams than rows gets no request, however few prompt tokens it has."""
    core = scheduler(worker("w0", rows=10.0))
    core.receive(FRONTEND.id, submit("r"), 0.0)
    core.advance(2.0)
    assert said(core, Planned) == []
    core.receive(ActorId("w0.1"), Load(worker("w0", rows=9.0)), 2.0)
    assert names(said(core, Planned)) == ["r"]


def test_priorities_come_first_and_tenants_take_turns() -> None:
    """Later attempts come first, then by priority, and tenants of equal priority take turns."""
    core = scheduler(worker("w0", tokens=5000))
    for i in range(4):
        core.receive(FRONTEND.id, submit(f"a{i}", 600), 0.0)
    core.receive(FRONTEND.id, submit("b0", 600, scope="b"), 0.1)
    core.receive(FRONTEND.id, submit("urgent", 600, priority=-1), 0.2)
    core.receive(FRONTEND.id, submit("again", 600, attempt=1), 0.3)
    order = names(said(core, Prefill))
    for second in range(1, 9):
        core.receive(FRONTEND.id, Load(FRONTEND), float(second))
        core.receive(ActorId("w0.1"), Load(worker("w0")), float(second))
        order += names(said(core, Prefill))
    assert order == ["again", "urgent", "a0", "b0", "a1", "a2", "a3"]


def test_a_later_attempt_is_placed_at_once() -> None:
    """A later attempt is placed at once, without waiting for room and without regard to its deadline."""
    core = scheduler(worker("w0", tokens=5000), held_max=2)
    core.receive(FRONTEND.id, submit("waits"), 0.0)
    core.receive(FRONTEND.id, submit("again", attempt=3, ttft_s=0.001), 0.0)
    assert names(said(core, Planned)) == ["again"]


def test_a_deadline_is_held_against_the_prediction() -> None:
    """A request predicted to miss its deadline is refused at once; one that waits is refused once it cannot be met."""
    core = scheduler(worker("w0", tokens=400))
    core.receive(FRONTEND.id, submit("soon", ttft_s=0.45), 0.0)
    (refused,) = said(core, Rejected)
    assert (refused.code, refused.status) == ("deadline_unreachable", 503)
    core.receive(FRONTEND.id, submit("later", ttft_s=0.8), 0.0)
    assert names(said(core, Planned)) == ["later"]
    # Now there are 0.5 s of prompts, so that this one waits, and the next report decides what becomes of it.
    core.receive(FRONTEND.id, submit("fills", 300), 0.0)
    core.receive(FRONTEND.id, submit("waits", ttft_s=1.2), 0.0)
    assert said(core, Rejected) == []
    core.receive(ActorId("w0.1"), Load(worker("w0", tokens=3000)), 0.5)
    core.advance(1.1)
    (refused,) = said(core, Rejected)
    assert (refused.request, refused.code) == ("waits", "deadline_missed")


def test_a_request_with_a_deadline_waits_for_a_free_row_here() -> None:
    """A request with a deadline is held while all batches are full, and goes to the first worker with a free row."""
    core = scheduler(worker("w0", rows=8.0), worker("w1", rows=8.0))
    core.receive(FRONTEND.id, submit("timed", ttft_s=5.0), 0.0)
    assert (said(core, Planned), core.deadline > 0.0) == ([], True)
    core.receive(ActorId("w1.1"), Load(worker("w1", rows=7.0)), 0.2)
    assert [one.plan.prefill for one in said(core, Planned)] == ["w1.1"]
    core.receive(FRONTEND.id, submit("whenever"), 0.3)
    assert names(said(core, Planned)) == ["whenever"], "as one ends, the next must be there"


def test_a_request_with_a_deadline_goes_where_it_is_in_time() -> None:
    """A request with a deadline is placed on a worker that meets it, even if another is cheaper."""
    workers = worker("w0", tokens=150), worker("w1", rows=7.0)
    core = scheduler(*workers)
    core.receive(FRONTEND.id, submit("whenever"), 0.0)
    assert [one.plan.prefill for one in said(core, Planned)] == ["w0.1"]
    core = scheduler(*workers)
    core.receive(FRONTEND.id, submit("timed", ttft_s=0.2), 0.0)
    assert [one.plan.prefill for one in said(core, Planned)] == ["w1.1"]


def test_every_policy_keeps_deadlines() -> None:
    """A policy that looks at token queues alone does not place a request with a deadline on a full batch."""
    core = SchedulerCore(ME, "least_load", LeastLoad())
    for one in (SHARD, FRONTEND, worker("w0", rows=9.0), worker("w1", tokens=100)):
        core.receive(one.id, Load(one), 0.0)
    core.receive(FRONTEND.id, submit("timed", ttft_s=0.5), 0.0)
    assert [one.plan.prefill for one in said(core, Planned)] == ["w1.1"]


def test_every_refusal_is_explained_in_one_line() -> None:
    """Each refusal writes one log line with its reason and is counted."""
    core = scheduler(worker("w0", tokens=5000), held_max=2)
    core.receive(FRONTEND.id, submit("waits"), 0.0)
    core.receive(FRONTEND.id, submit("refused"), 0.0)
    lines = [one for one in said(core, Log) if one.event == "request refused"]
    assert [(one.data["request"], one.data["code"]) for one in lines] == [("refused", "tenant_full")]
    assert core.gauges()["requests_refused_tenant_full_total"] == 1
    assert core.gauges()["requests_held"] == 1


def test_policies_that_predict_nothing_are_held_back_too() -> None:
    """Requests are held back under policies without predictions too, so that priorities always work."""
    core = SchedulerCore(ME, "least_load", LeastLoad(), hold_back_s=0.5)
    for one in (SHARD, FRONTEND, worker("w0", tokens=5000)):
        core.receive(one.id, Load(one), 0.0)
    core.receive(FRONTEND.id, submit("r"), 0.0)
    assert core.gauges()["requests_held"] == 1


class Answers(RuleBasedStateMachine):
    """Messages in any order, repeated or lost, and workers that come, go and have room or not: each request is answered
    once."""

    def __init__(self) -> None:
        super().__init__()
        self.core = scheduler(worker("w0"), held_max=4)
        self.now = 0.0
        self.names = 0
        self.open: dict[str, Submit] = {}
        """Submitted, and neither planned nor refused nor cancelled."""
        self.plans: dict[str, Planned] = {}
        self.cancelled: set[str] = set()

    @rule(
        scope=st.sampled_from("ab"),
        tokens=st.sampled_from((50, 700)),
        priority=st.sampled_from((0, -1, 4)),
        ttft_s=st.sampled_from((None, None, 2.0)),
    )
    def asks(self, scope: str, tokens: int, priority: int, ttft_s: float | None) -> None:
        self.names += 1
        asked = submit(f"r{self.names}", tokens, scope=scope, priority=priority, ttft_s=ttft_s)
        self.open[asked.request.id] = asked
        self.core.receive(FRONTEND.id, asked, self.now)

    @rule(data=st.data(), how=st.sampled_from(("submits again", "inquires", "cancels")))
    def repeats(self, data: st.DataObject, how: str) -> None:
        known = sorted({*self.open, *self.plans})
        if not known:
            return
        name = data.draw(st.sampled_from(known))
        if how == "cancels":
            self.core.receive(FRONTEND.id, Cancel(name, 0), self.now)
            self.open.pop(name, None)
            self.cancelled.add(name)
        elif how == "inquires":
            self.core.receive(FRONTEND.id, Inquire(name, 0), self.now)
        elif name in self.open:
            self.core.receive(FRONTEND.id, self.open[name], self.now)

    @rule(tokens=st.sampled_from((0.0, 400.0, 5000.0)), rows=st.sampled_from((0.0, 12.0)))
    def reports(self, tokens: float, rows: float) -> None:
        self.core.receive(ActorId("w0.1"), Load(worker("w0", tokens, rows)), self.now)

    @rule(state=st.sampled_from(("ready", "draining")))
    def a_second_worker(self, state: str) -> None:
        self.core.receive(ActorId("w1.1"), Load(worker("w1", state=state)), self.now)

    @rule(seconds=st.sampled_from((0.05, 0.6, 3.0)))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, max(self.now, self.core.deadline))
            for one in (SHARD, FRONTEND, worker("w0", 5000.0)):
                self.core.receive(one.id, Load(one), self.now)
            self.core.advance(self.now)
            assert self.core.deadline > self.now, "the core would be called again and again"
            self.answers_are_right()

    @invariant()
    def answers_are_right(self) -> None:
        self.core.advance(self.now)
        self.core.check()
        for action in self.core.take():
            if not isinstance(action, Send):
                continue
            match action.message:
                case Planned(request, _, plan):
                    before = self.plans.setdefault(request, action.message)
                    assert before.plan == plan, "planned twice"
                    self.open.pop(request, None)
                case Prefill(request, plan):
                    assert request.id not in self.plans or self.plans[request.id].plan == plan
                case Rejected(request):
                    assert request in self.open, "refused after another answer"
                    del self.open[request]

    def teardown(self) -> None:
        """Give room and time: every open request is planned when it is submitted again."""
        for _ in range(2000):
            if not self.open:
                return
            self.now += 0.05
            for one in (SHARD, FRONTEND, worker("w0")):
                self.core.receive(one.id, Load(one), self.now)
            for asked in list(self.open.values()):
                self.core.receive(FRONTEND.id, asked, self.now)
            self.answers_are_right()
        raise AssertionError(f"never answered: {sorted(self.open)}")


TestAnswers = Answers.TestCase
TestAnswers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_scheduler_that_died_is_followed_by_one_that_lets_all_of_them_wait_again() -> None:
    """A new scheduler accepts all requests that were held by its predecessor, even beyond its limit."""
    before = scheduler(worker("w0", tokens=9000), held_max=8)
    waiting = [submit(f"r{i}", scope=f"{i}") for i in range(6)]
    for one in waiting:
        before.receive(FRONTEND.id, one, 0.0)
    assert len(said(before, Inquired)) == 6
    after = scheduler(worker("w0", tokens=9000), held_max=2)
    after.receive(FRONTEND.id, submit("new", scope="new"), 1.0)
    after.take()
    for one in waiting:
        after.receive(FRONTEND.id, attrs.evolve(one, age_s=1.0, held=True), 1.0)
    assert said(after, Rejected) == []
    assert after.gauges()["requests_held"] == 7


def test_who_asks_after_nothing_is_forgotten() -> None:
    """A held request that its Frontend no longer asks after is dropped: it may run elsewhere."""
    core = scheduler(worker("w0", tokens=5000))
    core.receive(FRONTEND.id, submit("gone"), 0.0)
    core.receive(FRONTEND.id, submit("asked"), 0.0)
    core.take()
    for now in (2.0, 4.0, 6.0, 8.0, 10.0, FORGOTTEN_S):
        for one in (SHARD, FRONTEND, worker("w0", tokens=9000)):
            core.receive(one.id, Load(one), now)
        core.receive(FRONTEND.id, Inquire("asked", 0), now)
        core.advance(now)
    core.take()
    core.receive(FRONTEND.id, Inquire("gone", 0), FORGOTTEN_S)
    core.receive(FRONTEND.id, Inquire("asked", 0), FORGOTTEN_S)
    assert said(core, Inquired) == [Inquired("gone", 0, held=False), Inquired("asked", 0, held=True)]
