"""The GlobalScheduler's core: it keeps the list of members, places requests, and announces deaths."""

from __future__ import annotations

import attrs
import pytest

from memserve.actions import Died, Send
from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import (
    Cancel,
    Cluster,
    Gone,
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
from memserve.pool_messages import IndexDelta, IndexEvent, IndexSnapshot, Prefetch
from memserve.scheduling.admission import HELD_S
from memserve.scheduling.fleet import Fleet
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.membership import DEAD_AFTER_S, DEAD_STARTING_S, pairs
from memserve.scheduling.policies import LeastLoad, RoundRobin
from memserve.scheduling.scheduler import SMALL_CLUSTER, SchedulerCore
from memserve.tokens import pack

ME = Member(ActorId("scheduler-0.1"), "GlobalScheduler", "ipc://s", 1, "ready")


def member(
    name: str, kind: str, role: str = "", shard: str = "s0.1", state: str = "ready", **load: float
) -> Member:
    """A member of incarnation 1."""
    return Member(ActorId(f"{name}.1"), kind, f"ipc://{name}", 1, state, role, shard if role else "", load)


SHARD = member("s0", "MemPoolShard")
FRONTEND = member("frontend-0", "Frontend")


def prefill(name: str, **more) -> Member:
    """A prefill worker."""
    return member(name, "PrefillWorker", "prefill", **more)


def decode(name: str, **more) -> Member:
    """A decode worker."""
    return member(name, "DecodeWorker", "decode", **more)


def submit(name: str, attempt: int = 0, tokens: int = 10) -> Submit:
    """A Submit of a request whose prompt has this many tokens."""
    return Submit(Request(name, attempt, FRONTEND.id, "", pack(range(tokens)), tokens, 5, (), Sampling()))


def scheduler(*members: Member, policy=None) -> SchedulerCore:
    """A core that received a Load of each member at time 0."""
    core = SchedulerCore(ME, "least_load", policy or LeastLoad())
    for one in members:
        core.receive(one.id, Load(one), 0.0)
    core.take()
    return core


def sent(core: SchedulerCore, kind: type) -> list[Send]:
    """The core's messages of one type."""
    core.check()
    return [one for one in core.take() if isinstance(one, Send) and isinstance(one.message, kind)]


def test_pairs_share_a_ready_shard() -> None:
    """Only workers that are ready and on the same ready shard form a pair: one cannot read the pages of another shard."""
    other = member("s1", "MemPoolShard")
    workers = [prefill("p0"), prefill("p1", shard="s1.1"), decode("d0"), decode("d1", shard="s1.1")]
    starting = decode("d2", state="starting")
    homeless = decode("d3", shard="s9.1")
    both = member("w0", "DecodeWorker", "both")
    found = {
        (one.prefill.id, one.decode.id) for one in pairs([SHARD, other, *workers, starting, homeless, both])
    }
    assert found == {("p0.1", "d0.1"), ("p0.1", "w0.1"), ("p1.1", "d1.1"), ("w0.1", "w0.1")}


def test_a_plan_goes_to_worker_and_frontend_and_repeats_alike() -> None:
    """The plan is sent to the prefill worker and the Frontend; a repeated Submit is answered with the same plan."""
    core = scheduler(SHARD, FRONTEND, prefill("p0"), prefill("p1"), decode("d0"))
    core.receive(FRONTEND.id, submit("r"), 1.0)
    first = core.take()
    core.receive(FRONTEND.id, submit("r"), 2.0)
    again = [one for one in core.take() if isinstance(one, Send)]
    assert {type(one.message) for one in first if isinstance(one, Send)} == {Planned, Prefill}
    assert {attrs.astuple(one, recurse=False) for one in again} == {
        attrs.astuple(one, recurse=False) for one in first if isinstance(one, Send)
    }


def test_least_load_spreads_a_burst() -> None:
    """The policy counts its own recent placements, because load reports lag: a burst does not all go to one worker."""
    core = scheduler(SHARD, prefill("p0", waiting_tokens=30.0), prefill("p1"), decode("d0"), decode("d1"))
    for i in range(9):
        core.receive(FRONTEND.id, submit(f"r{i}"), 1.0)
    placed = [one.to for one in sent(core, Prefill)]
    assert (placed.count("p0.1"), placed.count("p1.1")) == (3, 6)


def test_round_robin_takes_turns() -> None:
    """Every worker gets the same number of requests, and every pair its turn."""
    core = scheduler(SHARD, prefill("p0"), prefill("p1"), decode("d0"), decode("d1"), policy=RoundRobin())
    for i in range(8):
        core.receive(FRONTEND.id, submit(f"r{i}"), 1.0)
    plans = [(one.message.plan.prefill, one.message.plan.decode) for one in sent(core, Planned)]
    assert sorted(plans) == sorted(2 * [(p, d) for p in ("p0.1", "p1.1") for d in ("d0.1", "d1.1")])


def test_requests_wait_for_a_worker_then_are_refused() -> None:
    """A request waits while there is no worker; after HELD_S seconds it is refused with 503."""
    core = scheduler(SHARD, FRONTEND)
    core.receive(FRONTEND.id, submit("placed"), 0.0)
    core.receive(FRONTEND.id, submit("cancelled"), 0.0)
    core.receive(FRONTEND.id, Cancel("cancelled", 0), 0.5)
    assert sent(core, Planned) == []
    worker = member("w0", "DecodeWorker", "both")
    core.receive(worker.id, Load(worker), 1.0)
    assert [one.message.request for one in sent(core, Planned)] == ["placed"]
    core.receive(ActorId("x"), Died(worker.id), 2.0)
    core.receive(FRONTEND.id, submit("late"), 2.0)
    core.advance(2.0)
    assert sent(core, Rejected) == []
    for second in range(3, 2 + int(HELD_S)):
        core.receive(FRONTEND.id, Load(FRONTEND), float(second))
        core.receive(FRONTEND.id, Inquire("late", 0), float(second))
        core.advance(float(second))
    assert {one.message for one in sent(core, Inquired)} == {Inquired("late", 0, held=True)}
    assert core.deadline <= 2.0 + HELD_S
    core.advance(2.0 + HELD_S)
    (refusal,) = sent(core, Rejected)
    assert (refusal.message.status, refusal.message.retry_after_s) == (503, 2.0)


def test_a_request_that_waits_is_placed_when_it_is_asked_for_again() -> None:
    """A repeated Submit of a waiting request places it, if a worker has become free unannounced, and only once."""
    core = scheduler(SHARD, FRONTEND)
    core.receive(FRONTEND.id, submit("r"), 0.0)
    core.fleet.heard(decode("w0"), 0.5)
    core.fleet.heard(prefill("p0"), 0.5)
    core.receive(FRONTEND.id, submit("r"), 1.0)
    core.advance(1.0)
    assert [one.message.request for one in sent(core, Planned)] == ["r"]
    assert core.gauges()["requests_held"] == 0


def test_what_a_waiting_request_needs_is_brought_in_meanwhile() -> None:
    """While a request waits, its pages on slower tiers are prefetched, so that it does not wait for them afterwards."""
    core = scheduler(SHARD, FRONTEND)
    for entry, (tier, tokens) in enumerate(((0, pack(range(16))), (1, pack(range(16, 32)))), start=1):
        event = IndexEvent("stored", entry, entry - 1, tokens=tokens, tier=tier)
        core.receive(SHARD.id, IndexDelta(entry - 1, (event,)), 0.0)
    core.receive(FRONTEND.id, submit("near", tokens=16), 0.0)
    assert sent(core, Prefetch) == []
    core.receive(FRONTEND.id, submit("far", tokens=40), 0.0)
    (hint,) = sent(core, Prefetch)
    assert (hint.to, hint.message) == (SHARD.id, Prefetch("", pack(range(32))))


def test_a_prompt_with_log_probabilities_is_placed_as_if_nothing_of_it_were_cached() -> None:
    """A request for log probabilities of its prompt is placed with 0 cached tokens: such a prompt is computed whole."""
    for logprobs, expected in ((None, 32), (0, 0)):
        core = scheduler(SHARD, FRONTEND, prefill("p0"), decode("d0"))
        core.receive(SHARD.id, IndexDelta(0, (IndexEvent("stored", 1, 0, tokens=pack(range(32))),)), 0.0)
        plain = submit("r", tokens=40)
        request = attrs.evolve(plain.request, sampling=Sampling(prompt_logprobs=logprobs))
        core.receive(FRONTEND.id, attrs.evolve(plain, request=request), 1.0)
        (placed,) = sent(core, Prefill)
        assert placed.message.plan.expected_tokens == expected
        assert placed.message.request.tokens == plain.request.tokens


def test_a_cancel_that_crosses_the_plan_follows_it() -> None:
    """A Cancel that comes after the request was planned is passed on to its workers: its Frontend may not know the plan
    yet."""
    core = scheduler(SHARD, FRONTEND, prefill("p0"), decode("d0"))
    core.receive(FRONTEND.id, submit("r"), 1.0)
    core.take()
    core.receive(FRONTEND.id, Cancel("r", 0), 1.0)
    assert {one.to for one in sent(core, Cancel)} == {"p0.1", "d0.1"}


@pytest.mark.parametrize("how", ["silent", "died", "replaced"])
def test_the_dead_are_announced_and_fenced_off(how: str) -> None:
    """A death is announced to everyone, whether by silence, report or a successor; the dead actor is answered with Gone
    if it returns."""
    core = scheduler(SHARD, FRONTEND, prefill("p0"), decode("d0"))
    now = 1.0
    if how == "died":
        core.receive(ActorId("scheduler-0.1"), Died(ActorId("d0.1")), now)
    elif how == "replaced":
        successor = attrs.evolve(decode("d0"), id=ActorId("d0.2"))
        core.receive(successor.id, Load(successor), now)
    else:
        now = DEAD_AFTER_S
        for one in (SHARD, FRONTEND, prefill("p0")):
            core.receive(one.id, Load(one), now - 1)
        assert core.deadline <= now
        core.advance(now)
    announced = [one for one in core.take() if isinstance(one, Send)]
    informed = {one.to for one in announced if isinstance(one.message, Gone) and "d0.1" in one.message.actors}
    assert informed >= {SHARD.id, FRONTEND.id, "p0.1", "d0.1"}
    views = [one.message for one in announced if isinstance(one.message, Cluster) and one.to == FRONTEND.id]
    assert "d0.1" in views[-1].gone
    assert "d0.1" not in {one.id for one in views[-1].members}
    core.receive(ActorId("d0.1"), Load(decode("d0")), now + 1)
    assert [(one.to, one.message.actors) for one in sent(core, Gone)] == [("d0.1", ("d0.1",))]


def test_a_late_heartbeat_of_a_dead_frontend_harms_no_successor() -> None:
    """Its last messages may be read after those of its successor, whose requests the workers would drop."""
    core = scheduler(SHARD, FRONTEND, prefill("p0"), decode("d0"))
    successor = attrs.evolve(FRONTEND, id=ActorId("frontend-0.2"))
    core.receive(successor.id, Load(successor), 1.0)
    core.take()
    core.receive(FRONTEND.id, Load(FRONTEND), 1.1)
    assert [(one.to, one.message.actors) for one in sent(core, Gone)] == [(FRONTEND.id, (FRONTEND.id,))]
    assert successor.id in core.membership.members and FRONTEND.id not in core.membership.members


def test_one_that_died_unseen_is_declared_dead_when_somebody_waits_for_it() -> None:
    """An actor that died while there was no scheduler is declared dead once a worker reports that it waits for it."""
    waiting = attrs.evolve(prefill("p0"), needs=(ActorId("d0.0"),))
    core = scheduler(SHARD, waiting)
    for second in range(1, int(DEAD_AFTER_S) + 1):
        core.receive(SHARD.id, Load(SHARD), float(second))
        core.receive(waiting.id, Load(waiting), float(second))
        core.advance(second - 0.01)
    assert not sent(core, Gone), "it may only be slow to register again"
    core.advance(DEAD_AFTER_S)
    assert ("p0.1", ("d0.0",)) in [(one.to, one.message.actors) for one in sent(core, Gone)]
    core.receive(waiting.id, Load(waiting), 100.0)  # it missed that, and every repeat
    assert [(one.to, one.message.actors) for one in sent(core, Gone)] == [("p0.1", ("d0.0",))]


def test_the_dead_leave_no_trace() -> None:
    """Nothing is kept about dead actors: each restart has a new id, so a scheduler that kept them would grow without end."""
    core = scheduler(SHARD, FRONTEND, prefill("p0"), decode("d0"))
    stored = IndexEvent("stored", 1, tokens=pack(range(16)))
    core.receive(SHARD.id, IndexDelta(0, (stored,)), 1.0)
    core.receive(FRONTEND.id, submit("r"), 1.0)
    assert set(core.fleet.workers) == {"p0.1", "d0.1"}
    assert core.gauges()["index_pages"] == 1
    for one in ("p0.1", "d0.1", SHARD.id):
        core.receive(ME.id, Died(ActorId(one)), 1.1)
    assert core.fleet == Fleet()
    assert core.index.tree == GlobalTree()


def test_a_scheduler_that_was_stopped_calls_nobody_silent() -> None:
    """A scheduler that was suspended declares nobody dead on waking: what the others sent meanwhile is still in its
    inbox."""
    core = scheduler(SHARD, prefill("p0"), decode("d0"))
    for second in range(3):
        core.advance(float(second))
    core.advance(100.0)
    assert not sent(core, Gone)
    core.receive(SHARD.id, Load(SHARD), 101.0)
    for tenth in range(1000, 1000 + int(10 * DEAD_AFTER_S) + 1):
        core.advance(tenth / 10)
    (gone,) = {one.message.actors for one in sent(core, Gone) if one.to == SHARD.id}
    assert set(gone) == {prefill("p0").id, decode("d0").id}


def test_in_a_large_cluster_changes_are_announced_together() -> None:
    """In a large cluster, views are sent at most once per interval: one for each of a thousand starts would drown
    everyone."""
    core = scheduler(SHARD, *(decode(f"d{i}") for i in range(2 * SMALL_CLUSTER)))
    more = [decode(f"e{i}") for i in range(50)]
    core.advance(0.5)
    core.take()
    core.receive(more[0].id, Load(more[0]), 1.0)
    assert len(sent(core, Cluster)) == 2 * SMALL_CLUSTER + 2
    for one in more[1:]:
        core.receive(one.id, Load(one), 1.001)
    assert not sent(core, Cluster)
    assert core.deadline < 1.1
    core.advance(core.deadline)
    views = sent(core, Cluster)
    assert {one.to for one in views} >= {SHARD.id, more[0].id, more[-1].id}
    assert len(views[0].message.members) == 2 * SMALL_CLUSTER + 52


def test_one_that_still_starts_may_be_silent_for_longer() -> None:
    """A member that is still starting is declared dead only after DEAD_STARTING_S: its imports may block it for seconds."""
    core = scheduler(SHARD, decode("d0", state="starting"))
    for second in range(int(DEAD_STARTING_S)):
        core.receive(SHARD.id, Load(SHARD), float(second))
        core.advance(float(second))
        assert not sent(core, Gone)
    core.advance(DEAD_STARTING_S)
    assert {one.message.actors for one in sent(core, Gone)} == {(decode("d0").id,)}


STORED = (IndexEvent("stored", 1, 0, tokens=pack(range(32))),)


@pytest.mark.parametrize("late", [IndexDelta(0, STORED), IndexSnapshot(1, 0, 1, STORED)])
def test_what_a_shard_said_before_it_died_is_not_heard_after(late) -> None:
    """Index messages that arrive after their shard's death are ignored."""
    core = scheduler(SHARD, prefill("p0"), decode("d0"))
    core.receive(ME.id, Died(SHARD.id), 1.0)
    core.receive(SHARD.id, late, 1.1)
    assert core.index.match("", pack(range(32)), 1.2).tokens == 0
