"""The Frontend's journal: every token once, in order, whatever is repeated, late or missing."""

from __future__ import annotations

import pytest

from memserve.actions import Deliver, Log, Send
from memserve.errors import RequestFailed
from memserve.journal import ATTEMPTS_MAX, SUBMIT_REPEAT_S, FrontendCore
from memserve.messages import (
    ActorId,
    Cancel,
    Cluster,
    Failed,
    Gone,
    Member,
    Origins,
    Plan,
    Planned,
    Rejected,
    Request,
    Sampling,
    Submit,
    Timings,
    Tokens,
    TokenUpdate,
)
from memserve.scheduling.presence import Presence, seed_id
from memserve.tokens import pack

ME = ActorId("frontend-0.1")
P, D, S, GS = ActorId("p0.1"), ActorId("d0.1"), ActorId("s0.1"), ActorId("scheduler-0.1")
PLAN = Plan(P, D, S, GS)
SEEDS = (seed_id("scheduler-0"), seed_id("scheduler-1"))


def frontend(requests_max: int = 4) -> FrontendCore:
    """A core with one open request ``r`` of three prompt tokens."""
    core = FrontendCore(Presence(Member(ME, "Frontend", "ipc://f", 1, "ready"), SEEDS), requests_max)
    core.open(request("r"), 0.0)
    return core


def request(name: str) -> Request:
    """Three prompt tokens, ten more wanted."""
    return Request(name, 0, ME, "", pack([7, 8, 9]), 3, 10, (), Sampling())


def update(position: int, *tokens: int, attempt: int = 0, finish: str | None = None) -> Tokens:
    """New tokens of ``r``."""
    timings = Timings(1, 2, 3, 4) if finish else None
    origins = Origins(*range(11, 20)) if finish else None
    return Tokens((TokenUpdate("r", attempt, position, pack(tokens), 2, finish, timings, origins),))


def took(core: FrontendCore, kind: type) -> list:
    """Its actions of one kind; for messages, the messages."""
    core.check()
    actions = core.take()
    if issubclass(kind, Deliver | Log):
        return [one for one in actions if isinstance(one, kind)]
    return [
        (one.to, one.message) for one in actions if isinstance(one, Send) and isinstance(one.message, kind)
    ]


def test_repeats_are_dropped_and_overlaps_trimmed() -> None:
    """A client must see no token twice."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 0.2)
    core.receive(D, update(3, 50), 0.3)
    core.receive(D, update(3, 50, 51, 52), 0.4)
    assert [one.tokens for one in took(core, Deliver)] == [(50,), (51, 52)]


def test_a_gap_is_another_attempt() -> None:
    """A lost message must not become a missing token: what is left is generated again."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 0.2)
    core.take()
    core.receive(D, update(5, 52), 0.3)
    actions = core.take()
    (resubmitted,) = [
        one.message for one in actions if isinstance(one, Send) and isinstance(one.message, Submit)
    ]
    assert (resubmitted.request.attempt, resubmitted.request.tokens) == (1, pack([7, 8, 9, 50]))
    assert {one.to for one in actions if isinstance(one, Send) and isinstance(one.message, Cancel)} == {P, D}
    core.receive(D, update(4, 51), 0.4)
    assert took(core, Deliver) == []  # the old attempt is fenced off
    core.receive(GS, Planned("r", 1, PLAN), 0.5)
    core.receive(P, update(4, 51, attempt=1, finish="stop"), 0.6)
    assert [(one.tokens, one.finish) for one in took(core, Deliver)] == [((51,), "stop")]
    assert core.idle


@pytest.mark.parametrize(
    ("dead", "fed_by", "again"),
    [(P, None, True), (P, P, True), (P, D, False), (D, D, True), (S, D, True), (ActorId("p9.1"), D, False)],
)
def test_a_death_concerns_those_who_still_need_the_dead(
    dead: ActorId, fed_by: ActorId | None, again: bool
) -> None:
    """A stream that its decode worker feeds goes on without its prefill worker."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    if fed_by is not None:
        core.receive(fed_by, update(3, 50), 0.2)
    core.take()
    core.receive(GS, Gone((dead,)), 0.3)
    assert bool(took(core, Submit)) is again


def test_an_unanswered_submit_goes_to_the_next_scheduler() -> None:
    """A scheduler that is gone must not hold up a request for longer than a second."""
    core = frontend()
    assert [to for to, _ in took(core, Submit)] == [SEEDS[0]]
    assert core.deadline == SUBMIT_REPEAT_S
    core.advance(SUBMIT_REPEAT_S)
    assert [to for to, _ in took(core, Submit)] == [SEEDS[1]]
    core.receive(GS, Planned("r", 0, PLAN), 1.1)
    core.advance(core.deadline)
    assert took(core, Submit) == []


def test_failures_reach_the_client_with_their_status() -> None:
    """A typed error, not a broken stream."""
    for message in (
        Rejected("r", 0, "no_capacity", "m", 503, 2.0),
        Failed("r", 0, "no_capacity", "m", 503, False, 2.0),
    ):
        core = frontend()
        core.receive(GS, message, 0.1)
        (failure,) = [one.failure for one in took(core, Deliver)]
        assert (failure.code, failure.message, failure.status, failure.retry_after_s) == (
            "no_capacity",
            "m",
            503,
            2.0,
        )
        assert core.idle


def test_a_request_that_kills_its_workers_ends() -> None:
    """One poisonous request must not restart workers for ever."""
    core = frontend()
    for attempt in range(ATTEMPTS_MAX):
        core.receive(P, Failed("r", attempt, "lease_lost", "m", 503, retry=True), 0.1)
    (delivery,) = took(core, Deliver)
    assert delivery.failure is not None
    assert delivery.failure.code == "attempts_exhausted"


def test_the_canonical_line_tells_everything() -> None:
    """One line a finished request, with where its time went."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 1.0)
    core.receive(D, update(4, 51, finish="length"), 1.5)
    line = next(one.data for one in took(core, Log) if one.event == "request finished")
    assert line == {
        "request": "r", "attempt": 0, "outcome": "length", "prompt_tokens": 3, "cached_tokens": 2, "output_tokens": 2,
        "ttft_ms": 1000.0, "tpot_ms": 500.0, "total_ms": 1500.0, "queue_ms": 1, "prefill_ms": 2, "handoff_ms": 3,
        "decode_ms": 4, "attempts": 1, "prefill": P, "decode": D,
        "matched_device_tokens": 11, "matched_host_tokens": 12, "matched_disk_tokens": 13, "fetched_tokens": 14,
        "matched_decode_tokens": 15, "bytes_fetched": 16, "bytes_to_decode": 17, "bytes_to_prefill": 18, "bytes_saved": 19,
    }  # fmt: skip


def test_leaving_cancels_the_attempt_once() -> None:
    """Workers must stop at once when nobody reads, and a late call must do no harm."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.take()
    core.close("r", "cancelled", 0.2)
    core.close("r", "cancelled", 0.3)
    assert [to for to, _ in took(core, Cancel)] == [P, D]
    core.receive(D, update(3, 50), 0.4)
    assert took(core, Deliver) == []


def test_health_needs_a_pair_and_forgets_old_schedulers() -> None:
    """/health must be true only when a request could be placed."""
    core = frontend()
    shard = Member(S, "MemPoolShard", "e", 1, "ready")
    worker = Member(P, "DecodeWorker", "e", 1, "ready", "both", S)
    assert not core.healthy()
    core.receive(GS, Cluster(GS, (shard, worker)), 0.1)
    assert core.healthy()
    core.receive(GS, Cluster(ActorId("scheduler-0.2"), (shard,)), 0.2)
    assert not core.healthy()
    assert [one.id for one in core.members()] == [S]
    with pytest.raises(RequestFailed, match="max_requests"):
        for i in range(5):
            core.open(request(f"more{i}"), 0.3)
