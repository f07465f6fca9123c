"""Every attention backend and step engine behind one interface, for tests that compare their behaviour."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import fake_flashinfer
import gpu_rehearsal
from memserve.engine.cuda import CudaEngine, CudaGraphs
from memserve.engine.model import BatchTensors, Llama
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import ModelSpec, find_model
from memserve.engine.weights import map_weights, prepare, random_weights, save_weights
from memserve.kernels.flashinfer_kit import (
    FlashInferAttention,
    Library,
    load_flashinfer,
    prefill_backend,
)
from memserve.kernels.flashinfer_ops import FlashInferOps, norms_as
from memserve.kernels.page_tables import StepTables
from memserve.settings.gpus import find_gpus
from memserve.tokens import pack
from test_model import DEMO, GREEDY, Runner, tiny_spec

PROBLEM = None if torch.cuda.is_available() else find_gpus().problem or "torch sees no GPU"
needs_gpu = pytest.mark.skipif(PROBLEM is not None, reason=f"no GPU: {PROBLEM}")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
ON_CARDS = [ON_GPU] if gpu_rehearsal.missing() else [ON_GPU, "rehearsed"]
"""FlashInfer on a GPU, and its kernels on the CPU if they were compiled."""
CARDS = ("cuda", "rehearsed")
"""Backends that compute in bfloat16 only."""

BACKENDS = ["cpu", "stand-in", *ON_CARDS]
"""The CPU's attention, FlashInfer's calls computed by torch, and FlashInfer."""
ENGINES = ["torch", "native", "stand-in", *ON_CARDS]

SPEC = attrs.evolve(tiny_spec(8, 2, 64), hidden=128, intermediate=256, vocab=1024, max_context=2048)
"""A small model with a head size that FlashInfer has kernels for."""


class FlashRunner(Runner):
    """``Runner`` with FlashInfer's attention and ops in place of the CPU's."""

    least: int | None = None
    """Page reads that grouping decode rows must save for them to attend together; None: they never do."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
        page_tokens: int = 16,
        pages: int = 128,
        seed: int = 0,
        library: Any = fake_flashinfer,
        device: str = "cpu",
        backend: str = "fa2",
    ) -> None:
        super().__init__(spec, weights, page_tokens, pages, seed, dtype)
        here = torch.device(device)
        arena = torch.full((pages, *spec.page_shape(page_tokens)), float("nan"), dtype=dtype, device=here)
        placed = {name: tensor.to(here) for name, tensor in norms_as(weights, dtype).items()}
        self.model = Llama(spec, placed, dtype, FlashInferOps(library, spec, dtype, here))
        self.flash = FlashInferAttention(library, arena, spec.heads, backend)

    def step(self, *rows: Row) -> torch.Tensor:
        """Logits of the rows that draw a token, in the order of ``rows``."""
        tables = StepTables.of(BatchPlan(rows), self.page_tokens, self.least)
        device = self.flash.device
        with torch.inference_mode():
            planned = self.flash.plan_tables(tables)
            batch = BatchTensors(
                torch.from_numpy(tables.ids.copy()).to(device),
                planned.append.positions,
                torch.from_numpy(tables.wanted).to(device),
            )
            logits = self.model.forward(batch, planned, self.flash).cpu()
        wanted = [i for i in tables.order if rows[i].sample is not None]
        return logits[[wanted.index(i) for i in sorted(wanted)]]


@attrs.frozen
class Card:
    """A GPU, or the rehearsed device that stands for one."""

    device: torch.device
    library: Library
    graphs: Callable[[torch.device], Any]
    prefill: str
    """FlashInfer's prefill backend on this card."""


def card_of(name: str, spec: ModelSpec) -> Card:
    """One of ``CARDS``, prepared for a model. Skips the test if the model's kernels were not compiled."""
    if name == "rehearsed":
        backend = prefill_backend(gpu_rehearsal.CAPABILITY)
        gpu_rehearsal.needs_compiled(spec, backend)
        device = gpu_rehearsal.machine().device
        return Card(device, gpu_rehearsal.Rehearsed, lambda where: gpu_rehearsal.Graphs(), backend)
    device = torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(device)
    return Card(device, load_flashinfer(capability, spec), CudaGraphs, prefill_backend(capability))


def make_runner(
    backend: str, weights: dict[str, torch.Tensor], page_tokens: int = 16, pages: int = 128
) -> Runner:
    """A model of ``SPEC`` on one of ``BACKENDS``, in float32 if it can be; ``weights`` are in bfloat16."""
    if backend in CARDS:
        card = card_of(backend, SPEC)
        return FlashRunner(
            SPEC, weights, torch.bfloat16, page_tokens, pages, library=card.library,
            device=str(card.device), backend=card.prefill,
        )  # fmt: skip
    exact = {name: tensor.float() for name, tensor in weights.items()}
    make = FlashRunner if backend == "stand-in" else Runner
    return make(SPEC, exact, page_tokens=page_tokens, pages=pages)


@attrs.frozen(eq=False)
class Made:
    """An engine with an arena of its own, which holds NaN wherever nothing was written."""

    engine: Any
    exact: bool
    """Whether the engine computes in float32."""
    pages: Callable[[], torch.Tensor]
    """Copies the contents of the pool's pages to the host."""


def make_engine(name: str, weights: dict[str, torch.Tensor], folder: Path, pages: int, rows: int = 8) -> Made:
    """One of ``ENGINES`` for ``SPEC`` with pages of 16 tokens, not warmed up; ``weights`` in bfloat16."""
    exact = {key: tensor.float() for key, tensor in weights.items()}
    if name in ("torch", "native"):
        dtype = "float32" if name == "torch" else "bfloat16"
        save_weights(exact if name == "torch" else weights, folder / "w")
        memory = mmap.mmap(-1, pages * SPEC.page_bytes(16, dtype))
        memory[:] = b"\xff" * len(memory)  # NaN in either type
        cpu = CpuEngine(SPEC, folder / "w", memory, pages, 16, dtype, threads=2, native=name == "native")
        if name == "native" and not cpu.native:
            pytest.skip("no native step here")
        kind = getattr(torch, dtype)
        return Made(cpu, name == "torch", lambda: torch.frombuffer(bytearray(memory[:]), dtype=kind))
    if name == "stand-in":
        return _cuda(
            exact,
            torch.device("cpu"),
            torch.float32,
            fake_flashinfer,
            fake_flashinfer.Replays(),
            "fa3",
            pages,
            rows,
        )
    card = card_of(name, SPEC)
    return _cuda(
        weights,
        card.device,
        torch.bfloat16,
        card.library,
        card.graphs(card.device),
        card.prefill,
        pages,
        rows,
    )


@pytest.fixture(scope="module")
def weights():
    """The weights of one random model, in bfloat16."""
    return random_weights(SPEC, "bfloat16", 5)


@pytest.fixture(params=ENGINES)
def made(request, weights, tmp_path):
    """Each engine with as many pages as the module's ``PAGES``, warmed up."""
    one = make_engine(request.param, weights, tmp_path, request.module.PAGES)
    one.engine.warm_up()
    yield one
    one.engine.close()


def _cuda(
    weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, library: Library, graphs: Any,
    backend: str, pages: int, rows: int,
) -> Made:  # fmt: skip
    arena = torch.full((pages + 1, *SPEC.page_shape(16)), float("nan"), dtype=dtype, device=device)
    placed = {name: tensor.to(device) for name, tensor in weights.items()}
    engine = CudaEngine(SPEC, placed, arena, library, graphs, rows=rows, backend=backend)
    return Made(engine, dtype == torch.float32, lambda: arena[:-1].cpu())


# ---- whole clusters ------------------------------------------------------------------------------------------------


@attrs.frozen
class Exact:
    """The demo model in float32, as a reference for a GPU's bfloat16."""

    runner: Runner

    @classmethod
    def of_demo(cls) -> Exact:
        """The reference with the weights that clusters serve."""
        return cls.of(find_model(DEMO))

    @classmethod
    def of(cls, model: Path) -> Exact:
        """The reference of any model."""
        files = prepare(model, "float32")
        return cls(Runner(files.spec, map_weights(files.weights)))

    def check(self, start: list[int], answer: list[int]) -> None:
        """Check that each token has the best logit in its context, or one within 1.0 of it (bfloat16)."""
        pages = self.runner.pages(len(start) + len(answer))
        rows = [Row(pack(start), 0, pages, GREEDY)]
        rows += [Row(pack([token]), len(start) + i, pages, GREEDY) for i, token in enumerate(answer[:-1])]
        # One step is enough: every layer stores the keys and values of all rows before any row attends.
        for i, logits in enumerate(self.runner.step(*rows)):
            assert float(logits.max() - logits[answer[i]]) < 1.0, i
