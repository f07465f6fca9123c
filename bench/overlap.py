"""How long a GPU waits for its host between two decode steps, and what overlapping them saves: ``make bench-overlap``.

The worker's core, its shell and the engine's thread are the real ones; the device is a clock: a launched step
begins when the one before it has ended, and takes a fixed time. What steps take beyond that is the host: the
core's decisions, the encoding of its messages, and the masks of streams that follow a grammar, here. What
launching a step takes a GPU's host is not in it. The device waits for late draws that are launched when it has
run their step. Kinds of steps take turns, and the note has the median of all rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from itertools import count, pairwise

import attrs
import structlog
import trio

from memserve.actions import BatchDone, RunBatch
from memserve.actors.engine_thread import EngineThread
from memserve.actors.loop import Shell
from memserve.bus import Received
from memserve.drawing import Adjustments, Sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.engine.worker import WorkerCore
from memserve.identity import ActorId
from memserve.messages import Member, Message, Plan, Prefill, Request, encode
from memserve.pool_messages import Acquire, Acquired, Allocated, AllocMem, Insert, Inserted
from memserve.presence import Presence, seed_id
from memserve.tokens import pack, pages_for
from notes import Note, table

STEPS_MS = {1: 5.0, 64: 7.0, 256: 15.0}
"""Milliseconds of a decode step by rows: about what an 8B model takes on an H100 at 1,024 tokens of context."""
KINDS = ((1, 0), (1, 1), (64, 0), (64, 1), (64, 8), (64, 64), (256, 0), (256, 1), (256, 8))
"""Rows of the steps, and how many of them follow a grammar."""
MASK_S = 3e-4
"""What a mask takes the host: about the median of random answers to a JSON schema, in 49,152 tokens."""
CONTEXT, PAGE_TOKENS, STEPS = 1024, 16, 200
WORKER, SHARD, SCHEDULER = ActorId("w0.1"), ActorId("s0.1"), ActorId("scheduler-0.1")
FRONTENDS = [ActorId(f"frontend-{i}.1") for i in range(2)]


@attrs.define
class ClockStep:
    """A step of a device that is a clock."""

    plan: BatchPlan
    ends: list[float]
    """When each step up to this one ends, and those launched later."""
    number: int

    def done(self) -> bool:
        """Whether its time has come."""
        return time.perf_counter() >= self.ends[self.number]

    def draw_late(self, rows: Mapping[int, Row]) -> None:
        """A device that has run the step already has waited for its late draws."""
        self.ends[self.number] = max(time.perf_counter(), self.ends[self.number])

    def result(self) -> BatchResult:
        """Wait for its time; token 9 for each row that draws."""
        time.sleep(max(0.0, self.ends[self.number] - time.perf_counter()))
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
        return ClockStep(plan, self.ends, len(self.ends) - 1)

    def run(self, plan: BatchPlan) -> BatchResult:
        """One step."""
        return self.launch(plan).result()

    def rest(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


class Masks:
    """A follower of grammars that takes ``MASK_S`` for a mask."""

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """Spend the time."""
        ends = time.perf_counter() + MASK_S
        while time.perf_counter() < ends:
            pass
        return b"\xff"

    def ahead(
        self, grammar: str, output: bytes, allowed: bytes, guess: bytes, most: int
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """Nothing is forced."""
        return b"", ()


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


async def steps_of(rows: int, step_s: float, overlaps: bool, guided: int = 0) -> list[float]:
    """Seconds between the ends of decode steps of ``rows`` streams, the first ``guided`` of which follow a grammar."""
    me = Member(WORKER, "DecodeWorker", "memory://w0", 1, "ready", "both", SHARD)
    limits = BatchLimits(1 << 16, rows)
    settings = WorkerSettings(limits, PAGE_TOKENS, 4 * CONTEXT, "all", overlaps=overlaps)
    core = WorkerCore(Presence(me, (seed_id("scheduler-0"),)), SHARD, settings)
    shell, clock = Shell(core, PoolLink(WORKER)), Clock(step_s)
    engine = EngineThread(lambda: clock, Guide(Masks))
    shell.perform[RunBatch] = lambda action: engine.submit(
        action.plan, lambda result: shell.tell(BatchDone(result))
    )
    for i in range(rows):
        tokens = pack([i, *range(1, CONTEXT)])
        how = Sampling(adjust=Adjustments(grammar="any")) if i < guided else Sampling()
        request = Request(f"r{i}", 0, FRONTENDS[i % 2], "", tokens, CONTEXT, CONTEXT, (), how)
        core.receive(SCHEDULER, Prefill(request, Plan(WORKER, WORKER, SHARD, SCHEDULER)), 0.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(shell.run)
        while len(clock.ends) <= STEPS + 20:
            await shell.turned.wait()
        nursery.cancel_scope.cancel()
    return [end - begin for begin, end in pairwise(clock.ends[20:])]


def waits_ms(rows: int, step_ms: float, overlaps: bool, guided: int) -> float:
    """Milliseconds that a step takes beyond the device's own time, on average over a run."""
    return statistics.mean(trio.run(steps_of, rows, step_ms / 1e3, overlaps, guided)) * 1e3 - step_ms


def line(rows: int, guided: int, rounds: int) -> list[str]:
    """The table's line for steps of ``rows`` streams, ``guided`` of which follow a grammar."""
    step_ms = STEPS_MS[rows]
    pairs = [[waits_ms(rows, step_ms, overlaps, guided) for overlaps in (False, True)] for _ in range(rounds)]
    alone, behind = (max(0.0, statistics.median(found)) for found in zip(*pairs, strict=True))
    gain = (step_ms + alone) / (step_ms + behind)
    return [str(rows), str(guided), f"{step_ms:.0f}", f"{alone:.2f}", f"{behind:.2f}", f"{gain:.2f}"]


def main() -> None:
    """Measure, print and write the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    lines = [line(rows, guided, rounds) for rows, guided in KINDS]
    titles = ["streams", "with a grammar", "step, ms", "wait between single steps, ms", "overlapping, ms"]
    found = table([*titles, "times as fast"], lines)
    print(found)
    about = (
        "A device that is a clock: each step takes the time in the third column, and the host's part is real, but for "
        f"the masks of streams with a grammar: {MASK_S * 1e3:.1f} ms of a core each."
    )
    Note("overlap-grammars").write(
        "Steps that overlap on a device", f"make bench-overlap ARGS='--rounds {rounds}'", about, found
    )


if __name__ == "__main__":
    main()
