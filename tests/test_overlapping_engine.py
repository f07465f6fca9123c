"""A worker's core and a GPU's engine together: steps that are launched behind a running one draw the tokens of single steps."""

from __future__ import annotations

import random
import zlib
from collections import deque
from itertools import count as numbers

import attrs
import pytest
import torch
from msgspec import UNSET

import fake_flashinfer
from adjustments import adjustments, some_allowed
from backends import ON_CARDS, SPEC, make_engine
from memserve.actions import BatchDone, RunBatch, Send
from memserve.drawing import Logprobs, Sampling
from memserve.engine import sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.gpu_launch import LaunchedStep
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult, Past, Row
from memserve.engine.weights import random_weights
from memserve.engine.worker import WorkerCore
from memserve.messages import Cancel, Member, Plan, Prefill, Request, Tokens
from memserve.pool_messages import Acquire, Acquired, Allocated, AllocMem, Freed, FreeMem, Insert, Inserted
from memserve.presence import Presence, seed_id
from memserve.tokens import count, pack, pages_for, unpack
from test_model import GREEDY, prompt
from test_worker import FRONTEND, ME, SCHEDULER, SHARD

PAGES, PAGE_TOKENS = 200, 16


@pytest.fixture(params=["stand-in", *ON_CARDS])
def engine(request, tmp_path):
    """A warm engine on FlashInfer's calls, or on its kernels."""
    made = make_engine(request.param, random_weights(SPEC, "bfloat16", 3), tmp_path, PAGES)
    made.engine.warm_up()
    yield made.engine
    made.engine.close()


class Halves:
    """A follower of grammars: half of the tokens are allowed, another half after each answer."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        """The answers that it was asked to continue."""

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """See the protocol."""
        self.asked.append(output)
        return some_allowed(random.Random(zlib.crc32(grammar.encode() + output)), SPEC.vocab)

    def ahead(self, grammar, output, allowed, guess, most):
        """Nothing is forced."""
        return b"", ()


class Worker:
    """A worker's core, its engine and what the engine's thread does, without an actor.

    The shard answers at once, and a page is never used twice.
    """

    def __init__(self, engine, overlaps: bool, slow: bool = False) -> None:
        """``slow``: whether both of two steps have been read when the core hears of the first."""
        self.slow = slow
        me = Member(ME, "PrefillWorker", "ipc://w", 1, "ready", "both", SHARD)
        limits = BatchLimits(24, 8)
        settings = WorkerSettings(limits, PAGE_TOKENS, 400, "all", overlaps=overlaps)
        self.core = WorkerCore(Presence(me, (seed_id("scheduler-0"),)), SHARD, settings)
        self.engine, self.running = engine, deque[LaunchedStep]()
        self.halves = Halves()
        self.guide, self.tokens = Guide(lambda: self.halves), tuple[int | None, ...]()
        """``tokens``: those of the step that was read last."""
        self.late: tuple[LaunchedStep, BatchPlan] | None = None
        """The step that has yet to draw late."""
        self.read = deque[BatchResult]()
        """Results that the engine's thread has read and the core has not heard of."""
        self.pages, self.leases = numbers(), numbers(1)
        self.answers: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[Logprobs]] = {}
        self.together = self.void = self.drawn_late = 0
        """Steps launched behind another, void rows, and rows that drew late."""

    def ask(self, name: str, length: int, new: int, how: Sampling, ends: tuple[int, ...] = ()) -> None:
        """Place a request."""
        tokens = prompt(length, length, SPEC.vocab)
        request = Request(name, 0, FRONTEND, "", pack(tokens), length, new, ends, how)
        self.core.receive(SCHEDULER, Prefill(request, Plan(ME, ME, SHARD, SCHEDULER)), 0.0)
        self.answers[name], self.logprobs[name] = [], []

    def turn(self) -> None:
        """Let the core decide, and end a step if the engine has all that the core gives it."""
        self.core.advance(0.0)
        self.core.check()
        actions = self.core.take()
        for action in actions:
            if isinstance(action, RunBatch):
                self.launch(action.plan)
            elif isinstance(action, Send):
                self.hear(action.message)
        if not actions and (self.running or self.read):
            for _ in range(0 if self.read else len(self.running) if self.slow else 1):
                self.read_one()
            result = self.read.popleft()
            self.void += len(result.void)
            self.core.receive(ME, BatchDone(result), 0.0)

    def launch(self, plan: BatchPlan) -> None:
        """Launch a step, as the engine's thread does."""
        step = self.engine.launch(self.guide.filled(plan))
        self.late = (step, plan) if plan.late else None
        if not self.running:
            self.draw_late()
        self.together += bool(self.running)
        self.running.append(step)

    def read_one(self) -> None:
        """Read a step, as the engine's thread does."""
        result = self.running.popleft().result()
        self.tokens = result.tokens
        self.read.append(result)
        self.draw_late()

    def draw_late(self) -> None:
        """Have the latest step's late rows draw, now that the step before was read."""
        if self.late is not None:
            step, plan = self.late
            rows = self.guide.filled_late(plan, self.tokens)
            self.drawn_late += len(rows)
            step.draw_late(rows)
        self.late = None

    def hear(self, message) -> None:
        """Answer as the shard does, or note tokens as a Frontend does."""
        match message:
            case Acquire(call=call, tokens=tokens):
                pages = tuple(next(self.pages) for _ in range(pages_for(count(tokens) + 1, PAGE_TOKENS)))
                self.core.receive(SHARD, Acquired(call, next(self.leases), pages, 0), 0.0)
            case AllocMem(call=call, lease=lease):
                self.core.receive(SHARD, Allocated(call, lease, (next(self.pages),)), 0.0)
            case Insert(call=call):
                self.core.receive(SHARD, Inserted(call, 0), 0.0)
            case FreeMem(call=call):
                self.core.receive(SHARD, Freed(call, 0), 0.0)
            case Tokens(updates):
                for update in updates:
                    assert update.position == len(self.answers[update.request]) + prompt_length(
                        update.request
                    )
                    self.answers[update.request] += unpack(update.tokens)
                    if update.logprobs is not UNSET:
                        self.logprobs[update.request].append(update.logprobs)

    def finish(self) -> dict[str, list[int]]:
        """Run until every request has ended; all answers."""
        for _ in range(5000):
            if self.core.idle:
                self.turn()  # the last tokens leave
                return self.answers
            self.turn()
        raise AssertionError("requests do not end")


def prompt_length(name: str) -> int:
    """Each request's name ends with the length of its prompt."""
    return int(name.rpartition("-")[2])


HOWS = [
    GREEDY,
    Sampling(temperature=0.8, top_p=0.9, seed=1),
    Sampling(temperature=1.0, top_k=40, seed=2, logprobs=3),
    Sampling(temperature=1.5, seed=3, logprobs=0),
]
ADJUSTED = [
    Sampling(temperature=0.7, seed=4, adjust=adjustments(presence=1.5, min_tokens=4)),
    Sampling(temperature=0.0, adjust=adjustments(repetition=1.5), logprobs=2),
    Sampling(temperature=1.0, seed=5, logprobs=1, adjust=adjustments(grammar="first")),
    Sampling(temperature=1.2, seed=6, adjust=adjustments({5: 4.0}, min_tokens=6)),
    Sampling(temperature=0.0, adjust=adjustments({7: 2.0}, frequency=0.9, grammar="second")),
]


def conversation(engine, overlaps: bool, seed: int, *more: Sampling, slow: bool = False) -> Worker:
    """A worker after requests that came one by one, with prompts of several chunks; some end at an end token."""
    chance, worker = random.Random(seed), Worker(engine, overlaps, slow)
    hows = [*HOWS, *more, *HOWS]
    if more:
        chance.shuffle(hows)
    for i, how in enumerate(hows):
        length = chance.choice([1, 15, 16, 40, 70])
        ends = tuple(chance.sample(range(SPEC.vocab), 40)) if i % 2 else ()
        worker.ask(f"{i}-{length}", length, chance.randrange(5, 25), how, ends)
        for _ in range(chance.randrange(12)):
            worker.turn()
    worker.finish()
    return worker


def few_are_found(monkeypatch) -> None:
    """Have draws looked for among so few tokens that many are not found."""
    monkeypatch.setattr(sampling, "HEAD", 3)
    monkeypatch.setattr(sampling, "WIDE", 3)


def check_logprobs(one: Worker, other: Worker) -> None:
    """Check that two workers reported the same tokens' log probabilities, but for what the batch's size rounds."""
    assert sum(map(len, other.logprobs.values())) > 30
    for name, reports in other.logprobs.items():
        assert len(one.logprobs[name]) == len(reports) in (0, len(other.answers[name]))
        for ours, theirs in zip(one.logprobs[name], reports, strict=True):
            assert ours.drawn == pytest.approx(theirs.drawn, abs=0.1) and len(ours.values) == len(
                theirs.values
            )
            assert ours.values == pytest.approx(theirs.values, abs=0.1)


@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_those_of_single_steps(engine, seed):
    """Requests that come and go get the same tokens from overlapping steps as from steps one by one."""
    single, overlapping = (conversation(engine, overlaps, seed) for overlaps in (False, True))
    assert single.together == 0 and overlapping.together > 15
    assert overlapping.answers == single.answers
    check_logprobs(overlapping, single)


@pytest.mark.parametrize(("seed", "slow"), [(7, False), (11, True)])
def test_streams_with_penalties_and_grammars_overlap(engine, seed, slow):
    """Streams with penalties and grammars draw late in overlapping steps, and get the tokens of single steps."""
    single = conversation(engine, False, seed, *ADJUSTED)
    overlapping = conversation(engine, True, seed, *ADJUSTED, slow=slow)
    assert overlapping.together > 15 and overlapping.drawn_late > 20 and not single.drawn_late
    assert overlapping.answers == single.answers
    assert sorted(overlapping.halves.asked) == sorted(single.halves.asked)  # nothing behind an answer's end
    check_logprobs(overlapping, single)


def test_late_draws_that_are_not_found_in_time_are_made_again(engine, monkeypatch):
    """If hardly any draw is found among the most probable tokens, rows that draw late come back void, too."""
    few_are_found(monkeypatch)
    single = conversation(engine, False, 1, *ADJUSTED)
    overlapping = conversation(engine, True, 1, *ADJUSTED)
    assert overlapping.void > 20 and overlapping.drawn_late > 20
    assert overlapping.answers == single.answers
    check_logprobs(overlapping, single)


def test_draws_that_are_not_found_in_time_are_made_again(engine, monkeypatch):
    """If hardly any draw is found among the most probable tokens, rows come back void, and no token changes."""
    few_are_found(monkeypatch)
    single, overlapping = (conversation(engine, overlaps, 1) for overlaps in (False, True))
    assert overlapping.void > 10 and single.void == 0
    assert overlapping.answers == single.answers
    check_logprobs(overlapping, single)


def test_rows_follow_a_step_that_was_read(engine, monkeypatch):
    """A row may follow a step that the engine has read, although the core has not heard of it; no token changes."""
    few_are_found(monkeypatch)
    single, overlapping = (conversation(engine, slow, 1, slow=slow) for slow in (False, True))
    assert overlapping.void > 10 and overlapping.together > 10
    assert overlapping.answers == single.answers


def test_a_cancelled_request_leaves_the_others_alone(engine):
    """A request that is cancelled while two steps have rows of it changes no token of another."""
    answers = []
    for cancelled in (False, True):
        worker = Worker(engine, True)
        worker.ask("a-20", 20, 60, GREEDY)
        worker.ask("b-30", 30, 30, GREEDY)
        for _ in range(30):
            worker.turn()
        if cancelled:
            worker.core.receive(FRONTEND, Cancel("a-20", 0), 0.0)
        answers.append(worker.finish())
    assert answers[0]["b-30"] == answers[1]["b-30"] and len(answers[1]["a-20"]) < 60 == len(
        answers[0]["a-20"]
    )


def test_a_step_is_launched_before_the_last_one_is_read(tmp_path):
    """Nothing waits for the GPU between two steps that overlap, but for host arrays that it has read long before."""
    made = make_engine("stand-in", random_weights(SPEC, "bfloat16", 3), tmp_path, PAGES)
    graphs, engine = made.engine._graphs, made.engine
    assert isinstance(graphs, fake_flashinfer.Replays)
    engine.warm_up()
    first = engine.launch(BatchPlan((Row(pack([5]), 0, (3,), GREEDY),), followed=True))
    graphs.log.clear()
    second = engine.launch(BatchPlan((Row(pack([0]), 1, (3,), GREEDY, follows=0),), followed=True))
    assert graphs.log == ["wait", "replay"]
    drawn = first.result().tokens, second.result().tokens
    plan = BatchPlan((Row(pack([drawn[0][0]]), 1, (3,), GREEDY),))
    assert engine.run(plan).tokens == drawn[1]


def test_late_draws_are_launched_once_and_before_all_else(tmp_path, monkeypatch):
    """No step is launched or read whose late draws were not launched; its result waits for those draws."""
    made = make_engine("stand-in", random_weights(SPEC, "bfloat16", 3), tmp_path, PAGES)
    graphs, engine = made.engine._graphs, made.engine
    engine.warm_up()
    how = Sampling(temperature=0.0, adjust=adjustments(presence=100.0))
    first = engine.launch(BatchPlan((Row(pack([5]), 0, (3,), how, Past(b"", b"")),), followed=True))
    row = Row(pack([0]), 1, (3,), how, Past(b"", b""), follows=0)
    second = engine.launch(BatchPlan((row,), followed=True))
    with pytest.raises(AssertionError, match="late draws were not"):
        engine.launch(BatchPlan((Row(pack([0]), 0, (4,), GREEDY),)))
    (token,) = first.result().tokens
    with pytest.raises(AssertionError, match="late draws were not"):
        second.result()
    marks, waited = numbers(), []
    monkeypatch.setattr(graphs, "mark", lambda: Noted(next(marks), waited))
    second.draw_late({0: row.known(token)})
    with pytest.raises(AssertionError, match="launched already"):
        second.draw_late({0: row.known(token)})
    (drawn,) = second.result().tokens
    assert waited == [0] and drawn != token
    assert engine.run(BatchPlan((row.known(token),))).tokens == (drawn,)


@attrs.frozen
class Noted:
    """A mark whose waits are noted."""

    number: int
    waited: list[int]

    def wait(self) -> None:
        """Note it."""
        self.waited.append(self.number)


def test_a_row_that_follows_nothing_is_refused(tmp_path):
    """A row that names a row which drew nothing, or ended elsewhere, is refused before anything is launched."""
    made = make_engine("stand-in", random_weights(SPEC, "bfloat16", 3), tmp_path, PAGES)
    made.engine.warm_up()
    made.engine.launch(
        BatchPlan((Row(pack([5]), 0, (3,), GREEDY), Row(pack([6]), 0, (4,), None)), followed=True)
    )
    for start, follows in ((1, 1), (2, 0), (1, 2), (1, -1)):
        with pytest.raises(ValueError, match=f"row 0: does not follow row {follows} of the step before"):
            made.engine.launch(BatchPlan((Row(pack([0]), start, (3,), GREEDY, follows=follows),)))
    assert torch.isnan(made.pages()[5:]).all()
