"""Steps that are given to the engine while another runs: no token changes, whatever the running step turns out to draw."""

from __future__ import annotations

import hashlib
import random
from array import array

import attrs
import pytest
import trio
from trio.testing import MockClock

from cluster_scenarios import a_worker_dies_under_load, all_are_served, chats_while_workers_die
from memory_cluster import (
    PAGE_TOKENS,
    MemoryCluster,
    PageEngine,
    baseline,
    generate,
    generate_with,
    memory_cluster,
    next_token,
    reference,
)
from memserve.actions import BatchDone, RunBatch, Send
from memserve.drawing import Adjustments, Sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.plans import BatchPlan, BatchResult, Past, Row
from memserve.engine.worker import WorkerCore
from memserve.errors import PoolError
from memserve.messages import Cancel, Member, Plan, Prefill, Request, Tokens
from memserve.pool_messages import Acquire, Acquired, AllocMem, FreeMem, PoolRefused
from memserve.presence import Presence, seed_id
from memserve.tokens import pack, unpack
from placement_world import COSTS
from test_cluster import prompt
from test_worker import FRONTEND, ME, OTHER, SCHEDULER, SHARD

PD2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
ON_TWO_SHARDS = (("p0", "prefill", "s0"), ("d0", "decode", "s1"))
BOTH = (("w0", "both"),)


# ---- one worker ------------------------------------------------------------------------------------------------


def worker(**settings) -> WorkerCore:
    """A worker whose engine overlaps steps."""
    me = Member(ME, "PrefillWorker", "ipc://w", 1, "ready", "both", SHARD)
    limits = BatchLimits(16, 8)
    return WorkerCore(
        Presence(me, (seed_id("scheduler-0"),)),
        SHARD,
        WorkerSettings(limits, 16, 1000, "all", overlaps=True, **settings),
    )


def start(core: WorkerCore, name: str, length: int = 10, decode=ME, **fields) -> None:
    """Have a request of ``length`` prompt tokens placed on the worker, with pages for 64 tokens."""
    how = fields.pop("sampling", Sampling())
    request = Request(name, 0, FRONTEND, "", pack(range(length)), length, fields.pop("new", 5), (7,), how)
    core.receive(SCHEDULER, Prefill(request, Plan(ME, decode, SHARD, SCHEDULER)), 0.0)
    (acquire,) = [
        one.message for one in core.take() if isinstance(one, Send) and isinstance(one.message, Acquire)
    ]
    core.receive(SHARD, Acquired(acquire.call, acquire.call + 1, tuple(range(4)), 0), 0.0)


def given(core: WorkerCore) -> list[BatchPlan]:
    """The steps that the worker gives to its engine now."""
    core.advance(0.0)
    core.check()
    return [one.plan for one in core.take() if isinstance(one, RunBatch)]


def done(core: WorkerCore, *tokens: int | None, void: frozenset[int] = frozenset()) -> list:
    """End the worker's oldest step; what it does in the same turn."""
    core.receive(ME, BatchDone(BatchResult(tokens, 1.0, 1, void=void)), 0.0)
    core.advance(0.0)
    core.check()
    return core.take()


def plans(actions: list) -> list[BatchPlan]:
    """The steps among a worker's actions."""
    return [one.plan for one in actions if isinstance(one, RunBatch)]


def sent(actions: list, kind: type) -> list:
    """The messages of one type among a worker's actions."""
    return [one.message for one in actions if isinstance(one, Send) and isinstance(one.message, kind)]


def test_a_decode_step_is_given_before_its_token_is_known() -> None:
    """While the prompt's last chunk runs, the engine has the first decode step, whose token it fills in itself."""
    core = worker()
    start(core, "a", 20)
    first, second = given(core)
    assert (first.rows[0].start, first.rows[0].end) == (0, 20) and first.followed
    assert second.rows == (Row(pack([0]), 20, tuple(range(4)), Sampling(), follows=0),)
    actions = done(core, 5)
    assert [one.updates[0].tokens for one in sent(actions, Tokens)] == [pack([5])]
    (third,) = plans(actions)
    assert (third.rows[0].start, third.rows[0].follows) == (21, 0)


def test_rows_name_the_row_that_they_follow() -> None:
    """When a stream is last in one step and first in the next, its row names the other row's number."""
    core = worker()
    start(core, "a", 3, new=1)
    start(core, "b", 3, new=5)
    first, second = given(core)
    assert [row.start for row in first.rows] == [0, 0]
    assert [(row.start, row.follows) for row in second.rows] == [(3, 1)]  # "a" ends with its only token


def test_a_stream_that_has_ended_ran_one_row_too_many() -> None:
    """The row behind an end token is ignored, and the stream's pages are freed only when that row has ended."""
    core = worker()
    start(core, "a")
    given(core)
    actions = done(core, 7)
    assert sent(actions, Tokens)[0].updates[0].finish == "stop"
    assert not sent(actions, FreeMem) and not plans(actions) and not core.idle
    actions = done(core, 99)
    assert sent(actions, FreeMem) and not sent(actions, Tokens) and core.idle


def test_a_request_cancelled_in_two_steps_ends_after_both() -> None:
    """The pages of a cancelled request are freed only after the last of its steps."""
    core = worker()
    start(core, "a")
    given(core)
    core.receive(FRONTEND, Cancel("a", 0), 0.0)
    assert not sent(core.take(), FreeMem)
    assert not sent(done(core, 5), FreeMem)
    assert sent(done(core, 6), FreeMem) and core.idle


def test_prompt_tokens_are_counted_as_they_are_run() -> None:
    """A prompt's tokens are counted as often as they were run, also if it is cancelled in two steps or comes back void."""
    core = worker()
    start(core, "a", 60)
    given(core)
    core.receive(FRONTEND, Cancel("a", 0), 0.0)
    done(core, None)
    done(core, 6)
    assert core.gauges()["prefill_tokens_total"] == 60
    start(core, "b", 20)
    given(core)
    done(core, None, void=frozenset({0}))
    done(core, None, void=frozenset({0}))
    assert core.gauges()["prefill_tokens_total"] == 60 + 20
    done(core, 5)
    assert core.gauges()["prefill_tokens_total"] == 60 + 20 + 20


def test_what_needs_the_token_draws_late() -> None:
    """A stream with penalties has its next row given at once; it draws once the token that it follows is known."""
    core = worker()
    how = Sampling(adjust=Adjustments(repetition=1.5))
    start(core, "a", sampling=how)
    start(core, "b")
    first, second = given(core)
    assert first.followed and not first.late
    behind = Row(pack([0]), 10, tuple(range(4)), how, Past(pack(range(10)), b""), follows=0, ends=pack([7]))
    assert second.rows == (behind, Row(pack([0]), 10, tuple(range(4)), Sampling(), follows=1))
    assert second.followed and second.late
    (third,) = plans(done(core, 5, 6))
    assert [row.past for row in third.rows] == [Past(pack(range(10)), pack([5])), None]
    assert third.late_rows((8, 9)) == {0: attrs.evolve(
        third.rows[0], tokens=pack([8]), past=Past(pack(range(10)), pack([5, 8])), follows=None, ends=b""
    )}  # fmt: skip
    assert third.late_rows((7, 9)) == third.late_rows((None, 9)) == {}


@pytest.mark.parametrize(
    "fields", [{"presence": 1.0}, {"frequency": 1.0}, {"repetition": 0.5}, {"grammar": "x"}]
)
def test_rows_draw_late_only_where_the_token_matters(fields) -> None:
    """Penalties and grammars need the token before; biases, lists and ``min_tokens`` do not."""
    mask = b"\xff" * 8
    for more, late in (({}, False), (fields, True)):
        core = worker()
        others = {} if "grammar" in more else {"allowed": mask}
        start(
            core,
            "a",
            sampling=Sampling(adjust=Adjustments(pack([3]), b"\0" * 4, min_tokens=9, **others, **more)),
        )
        first, second = given(core)
        assert [first.late, second.late] == [False, late]


def test_a_prompt_that_leaves_with_its_token_delays_no_other() -> None:
    """A prompt with penalties that is decoded elsewhere does not keep the next prompt from being launched."""
    core = worker()
    start(core, "a", 30, decode=OTHER, sampling=Sampling(adjust=Adjustments(presence=1.0)))
    start(core, "b", 40, decode=OTHER)
    first, second = given(core)
    assert [row.start for row in first.rows] == [0, 0]
    assert [(row.start, row.follows) for row in second.rows] == [(2, None)]  # the rest of "b"


def test_end_tokens_are_forbidden_by_the_number_of_tokens_alone() -> None:
    """A row knows whether ``min_tokens`` is reached before the token that it follows is known; no step leaves it out."""
    core = worker()
    start(core, "a", new=9, sampling=Sampling(adjust=Adjustments(min_tokens=3)))
    running = given(core)
    forbidden = [plan.rows[0].past.forbidden for plan in running]
    for _ in range(4):
        (plan,) = plans(done(core, 5))
        assert plan.rows[0].follows == 0
        forbidden.append(plan.rows[0].past.forbidden)
    assert forbidden == [pack([7])] * 3 + [b""] * 3


def test_a_void_row_is_run_again_with_its_token_known() -> None:
    """A void row and the row that followed it count as not run; the draw is made again in a step that nothing follows."""
    core = worker()
    start(core, "a")
    start(core, "b")
    given(core)
    actions = done(core, None, 6, void=frozenset({0}))
    assert [one.request for one in sent(actions, Tokens)[0].updates] == ["b"]
    (third,) = plans(actions)
    assert [(row.start, row.follows) for row in third.rows] == [(11, 1)]  # "a" is still in the second step
    (again,) = plans(done(core, None, 8, void=frozenset({0})))
    assert [(row.start, row.follows) for row in again.rows] == [(12, 0), (0, None)] and not again.followed


def test_a_prompt_that_is_reported_on_waits_until_no_step_runs() -> None:
    """The engine waits for the device to report on a prompt: no step is left waiting in front of it."""
    core = worker()
    start(core, "a")
    first, _ = given(core)
    start(core, "b", sampling=Sampling(prompt_logprobs=1))
    assert first.followed and not plans(done(core, 5))  # without "b" there would be a third step
    (third,) = plans(done(core, 6))
    assert [row.score is not None for row in third.rows] == [False, True] and not third.followed


def test_a_shortage_of_pages_ends_the_overlap() -> None:
    """A stream without room for its next token has the youngest preempted, although others could go on and on."""
    core = worker()
    start(core, "a", 20, new=200)
    start(core, "b", 3, new=200)
    running = given(core)
    for _ in range(52):  # "b" has room for 60
        actions = done(core, *(9 if row.sample else None for row in running.pop(0).rows))
        running += plans(actions)
        if sent(actions, FreeMem):
            break
        for call in sent(actions, AllocMem):
            core.receive(SHARD, PoolRefused(call.call, PoolError.NO_PAGES, "full"), 0.0)
    assert sent(actions, FreeMem) and not running[1:]
    assert [unpack(one.tokens)[:3] for one in sent(actions, Acquire)] == [array("i", range(3))]


def test_the_load_is_that_of_the_step_that_runs() -> None:
    """Behind a step that has ended, the load's gauges describe the one that runs now."""
    core = worker()
    core.presence.member = attrs.evolve(core.presence.member, costs=COSTS)
    start(core, "a", 60)
    first, second = given(core)
    assert [plan.rows[0].end for plan in (first, second)] == [32, 60]
    assert core.gauges()["step_tokens"] == 32
    done(core, None)
    assert core.gauges()["step_tokens"] == 28


# ---- whole clusters ----------------------------------------------------------------------------------------------


@attrs.define
class OverlappingPages(PageEngine):
    """An engine that fills in the tokens that rows follow; some draws are not found in time and come back void."""

    latest: list[int | None] = attrs.field(factory=list)
    followed: int = 0
    """Rows that followed another."""
    late: int = 0
    """Rows that drew late."""
    void: int = 0

    def run(self, plan: BatchPlan) -> BatchResult:
        late = plan.late_rows([None if one == VOID else one for one in self.latest])
        drawn = [self._drawn(row, late.get(i, row), plan.followed) for i, row in enumerate(plan.rows)]
        self.latest = drawn
        self.late += len(late)
        void = frozenset(i for i, one in enumerate(drawn) if one == VOID)
        self.followed += sum(row.follows is not None for row in plan.rows)
        self.void += len(void)
        return BatchResult(tuple(None if one == VOID else one for one in drawn), 1.0, 1, void=void)

    def _drawn(self, row: Row, known: Row, followed: bool) -> int | None:
        """``known``: the row with what is known when it draws, if it draws late."""
        if row.follows is not None:
            assert row.tokens == pack([0])
            row = attrs.evolve(row, tokens=pack([self.latest[row.follows]]))
        held = self.write(row)
        if held is None:
            return None
        if unpack(row.tokens)[-1] == VOID or known.late:
            return VOID
        if known.past is not None:
            assert known.past.prompt + known.past.output == pack(held)
        lost = followed and hashlib.sha256(pack(held)).digest()[7] % 9 == 0
        return VOID if lost else next_token(held, row.sample.seed)


VOID = -3
ADJUSTED = Sampling(0.0, adjust=Adjustments(repetition=1.5))
"""The engine draws as without it, once it has checked the tokens that the penalty would count."""


@attrs.define(eq=False)
class OverlappingCluster(MemoryCluster):
    """A cluster whose workers have such engines."""

    overlaps: bool = True
    engines: list[OverlappingPages] = attrs.field(factory=list)

    def make_engine(self, arena):
        self.engines.append(OverlappingPages(arena))
        return self.engines[-1]


def ends_of(text: list[int], new: int, seed: int) -> tuple[int, ...]:
    """An end token that stops an answer near its middle."""
    return (reference(text, new, seed)[new // 2],)


@pytest.mark.parametrize("workers", [PD2, ON_TWO_SHARDS, BOTH])
@pytest.mark.parametrize("chunk_tokens", [3, 1000])
async def test_overlapping_changes_no_token(autojump_clock: MockClock, workers, chunk_tokens) -> None:
    """Answers have the tokens of single steps, in every layout and chunk size."""
    async with memory_cluster(*workers, kind=OverlappingCluster, chunk_tokens=chunk_tokens) as (
        cluster,
        frontend,
    ):
        for length, new in [(1, 90), (4, 1), (17, 130), (60, 5), (16, 64), (3, 2)]:
            tokens = prompt(length, length)
            assert await generate(frontend, tokens, new) == reference(tokens, new)
            assert await generate_with(frontend, tokens, ADJUSTED, new, ()) == reference(tokens, new)
        assert sum(one.followed for one in cluster.engines) > 200
        assert sum(one.late for one in cluster.engines) > 100
        assert sum(one.void for one in cluster.engines) > 20
        await baseline(cluster)


async def test_streams_that_end_early_leave_nothing_behind(autojump_clock: MockClock) -> None:
    """Streams that end at a token, a limit or when the client leaves, side by side: all tokens right, all pages back."""
    async with memory_cluster(*BOTH, kind=OverlappingCluster) as (cluster, frontend):

        async def one(i: int) -> None:
            text, new = prompt(i % 4, 20 + i), 10 + i
            ends = ends_of(text, new, i) if i % 2 else ()
            with trio.move_on_after(0.2 if i % 5 == 0 else 1e4) as patience:
                how = attrs.evolve(ADJUSTED if i % 4 > 1 else Sampling(0.0), seed=i)
                got = await generate_with(frontend, text, how, new, ends)
            if not patience.cancelled_caught:
                whole = reference(text, new, i)
                assert got == (whole[: whole.index(ends[0]) + 1] if ends else whole)

        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(one, i)
        await baseline(cluster)


async def test_the_next_turn_finds_the_answer(autojump_clock: MockClock) -> None:
    """An answer that was generated by overlapping steps is cached with the right tokens."""
    async with memory_cluster(*BOTH, kind=OverlappingCluster) as (cluster, frontend):
        first = prompt(2, 21)
        second = first + await generate(frontend, first, 101) + prompt(3, 9)
        before = cluster.actors["w0"].core.gauges()["cached_tokens_total"]
        assert await generate(frontend, second, 20) == reference(second, 20)
        found = cluster.actors["w0"].core.gauges()["cached_tokens_total"] - before
        assert found == (21 + 100) // PAGE_TOKENS * PAGE_TOKENS
        await baseline(cluster)


@pytest.mark.parametrize("workers", [PD2, BOTH])
async def test_a_pool_too_small_for_all_serves_all(autojump_clock: MockClock, workers) -> None:
    """In a pool that is too small for all, requests are preempted between steps and finish with the right tokens."""
    async with memory_cluster(*workers, kind=OverlappingCluster, pages=40) as (cluster, frontend):
        await all_are_served(cluster, frontend, [prompt(i, 20) for i in range(12)], reference)


@pytest.mark.parametrize("victim", ["p0", "d0", "d1"])
@pytest.mark.parametrize("after", [0.02, 0.06, 0.15, 0.3])
async def test_killing_a_worker_costs_no_token(autojump_clock: MockClock, victim, after) -> None:
    """A worker that is killed while it has two steps costs no token."""
    async with memory_cluster(*PD2, kind=OverlappingCluster) as (cluster, frontend):
        prompts = [prompt(i, 40) for i in range(8)]
        await a_worker_dies_under_load(cluster, frontend, victim, after, prompts, 60, reference)


@pytest.mark.parametrize("seed", range(8))
async def test_random_clients_and_kills(autojump_clock: MockClock, seed: int) -> None:
    """Random clients that continue answers or leave, a small pool, and workers that die and return: all tokens right."""
    rng = random.Random(seed)
    settings = {
        "pages": rng.choice([90, 400]),
        "rows": rng.choice([3, 8]),
        "chunk_tokens": rng.choice([5, 16, 64]),
    }
    async with memory_cluster(*PD2, kind=OverlappingCluster, **settings) as (cluster, frontend):
        prompts = [prompt(1000 + i, 30) for i in range(3)]
        await chats_while_workers_die(cluster, frontend, dict(PD2), prompts, reference, rng)
        await baseline(cluster)
