"""The CUDA step engine: batch plans in, tokens out, on KV pages in GPU memory that a shard owns.

A step of decode rows alone is one CUDA graph, captured at start for each batch size in
``page_tables.BUCKETS``; padding rows write to a scratch page behind the pool's. Other steps launch kernels
one by one, and so do decode rows that share a prefix, if attending to it together saves more than a graph
does.

The host works while the GPU runs: a step that may be followed (:mod:`memserve.engine.steps`) has the next one
launched behind it, which takes the tokens that it follows from the device. Rows whose penalties or grammar
depend on those tokens draw late, once the host knows them (:class:`memserve.engine.gpu_launch.LaunchedStep`).
While a captured step runs that may not be followed, the next one is planned, for the same rows one token
further.

A step's result is there when the GPU has finished it: any process may then read a page that the step reported
as written, and a page that no later step reads may be reassigned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from memserve.config import Resolved
from memserve.drawing import PromptLogprobs, Sampling
from memserve.engine.calibration import timed_tokens
from memserve.engine.cpu_budget import Cores
from memserve.engine.gpu_draws import Draws, best_of, launch_draws
from memserve.engine.gpu_launch import CudaGraphs, Graphs, LaunchedStep
from memserve.engine.model import BatchTensors, Llama
from memserve.engine.plan_check import check_plan
from memserve.engine.plans import BatchPlan, BatchResult, Row
from memserve.engine.prompt_logprobs import score_prompts
from memserve.engine.safetensors import read_header
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import ModelFiles
from memserve.errors import UserError
from memserve.kernels.flashinfer_kit import (
    CapturedDecode,
    FlashInferAttention,
    Library,
    load_flashinfer,
    prefill_backend,
)
from memserve.kernels.flashinfer_ops import FlashInferOps, norms_as
from memserve.kernels.gpu_memory import GpuArena, attach_gpu_arena
from memserve.kernels.page_tables import Sharing, StepTables, Table, bucket_of, buckets_up_to, continues
from memserve.kernels.sending import sent
from memserve.settings.gpu_room import SCRATCH_PAGES, drawn_together
from memserve.tokens import count, pack, pages_for

WARM_TOKENS = 512
"""Tokens of the chunk that is run at start, so that the first request finds kernels and libraries loaded."""

GROUPED_PRODUCTS = (9, 10)
"""Major compute capabilities for which torch has a kernel of grouped products (Hopper, Blackwell).

On others it makes them one by one, and waits for the GPU to learn their sizes: this cannot be captured.
"""

_Launched = tuple[Draws | None, dict[int, PromptLogprobs]]
"""The draws of a step, if it draws, and the prompt log probabilities asked for, by row number."""


@attrs.define(eq=False)
class _DecodeStep:
    """A captured batch size: its arrays at fixed addresses, and the graph that reads and writes them.

    A graph holds addresses, not tensors: all that its capture was given must live as long as it does.
    """

    arrays: CapturedDecode
    batch: BatchTensors
    best: torch.Tensor | None = None
    """(2, rows) float64: each row's largest logit, and the token that has it."""
    replay: Callable[[], None] = lambda: None

    @property
    def rows(self) -> int:
        """The batch size."""
        return self.arrays.rows


@attrs.frozen(eq=False)
class _PlannedStep:
    """A step planned before its tokens were known."""

    step: _DecodeStep
    before: tuple[Row, ...]
    """The rows of the step that it follows."""

    def holds_for(self, step: _DecodeStep, rows: Sequence[Row], page_tokens: int) -> bool:
        """Whether the plan made ahead fits ``rows`` on ``step``."""
        return self.step is step and continues(rows, self.before, page_tokens)


class CudaEngine:
    """A :class:`~memserve.engine.plans.StepEngine` on one GPU. All calls come from one thread.

    The shard owns arena and weights and outlives the engine. ``close`` lets go of both.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        arena: torch.Tensor,
        library: Library,
        graphs: Graphs,
        *,
        rows: int,
        backend: str,
        max_context: int | None = None,
        release: Callable[[], None] = lambda: None,
        shared: Cores | None = None,
        captures: bool = True,
    ) -> None:
        """``arena``: (pages + 1, layers, 2, kv_heads, page_tokens, head_dim); the last page is scratch.

        ``weights``: on the arena's device, matrices in its dtype. ``rows``: most rows of a step. ``backend``:
        of prefill, fa2 or fa3. ``max_context``: most tokens of a row; unset, the model's. ``release``: called
        by ``close`` after the last use of both. ``shared``: the GPU's other users. ``captures``: capture steps
        of decode rows; otherwise they launch kernels one by one as other steps do.
        """
        # All layers attend to all positions, which is right up to the length of a sliding window.
        spec = attrs.evolve(spec, max_context=spec.full_context)
        self._spec, self._graphs = spec, graphs
        self._pages, self._page_tokens = len(arena) - 1, arena.shape[4]
        self._device, dtype = arena.device, arena.dtype
        ops = FlashInferOps(library, spec, dtype, arena.device)
        self._model: Llama | None = Llama(spec, norms_as(weights, dtype), dtype, ops)
        self._buckets = buckets_up_to(rows)
        self._captures = captures
        self._attention: FlashInferAttention | None = FlashInferAttention(
            library, arena, spec.heads, backend, self._buckets[-1]
        )
        self._fresh = partial(_attention, library, spec.heads, backend)
        # One array for all captured batch sizes: a row of a vocabulary of 128k tokens takes half a megabyte.
        self._logits: torch.Tensor | None = None
        self._row_pages = pages_for(min(max_context or spec.max_context, spec.max_context), self._page_tokens)
        self._steps: dict[int, _DecodeStep] = {}
        self._ahead: _PlannedStep | None = None
        self._latest: LaunchedStep | None = None
        self._loaded = graphs.mark()
        """Behind the copies of the host arrays that planning a step fills in."""
        self._checked: Sequence[Row] = ()
        self.sharing = Sharing()
        """When decode rows attend together to a shared prefix."""
        self._page_bytes = arena[0, 0].nbytes  # of one layer
        self._release = release
        self._shared = shared

    @property
    def device_name(self) -> str:
        """The GPU's own name."""
        return torch.cuda.get_device_name(self._device)

    def run(self, plan: BatchPlan) -> BatchResult:
        """Run one step. Raises ValueError, naming the row, for a plan that uses pages not its own."""
        return self.launch(plan).result()

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Launch one step, behind the latest one if its result was not read. Raises ValueError as ``run``."""
        check_plan(plan, self._spec, self._pages, self._page_tokens, self._checked, overlaps=True)
        self._checked = plan.rows
        neighbours = self._shared.look() if self._shared is not None else 0
        began, before = time.perf_counter(), self._latest
        if before is not None:
            before.overtake()
        draws, prompts = self._launch(plan, self.sharing)
        running = None if before is None or before.read else before
        self._latest = LaunchedStep(plan, draws, prompts, self._graphs, began, neighbours, running)
        return self._latest

    def warm_up(self) -> None:
        """Load every kernel and capture every batch size, writing to no page but the scratch page."""
        with torch.inference_mode():
            self._load_kernels()
            if not self._captures:
                return
            self._logits = torch.empty(self._buckets[-1], self._spec.vocab, device=self._device)
            found = {rows: self._capture(rows) for rows in sorted(self._buckets, reverse=True)}
        self._steps = {rows: found[rows] for rows in self._buckets}

    def _load_kernels(self) -> None:
        """Run a chunk, a decode row and two that share a prefix, on pages freed before the first capture."""
        assert self._attention is not None, "the engine is closed"
        length = min(WARM_TOKENS, self._spec.max_context - 1)
        pages = tuple(range(pages_for(length + 1, self._page_tokens)))
        shape = self._spec.page_shape(self._page_tokens)
        own = torch.zeros(len(pages) + 1, *shape, dtype=self._attention.shape.dtype, device=self._device)
        attention = self._fresh(own)
        first = Row(pack([0]), length, pages, Sampling(temperature=1.0, seed=1))
        alike = attrs.evolve(first, pages=(*pages[:-1], len(pages)))  # all pages shared but the one it writes
        chunk = Row(pack([0] * length), 0, pages, None)
        # A step that is followed draws from more tokens, with other kernels.
        for plan in (BatchPlan((chunk,)), BatchPlan((first,)), BatchPlan((first, alike), followed=True)):
            draws, _ = self._launch_any(plan, self._tables(plan, 1), attention)
            if draws is not None:
                self._graphs.mark().wait()
                draws.read()

    def timer(self, rows: int, context: int) -> Callable[[Sequence[tuple[int, int]]], tuple[float, int]]:
        """A function that times a step of rows, each (new tokens, earlier tokens): seconds, and 1 thread.

        It reads pages of the pool, whatever they hold, and writes only the scratch page, which all new tokens
        share. Nothing is drawn, because the logits mean nothing. Rows that share pages attend on their own.
        """
        assert rows <= self._buckets[-1] and context <= self._row_pages * self._page_tokens, (rows, context)

        def run(shapes: Sequence[tuple[int, int]]) -> tuple[float, int]:
            plan = BatchPlan(tuple(self._timed_row(number, *shape) for number, shape in enumerate(shapes)))
            began = time.perf_counter()
            self._launch(plan, Sharing(None, None))
            self._graphs.mark().wait()
            seconds, self._ahead = time.perf_counter() - began, None
            return seconds, 1

        return run

    def _timed_row(self, number: int, new: int, before: int) -> Row:
        read = before // self._page_tokens
        pages = [(number * read + i) % self._pages for i in range(read)]
        pages += [self._pages] * (pages_for(before + new, self._page_tokens) - read)
        return Row(timed_tokens(number, new, self._spec.vocab), before, tuple(pages), None)

    def rest(self) -> None:
        """Report to the GPU's other users that this worker is idle; an idle engine launches nothing."""
        if self._shared is not None:
            self._shared.busy(False)

    def close(self) -> None:
        """Let go of the arena and the weights."""
        self._graphs.mark().wait()
        self._steps, self._ahead, self._latest = {}, None, None
        self._attention = self._model = self._logits = None
        self._release()

    def _launch(self, plan: BatchPlan, sharing: Sharing) -> _Launched:
        assert self._attention is not None, "the engine is closed"
        self._loaded.wait()  # host arrays are filled in again
        ahead, self._ahead = self._ahead, None
        bucket = bucket_of(len(plan.rows), tuple(self._steps))
        with torch.inference_mode():
            if bucket is None or any(count(row.tokens) > 1 or row.score is not None for row in plan.rows):
                return self._launch_any(plan, self._tables(plan, sharing.launched), self._attention)
            step = self._steps[bucket]
            # Continuing rows share the same prefix as before, which was too short to attend together.
            if ahead is None or not ahead.holds_for(step, plan.rows, self._page_tokens):
                tables = self._tables(plan, sharing.captured)
                if tables.common is not None:
                    return self._launch_any(plan, tables, self._attention)
                self._load(step, tables.decode, plan.rows)
            return self._launch_captured(plan, step), {}

    def _tables(self, plan: BatchPlan, least_bytes: int | None) -> StepTables:
        """``least_bytes``: K and V of a layer that attending together must save; None: never together."""
        assert self._attention is not None, "the engine is closed"
        if least_bytes is None or not self._attention.merges:
            return StepTables.of(plan, self._page_tokens)
        return StepTables.of(plan, self._page_tokens, -(-least_bytes // self._page_bytes))

    # ---- any mix of rows -------------------------------------------------------------------------------------

    def _launch_any(self, plan: BatchPlan, tables: StepTables, attention: FlashInferAttention) -> _Launched:
        assert self._model is not None, "the engine is closed"
        planned = attention.plan_tables(tables)
        self._loaded = self._graphs.mark()
        # Rows that follow others have one token, so they come first and are where ``order`` says.
        ids = self._filled_in(sent(tables.ids, self._device), [plan.rows[i] for i in tables.order])
        batch = BatchTensors(ids, planned.append.positions, sent(tables.wanted, self._device))
        head = partial(self._model.head, *self._model.layers(batch, planned, attention))
        rows = [(i, plan.rows[i]) for i in tables.order]
        prompts = score_prompts(rows, head, self._device, drawn_together(self._spec.vocab))
        wanted = [i for i, row in rows if row.sample is not None]
        if not wanted:
            return None, prompts
        logits, lines = head(batch.wanted), {number: line for line, number in enumerate(wanted)}
        drawing = {i: plan.rows[i] for i in wanted}
        return launch_draws(drawing, lines, logits, best_of(logits), plan.followed), prompts

    # ---- decode rows alone -----------------------------------------------------------------------------------

    def _capture(self, rows: int) -> _DecodeStep:
        assert self._model is not None and self._attention is not None and self._logits is not None
        arrays = self._attention.captured(rows, self._buckets[-1] * self._row_pages)
        step = _DecodeStep(
            arrays, BatchTensors(arrays.ids, arrays.positions, torch.arange(rows, device=self._device))
        )
        arrays.load(Table.of((), self._page_tokens).padded(rows, self._pages), np.zeros(rows, np.int32))
        model, attention, logits = self._model, self._attention, self._logits[:rows]

        def launch() -> None:
            step.best = best_of(model.forward(step.batch, arrays.plan, attention, logits))

        step.replay = self._graphs.capture(launch)
        return step

    def _launch_captured(self, plan: BatchPlan, step: _DecodeStep) -> Draws | None:
        ids = np.zeros(step.rows, np.int32)
        ids[: len(plan.rows)] = np.frombuffer(b"".join(row.tokens for row in plan.rows), np.int32)
        step.arrays.load_ids(ids)
        self._loaded = self._graphs.mark()
        self._filled_in(step.arrays.ids, plan.rows)
        step.replay()
        assert self._logits is not None and step.best is not None, "a captured step that never ran"
        rows = {i: row for i, row in enumerate(plan.rows) if row.sample is not None}
        draws = None
        if rows:
            draws = launch_draws(rows, {i: i for i in rows}, self._logits, step.best, plan.followed)
        if not plan.followed:
            self._plan_ahead(plan, step)
        return draws

    def _plan_ahead(self, plan: BatchPlan, step: _DecodeStep) -> None:
        """Plan a decode step of the same rows, one token further, if their pages have room for it."""
        if all(len(row.pages) * self._page_tokens > row.end for row in plan.rows):
            rows = [Row(row.tokens, row.end, row.pages, None) for row in plan.rows]
            self._loaded.wait()  # FlashInfer plans in one pinned buffer: it must be read before it is rewritten
            self._load(step, Table.of(rows, self._page_tokens), rows)
            self._ahead = _PlannedStep(step, plan.rows)

    def _filled_in(self, ids: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Fill in the tokens of ``rows`` that follow others, in ``ids``, (tokens,) int32 in the order of ``rows``."""
        follows = {i: row.follows for i, row in enumerate(rows) if row.follows is not None}
        if follows:
            assert self._latest is not None, "rows follow a step that was never launched"
            drawn, places = self._latest.drawn_by(list(follows.values())), list(follows)
            if places == list(range(len(places))):
                ids[: len(places)].copy_(drawn)
            else:
                ids.index_copy_(0, sent(np.array(places), self._device), drawn.to(ids.dtype))
        return ids

    def _load(self, step: _DecodeStep, table: Table, rows: Sequence[Row]) -> None:
        positions = np.zeros(step.rows, np.int32)
        positions[: len(rows)] = [row.start for row in rows]
        step.arrays.load(table.padded(step.rows, self._pages), positions)


def open_engine(
    resolved: Resolved, files: ModelFiles, socket: Path, device: int, neighbours: Cores | None = None
) -> CudaEngine:
    """Attach to the shard's pages and weights on ``cuda:device``; return a warm engine. Blocks for seconds.

    ``neighbours``: the GPU's other users. Raises PeerUnreachable, PeerError, UserError: see
    ``attach_gpu_arena``.
    """
    if files.spec.experts and not hasattr(torch.nn.functional, "grouped_mm"):
        raise UserError(f"experts on a GPU need torch 2.10 or later, not {torch.__version__}")
    where = torch.device("cuda", device)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(where)  # torch and CuPy share the device's primary context
    capability = torch.cuda.get_device_capability(where)
    total = torch.cuda.get_device_properties(where).total_memory
    # torch's allocator does not know of the arena, so it is limited to what was planned for this worker.
    torch.cuda.set_per_process_memory_fraction(min(1.0, resolved.gpu_worker_bytes / total), where)
    shared = attach_gpu_arena(socket, device, resolved.page_bytes, files.weights)
    spec, page_tokens = files.spec, resolved.config.pool.page_tokens
    engine = CudaEngine(
        spec,
        weights_of(shared, files.weights),
        pages_of(shared, spec, page_tokens, getattr(torch, resolved.config.model.dtype)),
        load_flashinfer(capability, spec),
        CudaGraphs(where),
        rows=resolved.config.batch.rows,
        backend=prefill_backend(capability),
        max_context=resolved.max_context,
        release=shared.close,
        shared=neighbours,
        captures=not spec.experts or capability[0] in GROUPED_PRODUCTS,
    )
    engine.warm_up()
    return engine


def pages_of(shared: GpuArena, spec: ModelSpec, page_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """A shard's pages, the scratch page last: (pages + 1, layers, 2, kv_heads, page_tokens, head_dim)."""
    pages = shared.header.pages + SCRATCH_PAGES
    raw = from_dlpack(shared.bytes_at(shared.pages_at, pages * shared.header.page_bytes))
    return raw.view(dtype).view(pages, *spec.page_shape(page_tokens))  # CuPy has no bfloat16, hence bytes


def weights_of(shared: GpuArena, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of the converted ``file``, by name, as views of the shard's copy of it."""
    header, base = read_header(file)
    raw = from_dlpack(shared.bytes_at(shared.weights_at, shared.header.weights_bytes))
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    found = {}
    for name, entry in header.items():
        if not name.startswith("_"):
            begin, end = (base + offset for offset in entry["data_offsets"])
            found[name] = raw[begin:end].view(dtypes[entry["dtype"]]).view(entry["shape"])
    return found


def _attention(library: Library, heads: int, backend: str, arena: torch.Tensor) -> FlashInferAttention:
    return FlashInferAttention(library, arena, heads, backend)
