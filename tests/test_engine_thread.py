"""The thread that runs an engine: which steps it launches behind which, and what it reports when."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import attrs
import pytest
import trio

from memserve.actors import engine_thread
from memserve.actors.engine_thread import EngineThread
from memserve.drawing import Adjustments, Sampling
from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult, Past, Row
from memserve.tokens import pack, unpack

GRAMMAR = Sampling(adjust=Adjustments(grammar="any"))


def plan(start: int, followed: bool = False) -> BatchPlan:
    """A step of one row."""
    return BatchPlan((Row(pack([1]), start, (0,), None),), followed)


def late_plan(start: int, ends: tuple[int, ...] = (), followed: bool = True) -> BatchPlan:
    """A step of one row that follows a grammar and draws late."""
    row = Row(pack([0]), start, (0,), GRAMMAR, Past(b"", pack([8])), follows=0, ends=pack(ends))
    return BatchPlan((row,), followed)


def result(number: int) -> BatchResult:
    """The result of step ``number``."""
    return BatchResult((number,), 1.0, 1)


@attrs.define(eq=False)
class Step:
    """A step on a device that ends when the test says so."""

    number: int
    log: list[str]
    ended: threading.Event = attrs.field(factory=threading.Event)

    def done(self) -> bool:
        """Whether it has ended."""
        return self.ended.is_set()

    def draw_late(self, rows: Mapping[int, Row]) -> None:
        """Note the answers after which rows draw."""
        self.log.append(f"late {self.number} {[[*unpack(row.past.output)] for row in rows.values()]}")
        assert all(row.past.allowed == row.past.output for row in rows.values())

    def result(self) -> BatchResult:
        """Wait for it."""
        assert self.ended.wait(10)
        self.log.append(f"read {self.number}")
        return result(self.number)


@attrs.define(eq=False)
class Device:
    """An engine that overlaps steps; each step's number is where its row starts."""

    log: list[str] = attrs.field(factory=list)
    steps: dict[int, Step] = attrs.field(factory=dict)
    ends_at_once: bool = False

    def launch(self, given: BatchPlan) -> Step:
        """Note the launch."""
        number = given.rows[0].start
        if number < 0:
            raise RuntimeError("the device is gone")
        self.log.append(f"launch {number}")
        step = self.steps[number] = Step(number, self.log)
        if self.ends_at_once:
            step.ended.set()
        return step

    def run(self, given: BatchPlan) -> BatchResult:
        """Not used where steps overlap."""
        raise AssertionError(given)

    def rest(self) -> None:
        """Nothing to release."""

    def close(self) -> None:
        """Note it."""
        self.log.append("close")


class Masks:
    """A follower of grammars whose masks are the answers."""

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """See the protocol."""
        return output

    def ahead(self, grammar: str, output: bytes, allowed: bytes, guess: bytes, most: int):
        """Nothing is forced."""
        return b"", ()


class Running:
    """An engine thread, and what it has reported."""

    def __init__(self, device: Device) -> None:
        self.device, self.reported = device, list[int | None]()
        self.thread = EngineThread(lambda: device, Guide(Masks))

    def give(self, given: BatchPlan) -> None:
        """Submit a plan."""
        self.thread.submit(given, lambda found: self.reported.append(found.tokens[0]))

    async def until(self, *log: str) -> None:
        """Wait until the device's log is ``log``."""
        with trio.fail_after(10):
            while self.device.log != list(log):
                await trio.sleep(0.001)

    async def until_reported(self, *numbers: int) -> None:
        """Wait until the results of steps ``numbers`` were reported, in this order."""
        with trio.fail_after(10):
            while self.reported != list(numbers):
                await trio.sleep(0.001)


async def test_a_step_is_launched_behind_one_that_runs() -> None:
    """A plan that comes while a step runs is launched at once; results are reported in order."""
    running = Running(Device())
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        running.give(plan(1, followed=True))
        running.give(plan(2, followed=True))
        await running.until("launch 1", "launch 2")
        running.device.steps[1].ended.set()
        await running.until_reported(1)
        running.give(plan(3))
        await running.until("launch 1", "launch 2", "read 1", "launch 3")
        running.device.steps[2].ended.set()
        running.device.steps[3].ended.set()
        await running.until_reported(1, 2, 3)
        nursery.cancel_scope.cancel()
    assert running.device.log[-1] == "close"


async def test_a_step_that_ends_first_is_reported_without_another() -> None:
    """A step that may be followed is reported when it ends, whether another plan comes or not."""
    running = Running(Device())
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        running.give(plan(1, followed=True))
        await running.until("launch 1")
        running.device.steps[1].ended.set()
        await running.until_reported(1)
        running.give(plan(2))
        await running.until("launch 1", "read 1", "launch 2")
        running.device.steps[2].ended.set()
        await running.until_reported(1, 2)
        nursery.cancel_scope.cancel()


async def test_no_wait_for_a_plan_outlasts_its_time(monkeypatch) -> None:
    """Looking for the next plan ends when its time is over, however short: a SimpleQueue sometimes waited for ever."""
    monkeypatch.setattr(engine_thread, "LOOK_S", 1e-9)
    running = Running(Device(ends_at_once=True))
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        with trio.fail_after(30):
            for number in range(1, 6001):
                running.give(plan(number, followed=True))
                while len(running.reported) < number:
                    await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_rows_draw_late_when_the_step_before_was_read() -> None:
    """Late draws are launched with the tokens of the step before, at once, and before another step is launched."""
    running = Running(Device())
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        running.give(plan(1, followed=True))
        running.give(late_plan(2))
        log = ["launch 1", "launch 2"]
        await running.until(*log)
        running.give(late_plan(3, ends=(2,)))
        running.device.steps[1].ended.set()
        await running.until(*log, "read 1", "late 2 [[8, 1]]", "launch 3")
        running.device.steps[2].ended.set()
        log += ["read 1", "late 2 [[8, 1]]", "launch 3", "read 2", "late 3 []"]  # 2 has ended the answer
        await running.until(*log)
        running.device.steps[3].ended.set()
        await running.until(*log, "read 3")
        nursery.cancel_scope.cancel()


async def test_rows_behind_a_step_that_was_read_draw_at_once() -> None:
    """A row whose plan comes after the step that it follows was read has its draw launched with the row."""
    running = Running(Device())
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        running.give(plan(1, followed=True))
        await running.until("launch 1")
        running.device.steps[1].ended.set()
        await running.until_reported(1)
        running.give(late_plan(2))
        await running.until("launch 1", "read 1", "launch 2", "late 2 [[8, 1]]")
        running.device.steps[2].ended.set()
        await running.until_reported(1, 2)
        nursery.cancel_scope.cancel()


async def test_the_thread_ends_while_a_step_runs() -> None:
    """An actor that ends while its engine waits for the next plan still ends the engine, once the step is over."""
    running = Running(Device())
    async with trio.open_nursery() as nursery:
        await nursery.start(running.thread.run)
        running.give(plan(1, followed=True))
        await running.until("launch 1")
        nursery.cancel_scope.cancel()
        running.device.steps[1].ended.set()
    assert running.device.log == ["launch 1", "read 1", "close"]


async def test_a_failed_launch_ends_the_worker() -> None:
    """What the engine raises ends the actor, also when it happens behind a running step."""
    running = Running(Device())
    with trio.fail_after(10):
        with pytest.raises(ExceptionGroup) as raised:
            async with trio.open_nursery() as nursery:
                await nursery.start(running.thread.run)
                running.give(plan(1, followed=True))
                running.give(plan(-1))
                await trio.sleep_forever()
    assert raised.group_contains(RuntimeError, match="the device is gone")
