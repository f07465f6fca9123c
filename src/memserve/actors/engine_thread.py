"""The thread that runs one step engine.

Steps run here, never on the event loop. The thread stays the same for the engine's life, because OpenMP keeps
a thread pool and a thread count for each thread that calls it. trio's own worker threads come and go, and
each would start a new pool.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

import trio

from memserve.engine.guide import Guide
from memserve.engine.plans import BatchPlan, BatchResult, OverlappingEngine, RunningStep, StepEngine


class EngineThread:
    """Runs the steps of the engine that ``make`` builds, in order, and one at a time unless it overlaps them.

    ``guide`` fills in which tokens the grammars allow: before a step, or before its late draws, once the step
    in front of it was read. Where a grammar takes longer than the step, the device waits, but no result does.
    """

    def __init__(self, make: Callable[[], StepEngine], guide: Guide) -> None:
        self._make, self._guide = make, guide
        self._plans: queue.Queue[BatchPlan | None] = queue.Queue()
        """Holds one plan, or two for an engine that overlaps steps: a core gives it no more unfinished steps.

        Not a SimpleQueue: up to Python 3.12, a get whose timeout is over before it begins to wait never returns.
        """
        self._token = trio.lowlevel.current_trio_token()
        self._ready = trio.Event()
        self._ended = trio.Event()
        self._failure: BaseException | None = None
        self._deliver: Callable[[BatchResult], None] = lambda result: None
        self._tokens: tuple[int | None, ...] = ()
        """Those of the overlapping step that was read last."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Build the engine, then serve until cancelled.

        Raises what the engine raises: without an engine the worker must end.
        """
        threading.Thread(target=self._work, name="engine", daemon=True).start()
        try:
            await self._ready.wait()
            if self._failure is None:
                task_status.started()
            await self._ended.wait()
        finally:
            self._plans.put(None)
            with trio.move_on_after(STEP_S_MAX, shield=True):
                await self._ended.wait()  # an interpreter that exits while a native thread runs aborts
        if self._failure is not None:
            raise self._failure

    def submit(self, plan: BatchPlan, deliver: Callable[[BatchResult], None]) -> None:
        """Queue ``plan`` for the engine; ``deliver`` gets the result on the event loop."""
        self._deliver = deliver
        self._plans.put(plan)

    def _work(self) -> None:
        try:
            engine = self._make()
            self._soon(self._ready.set)
            while (plan := self._next(engine)) is not None:
                if isinstance(engine, OverlappingEngine):
                    self._overlap(engine, plan)
                else:
                    self._report(engine.run(self._guide.filled(plan)))
            engine.close()
        except BaseException as failure:
            self._failure = failure
        self._soon(self._ready.set)
        self._soon(self._ended.set)

    def _overlap(self, engine: OverlappingEngine, plan: BatchPlan) -> None:
        """Run a step, and behind it every step whose plan comes before the previous one has ended."""
        running = engine.launch(self._guide.filled(plan))
        # It may follow a step that has ended and was read, whose result the core did not have yet.
        self._draw_late(running, plan)
        while plan.followed and (following := self._plan_during(running)) is not None:
            plan, behind = following, engine.launch(self._guide.filled(following))
            self._read(running)
            self._draw_late(behind, plan)
            running = behind
        self._read(running)

    def _read(self, running: RunningStep) -> None:
        """Wait for the step and report its result."""
        result = running.result()
        self._tokens = result.tokens
        self._report(result)

    def _draw_late(self, running: RunningStep, plan: BatchPlan) -> None:
        """Launch the step's late draws, if it has any: the step before was read."""
        if plan.late:
            running.draw_late(self._guide.filled_late(plan, self._tokens))

    def _plan_during(self, running: RunningStep) -> BatchPlan | None:
        """The next plan, if it comes before the step has ended."""
        while True:
            try:
                plan = self._plans.get(timeout=LOOK_S)
            except queue.Empty:
                if running.done():
                    return None
                continue
            if plan is None:
                self._plans.put(None)  # the end of all plans, for whoever waits for the next one
            return plan

    def _report(self, result: BatchResult) -> None:
        self._soon(partial(self._deliver, result))

    def _next(self, engine: StepEngine) -> BatchPlan | None:
        """The next plan. After IDLE_S without one, the engine leaves its cores to other workers."""
        try:
            return self._plans.get(timeout=IDLE_S)
        except queue.Empty:
            engine.rest()
            return self._plans.get()

    def _soon(self, call: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            pass  # the actor ended while a step was running; nothing waits for its result


STEP_S_MAX = 30.0
"""How long an ending actor waits for the running step."""
IDLE_S = 0.002
"""Pause between steps after which a worker counts as idle; one turn of the event loop takes far less."""
LOOK_S = 1e-4
"""How often the thread looks whether a step that may be followed has ended, while it waits for the next plan."""
