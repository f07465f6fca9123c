"""The Frontend's journal delivers every token once and in order, whatever is repeated, late or missing."""

from __future__ import annotations

import attrs
import pytest

from memserve.accounts import Origins, Timings
from memserve.actions import Deliver, Log, Send
from memserve.drawing import PromptLogprobs, Sampling
from memserve.errors import RequestFailed
from memserve.identity import ActorId
from memserve.journal import ATTEMPTS_MAX, CANCEL_REPEAT_S, FrontendCore
from memserve.journal_entry import OVERTAKEN_S, SUBMIT_REPEAT_S
from memserve.messages import (
    Cancel,
    Cluster,
    Failed,
    Gone,
    Inquire,
    Inquired,
    Member,
    Plan,
    Planned,
    PromptScores,
    Rejected,
    Request,
    Submit,
    Tokens,
    TokenUpdate,
)
from memserve.presence import Presence, seed_id
from memserve.tokens import pack, unpack

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
    """A request of three prompt tokens that wants ten more."""
    return Request(name, 0, ME, "", pack([7, 8, 9]), 3, 10, (), Sampling())


def update(position: int, *tokens: int, attempt: int = 0, finish: str | None = None) -> Tokens:
    """A message with new tokens of ``r``."""
    timings = Timings(1, 2, 3, 4) if finish else None
    origins = Origins(*range(11, 20)) if finish else None
    return Tokens((TokenUpdate("r", attempt, position, pack(tokens), 2, finish, timings, origins),))


def took(core: FrontendCore, kind: type) -> list:
    """The core's actions of one type; for a message type, pairs of receiver and message."""
    core.check()
    actions = core.take()
    if issubclass(kind, Deliver | Log):
        return [one for one in actions if isinstance(one, kind)]
    return [
        (one.to, one.message) for one in actions if isinstance(one, Send) and isinstance(one.message, kind)
    ]


def test_repeats_are_dropped_and_overlaps_trimmed() -> None:
    """Tokens that come twice, alone or as part of a longer message, are delivered once."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 0.2)
    core.receive(D, update(3, 50), 0.3)
    core.receive(D, update(3, 50, 51, 52), 0.4)
    assert [one.tokens for one in took(core, Deliver)] == [(50,), (51, 52)]


def test_a_gap_is_another_attempt() -> None:
    """When tokens stay missing for OVERTAKEN_S, the rest is submitted as a new attempt, and the old one is fenced off."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 0.2)
    core.take()
    core.receive(D, update(5, 52), 0.3)
    assert took(core, Submit) == [] and core.deadline == 0.3 + OVERTAKEN_S
    core.advance(0.3 + OVERTAKEN_S)
    actions = core.take()
    (resubmitted,) = [
        one.message for one in actions if isinstance(one, Send) and isinstance(one.message, Submit)
    ]
    assert (resubmitted.request.attempt, resubmitted.request.tokens) == (1, pack([7, 8, 9, 50]))
    assert {one.to for one in actions if isinstance(one, Send) and isinstance(one.message, Cancel)} == {P, D}
    core.receive(D, update(4, 51), 0.9)
    assert took(core, Deliver) == []  # the old attempt is fenced off
    core.receive(GS, Planned("r", 1, PLAN), 1.0)
    core.receive(P, update(4, 51, attempt=1, finish="stop"), 1.1)
    assert [(one.tokens, one.finish) for one in took(core, Deliver)] == [((51,), "stop")]
    assert core.idle


def test_tokens_that_overtake_others_wait_for_them() -> None:
    """Tokens that arrive ahead of earlier ones are kept until those arrive, without a new attempt."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(D, update(4, 51), 0.2)
    core.receive(D, update(5, 52), 0.3)
    core.receive(D, update(6, 53, finish="stop"), 0.4)
    assert took(core, Deliver) == []
    core.advance(0.2 + OVERTAKEN_S - 0.01)
    core.receive(P, update(3, 50), 0.6)
    assert [one.tokens for one in took(core, Deliver)] == [(50,), (51,), (52,), (53,)]
    core.advance(5.0)
    assert took(core, Submit) == [] and core.idle


def test_a_worker_that_missed_a_cancel_gets_it_again() -> None:
    """A worker that still sends tokens of a cancelled request gets the Cancel again, once per CANCEL_REPEAT_S: the
    first may be lost."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 0.2)
    core.close("r", "cancelled", 0.3)
    core.take()
    core.receive(D, update(4, 51), 0.4)
    core.receive(D, update(5, 52), 0.5)
    assert took(core, Cancel) == [(D, Cancel("r", 0))]
    core.receive(D, update(6, 53), 0.4 + CANCEL_REPEAT_S)
    core.receive(D, update(7, 54, finish="length"), 9.0)
    assert took(core, Cancel) == [(D, Cancel("r", 0))]


def scoring() -> FrontendCore:
    """A core whose open and planned request ``r`` has four prompt tokens and wants their log probabilities."""
    core = frontend()
    core.close("r", "cancelled", 0.0)
    asked = attrs.evolve(request("r"), tokens=pack([7, 8, 9, 10]), prompt_tokens=4)
    core.open(attrs.evolve(asked, sampling=Sampling(prompt_logprobs=1)), 0.0)
    core.take()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.take()
    return core


def scores(position: int, *ranks: int, attempt: int = 0) -> PromptScores:
    """Log probabilities of prompt tokens from ``position`` on; their ranks tell them apart."""
    eights = bytes(8 * len(ranks))
    return PromptScores("r", attempt, position, PromptLogprobs(eights, pack(ranks), pack(ranks), eights))


def ranks(core: FrontendCore) -> list[list[int]]:
    """The ranks of the prompt tokens that are delivered, one list per message."""
    return [list(unpack(one.ranks)) for delivery in took(core, Deliver) for one in delivery.prompt]


def test_the_scores_of_a_prompt_are_delivered_once() -> None:
    """Log probabilities of the prompt that come twice, or again with a new attempt, are delivered once."""
    core = scoring()
    core.receive(P, scores(1, 11), 0.2)
    core.receive(P, scores(1, 11, 12), 0.3)
    core.receive(P, scores(1, 11, 12), 0.4)
    assert ranks(core) == [[11], [12]]
    core.receive(GS, Gone((P,)), 0.5)
    ((_, again),) = took(core, Submit)
    assert again.request.sampling.prompt_logprobs == 1
    core.receive(P, scores(3, 13), 0.6)  # of the attempt that was given up
    core.receive(GS, Planned("r", 1, PLAN), 0.7)
    core.receive(P, scores(1, 11, 12, 13, attempt=1), 0.8)
    core.receive(P, update(4, 50, attempt=1), 0.9)
    deliveries = took(core, Deliver)
    assert [one.tokens for one in deliveries] == [(), (50,)]
    assert list(unpack(deliveries[0].prompt[0].ranks)) == [13]
    core.receive(GS, Gone((D,)), 1.0)
    ((_, third),) = took(core, Submit)
    assert (
        third.request.sampling.prompt_logprobs is None
    )  # the whole prompt was scored, so cached pages may be used now


@pytest.mark.parametrize("late", [scores(2, 12), update(4, 50)])
def test_a_gap_in_the_scores_is_another_attempt(late) -> None:
    """When log probabilities of some prompt tokens stay missing, a new attempt computes all of them."""
    core = scoring()
    core.receive(P, late, 0.2)
    core.advance(0.2 + OVERTAKEN_S)
    assert took(core, Deliver) == []
    core.receive(GS, Planned("r", 1, PLAN), 0.8)
    core.receive(P, scores(1, 11, 12, 13, attempt=1), 0.9)
    assert ranks(core) == [[11, 12, 13]]


@pytest.mark.parametrize(
    ("dead", "fed_by", "again"),
    [(P, None, True), (P, P, True), (P, D, False), (D, D, True), (S, D, True), (ActorId("p9.1"), D, False)],
)
def test_a_death_concerns_those_who_still_need_the_dead(
    dead: ActorId, fed_by: ActorId | None, again: bool
) -> None:
    """A death leads to a new attempt only if the request still needs the dead actor: not the prefill worker once decode
    feeds it."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    if fed_by is not None:
        core.receive(fed_by, update(3, 50), 0.2)
    core.take()
    core.receive(GS, Gone((dead,)), 0.3)
    assert bool(took(core, Submit)) is again


def test_an_unanswered_submit_goes_to_the_next_scheduler() -> None:
    """A Submit that is not answered within SUBMIT_REPEAT_S goes to the next scheduler; one that was planned is not
    repeated."""
    core = frontend()
    assert [to for to, _ in took(core, Submit)] == [SEEDS[0]]
    assert core.deadline == SUBMIT_REPEAT_S
    core.advance(SUBMIT_REPEAT_S)
    assert [to for to, _ in took(core, Submit)] == [SEEDS[1]]
    core.receive(GS, Planned("r", 0, PLAN), 1.1)
    core.advance(core.deadline)
    assert took(core, Submit) == []


def test_failures_reach_the_client_with_their_status() -> None:
    """A refusal or failure is delivered with its code, message, status and retry time, and ends the request."""
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
    """After ATTEMPTS_MAX failed attempts a request fails: it may be what kills its workers."""
    core = frontend()
    for attempt in range(ATTEMPTS_MAX):
        core.receive(P, Failed("r", attempt, "lease_lost", "m", 503, retry=True), 0.1)
    (delivery,) = took(core, Deliver)
    assert delivery.failure is not None
    assert delivery.failure.code == "attempts_exhausted"


def test_the_canonical_line_has_everything() -> None:
    """A finished request writes one log line with its counts and where its time went."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.receive(P, update(3, 50), 1.0)
    core.receive(D, update(4, 51, finish="length"), 1.5)
    line = next(one.data for one in took(core, Log) if one.event == "request finished")
    assert line == {
        "request": "r", "attempt": 0, "outcome": "length", "prompt_tokens": 3, "cached_tokens": 2, "output_tokens": 2,
        "held_ms": 100.0, "ttft_ms": 1000.0, "tpot_ms": 500.0, "total_ms": 1500.0, "queue_ms": 1, "prefill_ms": 2, "handoff_ms": 3,
        "decode_ms": 4, "attempts": 1, "prefill": P, "decode": D,
        "matched_device_tokens": 11, "matched_host_tokens": 12, "matched_disk_tokens": 13, "fetched_tokens": 14,
        "matched_decode_tokens": 15, "bytes_fetched": 16, "bytes_to_decode": 17, "bytes_to_prefill": 18, "bytes_saved": 19,
    }  # fmt: skip


def test_tokens_that_came_with_the_first_one_took_no_time_after_it() -> None:
    """tpot_ms is the mean time of the tokens after the first update, which may bring several; without any it is null."""
    for first, second, expected in ((1, 2, 250.0), (2, 1, 500.0), (3, 0, None)):
        core = frontend()
        core.receive(GS, Planned("r", 0, PLAN), 0.1)
        core.receive(P, update(3, *range(50, 50 + first), finish=None if second else "length"), 1.0)
        if second:
            core.receive(D, update(3 + first, *range(60, 60 + second), finish="length"), 1.5)
        line = next(one.data for one in took(core, Log) if one.event == "request finished")
        assert line["tpot_ms"] == expected


def test_leaving_cancels_the_attempt_once() -> None:
    """When the client leaves, both workers get one Cancel, and tokens that come later are not delivered."""
    core = frontend()
    core.receive(GS, Planned("r", 0, PLAN), 0.1)
    core.take()
    core.close("r", "cancelled", 0.2)
    core.close("r", "cancelled", 0.3)
    assert [to for to, _ in took(core, Cancel)] == [P, D]
    core.receive(D, update(3, 50), 0.4)
    assert took(core, Deliver) == []


def test_its_limit_refuses_and_says_so() -> None:
    """A Frontend at its limit refuses requests with status 429, logs each refusal and counts it."""
    core = frontend()
    with pytest.raises(RequestFailed, match="max_requests"):
        for i in range(5):
            core.open(request(f"more{i}"), 0.3)
    (line,) = [one.data for one in took(core, Log) if one.event == "request refused"]
    assert (line["request"], line["code"], line["status"]) == ("more3", "overloaded", 429)
    assert core.gauges()["requests_refused_overloaded_total"] == 1


# ---- waiting at a scheduler ----------------------------------------------------------------------------------

OTHER = ActorId("scheduler-1.1")


def waiting() -> FrontendCore:
    """A core whose request ``r`` has waited at the first scheduler since 0.1 s."""
    core = frontend()
    core.receive(GS, Inquired("r", 0, held=True), 0.1)
    core.take()
    return core


def test_a_request_that_waits_is_asked_after_and_not_submitted_again() -> None:
    """The Frontend asks a scheduler whether it still holds a request, instead of sending the whole prompt again."""
    core = waiting()
    core.advance(2.0)
    assert took(core, Submit) == []
    for now in (3.2, 6.4, 9.6):
        core.advance(now)
        assert took(core, Inquire) == [(GS, Inquire("r", 0))]
        core.receive(GS, Inquired("r", 0, held=True), now + 0.1)
    core.receive(GS, Planned("r", 0, PLAN), 9.9)
    core.advance(10.0)
    assert took(core, Submit) == []


@pytest.mark.parametrize("how", ["forgotten", "dead", "replaced", "silent", "the Frontend slept"])
def test_a_request_whose_scheduler_is_no_more_waits_somewhere_else(how: str) -> None:
    """A request whose scheduler has lost it is submitted again with its age, marked as one that may not be refused for
    lack of room."""
    core, now = waiting(), 4.0
    match how:
        case "forgotten":
            core.receive(GS, Inquired("r", 0, held=False), now)
        case "dead":
            core.receive(OTHER, Gone((GS,)), now)
        case "replaced":
            core.receive(GS, Cluster(GS, ()), 1.0)
            core.receive(ActorId("scheduler-0.2"), Cluster(ActorId("scheduler-0.2"), ()), now)
        case "silent":
            for now in (3.2, 6.3, 9.4):
                core.advance(now)
        case "the Frontend slept":
            core.receive(GS, Gone((ME,)), now)
    ((_, submit),) = took(core, Submit)
    assert (submit.request.attempt, submit.age_s, submit.held) == (0, now, True)


def test_the_refusal_of_a_second_scheduler_ends_nothing() -> None:
    """When a Submit reached two schedulers, a refusal by one does not end a request that the other holds or planned."""
    for answer in (Inquired("r", 0, held=True), Planned("r", 0, PLAN)):
        core = frontend()
        core.receive(GS, answer, 0.1)
        core.receive(OTHER, Rejected("r", 0, "cluster_full", "m", 503, 2.0), 0.2)
        assert took(core, Deliver) == []
        assert not core.idle


def test_a_deadline_passes_although_no_scheduler_answers() -> None:
    """A request with a TTFT deadline fails once that is past, even if no scheduler answers."""
    core = frontend()
    core.open(attrs.evolve(request("soon"), ttft_s=2.0), 0.0)
    for now in (1.0, 2.0, 2.9):
        core.advance(now)
    assert took(core, Deliver) == []
    core.advance(core.deadline)
    (ended,) = took(core, Deliver)
    assert (ended.request, ended.failure.code, ended.failure.status) == ("soon", "deadline_missed", 503)
    core.advance(60.0)
    assert not core.idle, "the other has no deadline"


def test_a_stream_that_has_begun_is_not_ended_by_a_refusal() -> None:
    """If the plan was lost, the repeated Submit may be refused; a stream that has tokens is then submitted as a new
    attempt."""
    core = frontend()
    core.receive(P, update(3, 50), 0.5)
    core.receive(OTHER, Rejected("r", 0, "deadline_unreachable", "m", 503, 2.0), 1.2)
    ((_, submit),) = [(to, one) for to, one in took(core, Submit) if one.request.attempt]
    assert submit.request.tokens == pack([7, 8, 9, 50])
    assert not core.idle


def test_a_plan_for_a_request_that_has_ended_is_cancelled() -> None:
    """A plan that arrives for a request which has ended is cancelled at both workers: the scheduler has missed the
    Cancel."""
    core = waiting()
    core.close("r", "cancelled", 1.0)
    core.take()
    core.receive(GS, Planned("r", 0, PLAN), 1.1)
    assert took(core, Cancel) == [(P, Cancel("r", 0)), (D, Cancel("r", 0))]
