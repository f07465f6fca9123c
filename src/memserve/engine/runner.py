"""The CPU step engine: batch plans in, tokens out, on the pages of one arena."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from memserve.drawing import Logprobs, PromptLogprobs, Sampling
from memserve.engine import sampling
from memserve.engine.adjusting import adjusted, logprobs_of_draws
from memserve.engine.model import BatchTensors, Llama
from memserve.engine.ops import rope_table
from memserve.engine.plan_check import check_plan
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.engine.prompt_logprobs import score_prompts
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import default_cache_dir, in_rows, map_weights
from memserve.kernels.cpu import CpuAttention
from memserve.kernels.mapping import shared_memory
from memserve.kernels.native import MAX_ROWS, NativeStep, open_step
from memserve.kernels.native.prompt_logprobs import SCORED_AT_ONCE, Scoring
from memserve.tokens import count, pack, pages_for, span, unpack

if TYPE_CHECKING:
    from memserve.engine.cpu_budget import Cores

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
    ) -> None:
        """``arena``: writable memory with ``pages`` pages of ``spec.page_shape(page_tokens)``.

        ``threads``: threads of a step where ``cores`` is None. ``native``: use the native step where it is
        available.
        """
        expected = pages * spec.page_bytes(page_tokens, dtype)
        if len(memoryview(arena).cast("B")) < expected:
            raise ValueError(f"the arena has {len(memoryview(arena))} bytes; {pages} pages take {expected}")
        self._spec, self._pages, self._page_tokens = spec, pages, page_tokens
        self._cores, self._threads = cores, threads
        self._dtype: torch.dtype = getattr(torch, dtype)
        values = pages * spec.kv_values_per_token * page_tokens
        flat = torch.frombuffer(arena, dtype=self._dtype, count=values)
        self._arena: torch.Tensor | None = flat.view(pages, *spec.page_shape(page_tokens))
        self._attention: CpuAttention | None = CpuAttention(self._arena, spec.heads)
        weights, rope = map_weights(weights_path), rope_table(spec)
        self._native: NativeStep | None = None
        if native and self._dtype == torch.bfloat16:
            most = cores.want if cores is not None else threads
            self._native = open_step(spec, weights, rope, page_tokens, most, default_cache_dir())
        # Matrices in tiles are copied to rows, which happens only where the native step's build failed.
        self._model = None if self._native else Llama(spec, in_rows(weights, spec), self._dtype)

    @property
    def native(self) -> bool:
        """Whether it runs native steps."""
        return self._native is not None

    def run(self, plan: BatchPlan) -> BatchResult:
        """Run one step. Raises ValueError, naming the row, for a plan that accesses memory not its own."""
        assert self._attention is not None and self._arena is not None, "the engine is closed"
        check_plan(plan, self._spec, self._pages, self._page_tokens)
        with self._hold() as threads:
            crew = self._cores.regroup if self._cores is not None else None
            result = self._step(plan, self._attention, self._arena, threads, crew)
            return result if self._cores is None else attrs.evolve(result, neighbours=self._cores.neighbours)

    def warm_up(self) -> None:
        """Run a chunk and a decode row on scratch pages, so that the first request finds all loaded."""
        length = min(2 * MAX_ROWS, self._spec.max_context - 1)  # twice what the native step takes at once
        pages = tuple(range(pages_for(length + 1, self._page_tokens)))
        scratch = self._scratch(len(pages))
        attention = CpuAttention(scratch, self._spec.heads)
        greedy = Sampling(temperature=0.0)
        with self._hold() as threads:
            self._step(BatchPlan((Row(pack([0] * length), 0, pages, None),)), attention, scratch, threads)
            self._step(BatchPlan((Row(pack([0]), length, pages, greedy),)), attention, scratch, threads)

    def timer(
        self, rows: int, context: int, most: int | None = None
    ) -> Callable[[Sequence[tuple[int, int]]], tuple[float, int]]:
        """A function that times a step of rows (new tokens, tokens before them): seconds, and threads used.

        ``most``: limit on the threads of a step. The steps run on scratch pages that exceed the machine's
        caches, and each row reads from another place.
        """
        token_bytes = (
            self._spec.page_bytes(self._page_tokens, str(self._dtype).removeprefix("torch."))
            / self._page_tokens
        )
        shared = pages_for(max(context, int(SCRATCH_BYTES / token_bytes)), self._page_tokens)
        scratch = self._scratch(shared + rows)
        attention = CpuAttention(scratch, self._spec.heads)
        greedy = Sampling(temperature=0.0)

        def run(shapes: Sequence[tuple[int, int]]) -> tuple[float, int]:
            plan = []
            for number, (new, before) in enumerate(shapes):
                length = pages_for(before + new, self._page_tokens)
                pages = [(number * length + i) % shared for i in range(length)]
                if len(shapes) > 1 and new == 1:
                    pages[-1] = shared + number  # no other row may read or write the page that a row writes
                plan.append(Row(pack([0] * new), before, tuple(pages), greedy))
            with self._hold() as held:
                threads = min(held, most or held)
                began = time.perf_counter()
                self._step(BatchPlan(tuple(plan)), attention, scratch, threads)
                return time.perf_counter() - began, threads

        return run

    def _scratch(self, pages: int) -> torch.Tensor:
        """Zeroed pages in shared memory, like the arena's: steps on other memory would take other times."""
        values = pages * self._spec.kv_values_per_token * self._page_tokens
        flat = torch.frombuffer(shared_memory(values * self._dtype.itemsize), dtype=self._dtype)
        return flat.view(pages, *self._spec.page_shape(self._page_tokens))

    def rest(self) -> None:
        """No step is wanted for now: release this worker's share of the cores to other workers."""
        if self._cores is not None:
            self._cores.busy(False)

    def close(self) -> None:
        """Release the arena and the weights."""
        if self._native is not None:
            self._native.close()
        self._attention = self._model = self._arena = self._native = None

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
        attention: CpuAttention,
        arena: torch.Tensor,
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
            drawn, reports, prompts = self._step_on_torch(plan, attention, threads)
        tokens: list[int | None] = [None] * len(plan.rows)
        more: dict[int, bytes] = {}
        for number, one in zip(wanted, drawn, strict=True):
            tokens[number], *_ = unpack(one)
            if count(one) > 1:
                more[number] = span(one, 1, count(one))
        logprobs = {number: one for number, one in zip(wanted, reports, strict=True) if one is not None}
        step_ms = (time.perf_counter() - began) * 1000
        return BatchResult(tuple(tokens), step_ms, threads, 0.0, logprobs, prompts, more)

    def _step_on_torch(
        self, plan: BatchPlan, attention: CpuAttention, threads: int
    ) -> tuple[list[bytes], list[Logprobs | None], dict[int, PromptLogprobs]]:
        """One draw and its report per sampled row, drafts ignored; prompt log probabilities by row number."""
        assert self._model is not None, "the engine is closed"
        torch.set_num_threads(threads)
        rows = [row for row in plan.rows if row.sample is not None]
        settings = [row.sample for row in rows if row.sample is not None]
        with torch.inference_mode():
            batch = BatchTensors.of(plan)
            x, delta = self._model.layers(batch, attention.plan(plan), attention)
            head = partial(self._model.head, x, delta)
            prompts = score_prompts(enumerate(plan.rows), head, x.device, SCORED_AT_ONCE)
            if not rows:
                return [], [], prompts
            logits = head(batch.wanted)
            tokens = sampling.draw(adjusted(logits, rows), settings, [row.end for row in rows])
            return [pack([one]) for one in tokens], logprobs_of_draws(logits, rows, tokens), prompts
