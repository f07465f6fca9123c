"""Work launched on a GPU: captured graphs, marks in the stream, and steps whose results are not read yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs
import numpy as np
import torch

from memserve.drawing import PromptLogprobs
from memserve.engine.gpu_draws import Draws
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.kernels.sending import sent


class Mark(Protocol):
    """A place in a device's stream, behind all that was launched before it was made."""

    def wait(self) -> None:
        """Wait until the device has reached it."""

    def reached(self) -> bool:
        """Whether the device has reached it."""


class Graphs(Protocol):
    """The operations on a device's streams that the engine needs; on a GPU, :class:`CudaGraphs`."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what ``run`` launches; the returned function launches it again, on the same addresses.

        ``run`` is called twice. Launches before the second call have finished by then: host buffers are free.
        """

    def mark(self) -> Mark:
        """Mark what has been launched so far."""


class CudaGraphs:
    """CUDA graphs and events on one GPU. Graphs run one after another, so they share a memory pool.

    A graph lives as long as the function that ``capture`` returned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # what the first use allocates must not be captured
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return _CudaMark(event)


@attrs.frozen(eq=False)
class _CudaMark:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()

    def reached(self) -> bool:
        reached: bool = self.event.query()  # type: ignore[no-untyped-call]
        return reached


@attrs.define(eq=False)
class LaunchedStep:
    """A :class:`~memserve.engine.plans.RunningStep` on a GPU."""

    plan: BatchPlan
    _draws: Draws | None
    """None where no row draws."""
    _prompts: dict[int, PromptLogprobs]
    _graphs: Graphs
    _began: float
    """When its launch began, in ``perf_counter`` seconds."""
    _neighbours: int
    _before: LaunchedStep | None
    """The step that was running when this one was launched; None once this one's result was read."""
    _waits: bool = attrs.field(default=attrs.Factory(lambda self: self.plan.late, takes_self=True))
    """Whether rows that draw late have yet to become known."""
    _mark: Mark = attrs.field(default=attrs.Factory(lambda self: self._graphs.mark(), takes_self=True))
    """Behind the step and the copies of its draws to the host."""
    read: bool = False
    """Whether its result was read, or reading it failed."""
    _result: BatchResult | None = None
    _ended: float = 0.0
    """When its result was there."""

    def done(self) -> bool:
        """Whether the device has run it."""
        return self._mark.reached()

    def overtake(self) -> None:
        """Record that another step is about to be launched, which may overwrite the logits."""
        assert self.read or self.plan.followed, "a step was launched behind one that may not be followed"
        assert not self._waits, "a step was launched behind one whose late draws were not"
        if self._draws is not None:
            self._draws.give_up_logits()

    def drawn_by(self, rows: Sequence[int]) -> torch.Tensor:
        """What ``rows`` draw, (rows,) int64 on the device; any token for draws that are not found there."""
        assert self._draws is not None, "rows follow a step that draws nothing"
        if self._result is not None:
            return sent(np.array([self._result.tokens[row] for row in rows]), self._draws.tokens.device)
        return self._draws.drawn_by(rows)

    def draw_late(self, rows: Mapping[int, Row]) -> None:
        """Launch the draws of ``rows``, which draw late and are known now; others that draw late become void."""
        assert self._waits and self._draws is not None, "late draws were launched already, or there are none"
        with torch.inference_mode():
            self._draws.draw_late(rows)
        self._waits, self._mark = False, self._graphs.mark()

    def result(self) -> BatchResult:
        """Wait for the step; its outcome. Raises FloatingPointError, naming the row, for broken logits."""
        assert not self._waits, "a step is read whose late draws were not launched"
        self._mark.wait()
        self._ended, self.read = time.perf_counter(), True
        began, void = self._began, frozenset[int]()
        before, self._before = self._before, None
        if before is not None:
            assert before._result is not None, "of two steps, the one launched first is read first"
            lost = before._result.void
            void = frozenset(i for i, row in enumerate(self.plan.rows) if row.follows in lost)
            began = max(began, before._ended)
        with torch.inference_mode():
            drawn, logprobs, far = ({}, {}, void) if self._draws is None else self._draws.read()
        void |= far
        tokens = tuple(None if i in void else drawn.get(i) for i in range(len(self.plan.rows)))
        took_ms = (self._ended - began) * 1000
        self._result = BatchResult(tokens, took_ms, 1, self._neighbours, logprobs, self._prompts, void=void)
        return self._result
