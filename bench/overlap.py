"""How long a GPU waits for its host between two decode steps, and what overlapping them saves: ``make bench-overlap``.

The worker's core, its shell and the engine's thread are the real ones; the device is a clock: a launched step
begins when the one before it has ended, and takes a fixed time. What steps take beyond that is the host: the
core's decisions and the encoding of its messages, here. What launching a step takes a GPU's host is not in it.
Kinds of steps take turns, and the note has the median of all rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from itertools import count, pairwise

import attrs
import structlog
import trio

from memserve.actions import BatchDone, RunBatch
from memserve.actors.engine_thread import EngineThread
from memserve.actors.loop import Shell
from memserve.bus import Received
from memserve.drawing import Sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.worker import WorkerCore
from memserve.identity import ActorId
from memserve.messages import Member, Message, Plan, Prefill, Request, encode
from memserve.pool_messages import Acquire, Acquired, Allocated, AllocMem, Insert, Inserted
from memserve.presence import Presence, seed_id
from memserve.tokens import pack, pages_for
from notes import Note, table

STEPS_MS = {1: 5.0, 64: 7.0, 256: 15.0}
"""Milliseconds of a decode step by rows: about what an 8B model takes on an H100 at 1,024 tokens of context."""
CONTEXT, PAGE_TOKENS, STEPS = 1024, 16, 200
WORKER, SHARD, SCHEDULER = ActorId("w0.1"), ActorId("s0.1"), ActorId("scheduler-0.1")
FRONTENDS = [ActorId(f"frontend-{i}.1") for i in range(2)]


@attrs.define
class ClockStep:
    """A step of a device that is a clock."""

    plan: BatchPlan
    ends: float

    def done(self) -> bool:
        """Whether its time has come."""
        return time.perf_counter() >= self.ends

    def result(self) -> BatchResult:
        """Wait for its time; token 9 for each row that draws."""
        time.sleep(max(0.0, self.ends - time.perf_counter()))
        tokens = tuple(None if row.sample is None else 9 for row in self.plan.rows)
        return BatchResult(tokens, 1.0, 1)


@attrs.define
class Clock:
    """A device that takes ``step_s`` for each step."""

    step_s: float
    ends: list[float] = attrs.field(factory=list)
    """When each step ended."""

    def launch(self, plan: BatchPlan) -> ClockStep:
        """Begin when the latest step has ended."""
        self.ends.append(max([time.perf_counter(), *self.ends[-1:]]) + self.step_s)
        return ClockStep(plan, self.ends[-1])

    def run(self, plan: BatchPlan) -> BatchResult:
        """One step."""
        return self.launch(plan).result()

    def rest(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


@attrs.define
class PoolLink:
    """A link behind which a pool answers at once; other messages are encoded and dropped."""

    actor: ActorId
    endpoint: str = "memory://w0"
    answers: list[Received] = attrs.field(factory=list)
    arrived: trio.Event = attrs.field(factory=trio.Event)
    _pages: Iterator[int] = attrs.field(factory=count)

    def send(self, to: ActorId, message: Message) -> None:
        """Encode a message, as the bus does, and answer it if it is the pool's."""
        encode(message)
        match message:
            case Acquire(call=call, tokens=tokens):
                pages = tuple(next(self._pages) for _ in range(pages_for(len(tokens) // 4 + 1, PAGE_TOKENS)))
                # All but the last page is cached: the streams decode at once.
                self._answer(Acquired(call, call + 1, pages, CONTEXT - PAGE_TOKENS))
            case AllocMem(call=call, lease=lease):
                self._answer(Allocated(call, lease, (next(self._pages),)))
            case Insert(call=call):
                self._answer(Inserted(call, 0))

    def _answer(self, message: Message) -> None:
        self.answers.append(Received(SHARD, message))
        self.arrived.set()

    async def receive(self) -> list[Received]:
        """The pool's answers, once there are any."""
        await self.arrived.wait()
        self.arrived = trio.Event()
        answers, self.answers = self.answers, []
        return answers

    def connect(self, actor: ActorId, endpoint: str) -> None:
        """All peers are there."""

    introduce = connect

    def forget(self, actor: ActorId) -> None:
        """All peers stay."""


async def steps_of(rows: int, step_s: float, overlaps: bool) -> list[float]:
    """Seconds between the ends of decode steps of ``rows`` streams."""
    me = Member(WORKER, "DecodeWorker", "memory://w0", 1, "ready", "both", SHARD)
    limits = BatchLimits(1 << 16, rows)
    settings = WorkerSettings(limits, PAGE_TOKENS, 4 * CONTEXT, "all", overlaps=overlaps)
    core = WorkerCore(Presence(me, (seed_id("scheduler-0"),)), SHARD, settings)
    shell, clock = Shell(core, PoolLink(WORKER)), Clock(step_s)
    engine = EngineThread(lambda: clock, Guide(lambda: None))  # type: ignore[arg-type, return-value]
    shell.perform[RunBatch] = lambda action: engine.submit(
        action.plan, lambda result: shell.tell(BatchDone(result))
    )
    for i in range(rows):
        tokens = pack([i, *range(1, CONTEXT)])
        request = Request(f"r{i}", 0, FRONTENDS[i % 2], "", tokens, CONTEXT, CONTEXT, (), Sampling())
        core.receive(SCHEDULER, Prefill(request, Plan(WORKER, WORKER, SHARD, SCHEDULER)), 0.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(shell.run)
        while len(clock.ends) <= STEPS + 20:
            await shell.turned.wait()
        nursery.cancel_scope.cancel()
    return [end - begin for begin, end in pairwise(clock.ends[20:])]


def waits_ms(rows: int, step_ms: float, overlaps: bool) -> float:
    """Milliseconds that a step takes beyond the device's own time, on average over a run."""
    return statistics.mean(trio.run(steps_of, rows, step_ms / 1e3, overlaps)) * 1e3 - step_ms


def main() -> None:
    """Measure, print and write the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    lines = []
    for rows, step_ms in STEPS_MS.items():
        pairs = [[waits_ms(rows, step_ms, overlaps) for overlaps in (False, True)] for _ in range(rounds)]
        alone, behind = (statistics.median(found) for found in zip(*pairs, strict=True))
        gain = (step_ms + alone) / (step_ms + behind)
        lines.append([str(rows), f"{step_ms:.0f}", f"{alone:.2f}", f"{max(behind, 0):.2f}", f"{gain:.2f}"])
    found = table(
        ["streams", "step, ms", "wait between single steps, ms", "overlapping, ms", "times as fast"], lines
    )
    print(found)
    about = "A device that is a clock: each step takes the time in the second column, and the host's part is real."
    Note("overlap").write(
        "Steps that overlap on a device", f"make bench-overlap ARGS='--rounds {rounds}'", about, found
    )


if __name__ == "__main__":
    main()
