"""The CPU step engine: batch plans in, tokens out, on the pages of one arena.

The native step needs no torch, which takes 190 MiB and more than a second to import. Only an engine without
the native step imports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from memserve.drawing import Sampling
from memserve.engine.calibration import timed_tokens
from memserve.engine.cpu_budget import threads_had, waited_s
from memserve.engine.plan_check import check_plan
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import HELD_AS, default_cache_dir, map_bits
from memserve.kernels.mapping import shared_memory
from memserve.kernels.native import ArenaPages, NativeStep, open_step
from memserve.kernels.native.pieces import MAX_ROWS
from memserve.kernels.native.prompt_logprobs import Scoring
from memserve.tokens import count, pack, pages_for, span, unpack

if TYPE_CHECKING:
    from memserve.engine.cpu_budget import Cores
    from memserve.engine.torch_step import TorchStep
    from memserve.engine.weights import Bits

SCRATCH_BYTES = 96 << 20
"""Size of the pages that steps are timed on: more than CPU caches hold."""


class CpuEngine:
    """A :class:`~memserve.engine.plans.StepEngine` on CPU cores. Only one thread at a time may call it.

    The shard owns the arena and outlives the engine. The weights are a mapping shared with other workers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights_path: Path,
        arena: memoryview | mmap,
        pages: int,
        page_tokens: int,
        dtype: str,
        cores: Cores | None = None,
        threads: int = 1,
        native: bool = True,
        max_context: int | None = None,
    ) -> None:
        """``arena``: writable memory with ``pages`` pages of ``spec.page_shape(page_tokens)``.

        ``threads``: threads of a step where ``cores`` is None. ``native``: use the native step where it is
        available. ``max_context``: most tokens of a row; unset, the model's.
        """
        # Tables of positions are as long as the context, in each worker's own memory.
        spec = attrs.evolve(spec, max_context=min(max_context or spec.max_context, spec.max_context))
        expected = pages * spec.page_bytes(page_tokens, dtype)
        if len(memoryview(arena).cast("B")) < expected:
            raise ValueError(f"the arena has {len(memoryview(arena))} bytes; {pages} pages take {expected}")
        self._spec, self._pages, self._page_tokens = spec, pages, page_tokens
        self._cores, self._threads = cores, threads
        self._dtype = dtype
        self._arena: ArenaPages | None = self._pages_in(arena, pages)
        weights = map_bits(weights_path)
        self._native: NativeStep | None = None
        if native and dtype == "bfloat16":
            most = cores.want if cores is not None else threads
            self._native = open_step(spec, weights, page_tokens, most, default_cache_dir())
        self._torch = None if self._native else _torch_step(spec, weights, dtype)

    @property
    def native(self) -> bool:
        """Whether it runs native steps."""
        return self._native is not None

    def run(self, plan: BatchPlan) -> BatchResult:
        """Run one step. Raises ValueError, naming the row, for a plan that accesses memory not its own."""
        assert self._arena is not None, "the engine is closed"
        check_plan(plan, self._spec, self._pages, self._page_tokens)
        asked = time.perf_counter()
        with self._hold() as threads:
            waited_s = time.perf_counter() - asked
            crew = self._cores.regroup if self._cores is not None else None
            result = self._step(plan, self._arena, threads, crew)
            if self._cores is None:
                return result
            return attrs.evolve(result, neighbours=self._cores.neighbours, waited_s=waited_s)

    def warm_up(self) -> None:
        """Run a chunk and a decode row on scratch pages, so that the first request finds all loaded."""
        length = min(2 * MAX_ROWS, self._spec.max_context - 1)  # twice what the native step takes at once
        pages = tuple(range(pages_for(length + 1, self._page_tokens)))
        scratch = self._scratch(len(pages))
        greedy = Sampling(temperature=0.0)
        with self._hold() as threads:
            self._step(BatchPlan((Row(pack([0] * length), 0, pages, None),)), scratch, threads)
            self._step(BatchPlan((Row(pack([0]), length, pages, greedy),)), scratch, threads)

    def timer(
        self, rows: int, context: int, most: int | None = None
    ) -> Callable[[Sequence[tuple[int, int]]], tuple[float, int]]:
        """A function that times a step of rows (new tokens, tokens before them): seconds, and threads used.

        The number of threads is 0 where other processes used their cores during the step.

        ``most``: limit on the threads of a step. The steps run on scratch pages that exceed the machine's
        caches, and each row reads from another place.
        """
        token_bytes = self._spec.page_bytes(self._page_tokens, self._dtype) / self._page_tokens
        shared = pages_for(max(context, int(SCRATCH_BYTES / token_bytes)), self._page_tokens)
        scratch = self._scratch(shared + rows)
        greedy = Sampling(temperature=0.0)

        def run(shapes: Sequence[tuple[int, int]]) -> tuple[float, int]:
            plan = []
            for number, (new, before) in enumerate(shapes):
                length = pages_for(before + new, self._page_tokens)
                pages = [(number * length + i) % shared for i in range(length)]
                if len(shapes) > 1 and new == 1:
                    pages[-1] = shared + number  # no other row may read or write the page that a row writes
                tokens = timed_tokens(number, new, self._spec.vocab)
                plan.append(Row(tokens, before, tuple(pages), greedy))
            with self._hold() as held:
                threads, waited = min(held, most or held), waited_s()
                began = time.perf_counter()
                self._step(BatchPlan(tuple(plan)), scratch, threads)
                seconds = time.perf_counter() - began
                return seconds, threads_had(threads, seconds, waited_s() - waited)

        return run

    def _scratch(self, pages: int) -> ArenaPages:
        """Zeroed pages in shared memory, like the arena's: steps on other memory would take other times."""
        return self._pages_in(
            shared_memory(pages * self._spec.page_bytes(self._page_tokens, self._dtype)), pages
        )

    def _pages_in(self, memory: memoryview | mmap, pages: int) -> ArenaPages:
        values = pages * self._spec.kv_values_per_token * self._page_tokens
        flat: NDArray[Any] = np.frombuffer(memory, HELD_AS[self._dtype], values)
        return ArenaPages(flat.reshape(pages, *self._spec.page_shape(self._page_tokens)))

    def rest(self) -> None:
        """No step is wanted for now: release this worker's share of the cores to other workers."""
        if self._cores is not None:
            self._cores.busy(False)

    def close(self) -> None:
        """Release the arena and the weights."""
        if self._native is not None:
            self._native.close()
        self._arena = self._native = self._torch = None

    @contextmanager
    def _hold(self) -> Iterator[int]:
        if self._cores is None:
            yield self._threads
            return
        with self._cores.hold() as threads:
            yield threads

    def _step(
        self,
        plan: BatchPlan,
        arena: ArenaPages,
        threads: int,
        crew: Callable[[int], int] | None = None,
    ) -> BatchResult:
        began = time.perf_counter()
        wanted = [number for number, row in enumerate(plan.rows) if row.sample is not None]
        if self._native is not None:
            scoring = Scoring() if any(row.score for row in plan.rows) else None
            drawn, reports = self._native.step(plan, arena, threads, crew, scoring)
            prompts = scoring.prompts(plan) if scoring is not None else {}
        else:
            assert self._torch is not None, "the engine is closed"
            drawn, reports, prompts = self._torch.step(plan, arena, threads)
        tokens: list[int | None] = [None] * len(plan.rows)
        more: dict[int, bytes] = {}
        for number, one in zip(wanted, drawn, strict=True):
            tokens[number], *_ = unpack(one)
            if count(one) > 1:
                more[number] = span(one, 1, count(one))
        logprobs = {number: one for number, one in zip(wanted, reports, strict=True) if one is not None}
        step_ms = (time.perf_counter() - began) * 1000
        return BatchResult(tuple(tokens), step_ms, threads, 0.0, logprobs, prompts, more)


def _torch_step(spec: ModelSpec, weights: Bits, dtype: str) -> TorchStep:
    from memserve.engine.torch_step import TorchStep

    return TorchStep(spec, weights, dtype)
