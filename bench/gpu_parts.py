"""Code shared by the sections of ``bench/gpu.py``: figures, random models in known shapes, GPU ceilings."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import torch

from memserve.drawing import Sampling
from memserve.engine.convert import weight_shapes
from memserve.engine.cuda import CudaEngine, CudaGraphs
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.kernels.flashinfer_kit import load_flashinfer, prefill_backend
from memserve.tokens import pack, pages_for

DEVICE = torch.device("cuda", 0)
GREEDY = Sampling(temperature=0.0)
PAGE_TOKENS = 16
ROUNDS = 5
SHAPES = {"1b": (16, 2048, 8192, 32, 8, 64, 128256), "8b": (32, 4096, 14336, 32, 8, 128, 128256)}
"""Layers, hidden, intermediate, heads, KV heads, head dim and vocabulary of Llama 3.2 1B and Llama 3.1 8B."""
KEPT_FREE = 8 << 30
"""Bytes of GPU memory left for what a step needs in addition to weights and pages."""


@attrs.frozen
class Figure:
    """One row of the table."""

    what: str
    value: float | None
    """The figure; None if it could not be measured, and then ``note`` says why."""
    unit: str
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper bound."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@attrs.frozen
class Ceilings:
    """The measured top speeds of the GPU and its link."""

    copy: float
    """Bytes a second of a copy in GPU memory; a byte counts when it is read and when it is written."""
    matrix: float
    """FLOP a second of a product of bfloat16 matrices, 8192 x 8192."""
    to_device: float
    """Bytes a second from pinned host memory to the GPU; ``to_host`` is the other direction."""
    to_host: float

    @classmethod
    def measure(cls) -> Ceilings:
        """Measure the ceilings; the GPU must be idle."""
        size = 1 << 30
        source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return cls(
            copy=2 * size / device_s(lambda: target.copy_(source)),
            matrix=2 * 8192**3 / device_s(lambda: a @ b),
            to_device=size / device_s(lambda: target.copy_(host, non_blocking=True)),
            to_host=size / device_s(lambda: host.copy_(target, non_blocking=True)),
        )

    def write(self, path: Path) -> None:
        """Write the ceilings for the other sections, which run in separate processes."""
        path.write_text(json.dumps(attrs.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Ceilings | None:
        """Read what :meth:`write` wrote; None if they could not be measured."""
        return cls(**json.loads(path.read_text())) if path.exists() else None


ASSUMED = Ceilings(copy=3.35e12, matrix=990e12, to_device=64e9, to_host=64e9)
"""An H100's, from its data sheet: better than the GPU does, for a run that could not measure them."""
FAILED = "failed: "
"""Begin of the note of a figure whose measurement failed."""


def tried(what: str, unit: str, measure: Callable[..., Figure], *given: Any) -> Figure:
    """The figure ``measure(what, unit, *given)``, or one without a value if that fails: others are still measured."""
    try:
        return measure(what, unit, *given)
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Figure(what, None, unit, note=f"{FAILED}{said[:200]}")


def device_s(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of ``run`` on the device, after one uncounted run."""
    run()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def host_s(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median seconds of a ``run`` that itself waits for the device, after one uncounted run."""
    run()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def spec_of(name: str, **other: Any) -> ModelSpec:
    """The spec of a Llama of one of ``SHAPES``, with the fields in ``other`` replaced."""
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocab = SHAPES[name]
    spec = ModelSpec(
        name=name, architecture="llama", layers=layers, hidden=hidden, intermediate=intermediate, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, vocab=vocab, rope_theta=500_000.0, rms_eps=1e-5, max_context=40960,
        tied_embeddings=name == "1b", bos=None, eos=(0,), chat_template=None,
    )  # fmt: skip
    return attrs.evolve(spec, **other)


def weights_for(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Random weights, made on the GPU; vectors (norms) are ones."""
    return {
        name: torch.ones(shape, device=DEVICE)
        if len(shape) == 1
        else torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(shape[1] ** -0.5)
        for name, shape in weight_shapes(spec).items()
    }


def pages_that_fit(spec: ModelSpec, most: int) -> int:
    """Number of the model's KV pages that the GPU has memory for, at most ``most``."""
    free, _ = torch.cuda.mem_get_info(DEVICE)
    return max(0, min(most, (free - KEPT_FREE) // spec.page_bytes(PAGE_TOKENS, "bfloat16")))


def private_pages(spec: ModelSpec, pages: int) -> torch.Tensor:
    """KV pages private to this process, and the scratch page."""
    return torch.zeros(pages + 1, *spec.page_shape(PAGE_TOKENS), device=DEVICE, dtype=torch.bfloat16)


def engine_on(
    spec: ModelSpec, weights: dict[str, torch.Tensor], pages: torch.Tensor, rows: int, context: int
) -> CudaEngine:
    """A warmed-up engine for steps of at most ``rows`` rows of at most ``context`` tokens."""
    capability = torch.cuda.get_device_capability(DEVICE)
    engine = CudaEngine(
        spec, weights, pages, load_flashinfer(capability, spec), CudaGraphs(DEVICE), rows=rows,
        backend=prefill_backend(capability), max_context=context,
    )  # fmt: skip
    engine.warm_up()
    return engine


def tables_of(batch: int, context: int, common: int = 0) -> list[tuple[int, ...]]:
    """Page tables of ``batch`` rows of ``context`` tokens, with the first ``common`` in shared pages."""
    shared = common // PAGE_TOKENS
    own = pages_for(context, PAGE_TOKENS) - shared
    return [(*range(shared), *range(shared + i * own, shared + (i + 1) * own)) for i in range(batch)]


def decode_s(
    engine: CudaEngine, batch: int, context: int, steps: int = 30, common: int = 0, overlap: bool = True
) -> float:
    """Median seconds of a decode step, host time included; each step advances every row by one token.

    ``common``: tokens of the prefix that all rows share. ``overlap``: whether each step is launched before the
    last one has ended, as workers do for streams without penalties and grammars.
    """
    tables = tables_of(batch, context + steps, common)
    times, running = [time.perf_counter()], None
    for step in range(steps):
        follows = [number if overlap and step else None for number in range(batch)]
        rows = zip(tables, follows, strict=True)
        plan = BatchPlan(
            tuple(Row(pack([0]), context + step, table, GREEDY, follows=row) for table, row in rows),
            followed=overlap and step < steps - 1,
        )
        launched = engine.launch(plan)
        for one in (running,) if overlap else (launched,):
            if one is not None:
                one.result()
                times.append(time.perf_counter())
        running = launched
    if overlap and running is not None:
        running.result()
    return statistics.median([end - begin for begin, end in pairwise(times)][steps // 6 :])


def prompt_rows(
    ids: Sequence[int], pages: tuple[int, ...], chunk: int, cached: int = 0
) -> Iterator[BatchPlan]:
    """Steps of a prompt after its ``cached`` tokens: prefill chunks, the last of which samples a token."""
    for at in range(cached, len(ids), chunk):
        end = min(at + chunk, len(ids))
        yield BatchPlan((Row(pack(list(ids[at:end])), at, pages, GREEDY if end == len(ids) else None),))


def some_ids(length: int, seed: int, vocab: int) -> list[int]:
    """Random token ids, determined by the seed."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
