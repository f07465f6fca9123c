"""What an engine's steps cost: measured at a worker's start within a few seconds, and cached on disk.

The cache key covers everything that a measurement depends on: the model's weights, dtype, the engine, its
threads, the machine. Workers of one host measure one after another, so that none takes cores from another;
workers with the same key then find the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs
import msgspec
import structlog

from memserve.costs import StepCosts
from memserve.engine.batching import ALONE
from memserve.scheduling.cost_fit import Rows, Sample, fit_steps
from memserve.tokens import pack

BUDGET_S = 3.0
"""Approximate time limit of a calibration; a slow machine measures fewer sizes."""
PROMPTS_SHARE = 0.5
"""Share of the time limit after which no more prompt chunks are measured. They come first: without them, the table
would end where a step takes as long as reading the weights, and its last line, which is level there, would say
that prompts cost nothing."""
REPEATS = 2
"""Runs of a short step. The one with the most threads counts, and of equals the fastest: noise only ever adds
time."""
SHORT_S = 0.15
"""Seconds up to which a step counts as short and is repeated."""
ROUGH_S = 600.0
"""How long figures stay valid that were measured on fewer cores than requested, or beside other programs.

They spare workers that start soon after one another from measuring one by one. Later ones measure again.
"""
PATIENCE_S = 1.5
"""Total time spent on repeating steps that had too few threads: another worker was starting, or another
program used the cores."""
PATIENCE_STEP_S = 0.02
"""Pause before such a step is repeated."""
SLICED = 2
"""Number of slices of a worker's threads; crowding is measured on one slice."""
SLICED_REPEATS = 4
_SCATTER = 7919
"""A prime: its multiples are spread over the vocabulary."""
VERSION = 5
"""Version of what is measured and how; part of the cache key."""

log = structlog.get_logger()
TimeStep = Callable[[Rows], tuple[float, int]]
"""Runs one step of these rows; seconds, and the threads it had: 0 if other programs used their cores."""


def timed_tokens(row: int, new: int, vocab: int) -> bytes:
    """The ``new`` tokens of a timed step's row with this number: others in each row.

    Rows of equal tokens would run through the same experts, and take less time than a batch of requests.
    """
    return pack([(row + at) * _SCATTER % vocab for at in range(new)])


def patient(run: TimeStep, threads: int, sleep: Callable[[float], None] = time.sleep) -> TimeStep:
    """``run``, except that a step with fewer than ``threads`` is run again, for PATIENCE_S in total.

    A cluster's workers start together: while one measures, another still loads its weights or runs its first
    step.
    """
    waited = 0.0

    def undisturbed(rows: Rows) -> tuple[float, int]:
        nonlocal waited
        seconds, had = run(rows)
        while had < threads and waited < PATIENCE_S:
            sleep(PATIENCE_STEP_S)
            waited += PATIENCE_STEP_S + seconds
            seconds, had = run(rows)
        return seconds, had

    return undisturbed


def cases(chunk_tokens: int, rows: int, context: int) -> list[Rows]:
    """Steps to measure: decode batches, prompt chunks and mixes. ``context``: the longest to measure."""
    streams = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count <= rows]
    most = ALONE * chunk_tokens
    chunks = [tokens for tokens in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if tokens < most]
    far = context - 1
    found: list[Rows] = [((1, before),) * count for count in streams for before in (16, far)]
    found += [((1, far // 4),) * min(8, rows)]
    found += [((tokens, 0),) for tokens in [*chunks, most] if tokens <= context]
    found += [((tokens, context - tokens),) for tokens in (16, 64, min(256, most)) if tokens < context]
    found += [((min(64, chunk_tokens), far // 2 - 64), *((1, far // 4),) * count) for count in streams[1:5]]
    return [one for one in found if all(new + before <= context and before >= 0 for new, before in one)]


def measure(
    run: TimeStep, chunk_tokens: int, rows: int, context: int, token_bytes: int
) -> tuple[StepCosts, int]:
    """Calibrate an engine: its cost figures, and the fewest threads that any step had that counts for them.

    Prompt chunks are measured first, then streams and mixes from both ends of their sizes. What would exceed the
    time budget is left out; costs beyond the largest size are extrapolated linearly.
    """
    began = time.monotonic()
    samples: list[Sample] = []
    fewest = 1 << 30
    per_token = 0.0
    always: list[Rows] = [
        ((1, 16),),
        ((min(16, context), 0),),
    ]  # two sizes make a line, however slow the engine
    others = sorted(cases(chunk_tokens, rows, context), key=lambda one: sum(new for new, _ in one))
    prompts = [one for one in others if len(one) == 1 and one[0][0] > 16]
    others = list(_inwards([one for one in others if one not in prompts]))
    fastest = float("inf")
    for case in always + prompts + others:
        tokens = sum(new for new, _ in case)
        budget = PROMPTS_SHARE * BUDGET_S if case in prompts else BUDGET_S
        left = budget - (time.monotonic() - began)
        if len(samples) >= len(always) and max(fastest, per_token * tokens) > left:
            continue
        best, had = float("inf"), -1
        for _ in range(REPEATS):
            seconds, threads = run(case)
            if (threads, -seconds) > (had, -best):
                best, had = seconds, threads
            if seconds > SHORT_S:
                break
        fewest = min(fewest, had)
        samples.append(Sample(case, best))
        per_token, fastest = best / tokens, min(fastest, best)
    most = max(sum(new for new, _ in one.rows) for one in samples)
    knots = [float(one) for one in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if one < most]
    knots.append(float(most))
    samples *= -(-(len(knots) + 3) // len(samples))  # an engine of few sizes: as many equations as unknowns
    return fit_steps(samples, knots, chunk_tokens, token_bytes), fewest


def _inwards(ordered: list[Rows]) -> Iterator[Rows]:
    """The last, the first, the last but one, and so on: a few of them already span all sizes."""
    for place in range(len(ordered)):
        yield ordered[place // 2] if place % 2 else ordered[-1 - place // 2]


def crowding(costs: StepCosts, whole: TimeStep, sliced: TimeStep, context: int) -> StepCosts | None:
    """``costs`` with crowding figures: ``sliced`` steps, on part of the threads, against ``whole`` ones.

    None where whole steps never had more threads, or other programs disturbed all of a kind. The measurement
    runs alone: two workers that compete for memory bandwidth are slower than it says, which shows in the step
    cost scale that they report.
    """
    tokens = min(costs.chunk_tokens, context)
    decode = _stretch(whole, sliced, ((1, min(300, context - 1)),) * 4)
    prefill = _stretch(whole, sliced, ((tokens, 0),))
    if decode is None or prefill is None:
        return None
    return attrs.evolve(costs, decode_crowding=decode, prefill_crowding=prefill)


def _stretch(whole: TimeStep, sliced: TimeStep, rows: Rows) -> float | None:
    """Relative slowdown of a step per additional slice of its threads.

    None if all runs that nobody disturbed had equally many.
    """
    best: dict[int, float] = {}
    for _ in range(SLICED_REPEATS):  # alternating, so that a disturbance hits both
        for run in (whole, sliced):
            seconds, threads = run(rows)
            if threads:
                best[threads] = min(seconds, best.get(threads, math.inf))
        if sum(best.values()) > 2 * SHORT_S and len(best) > 1:
            break
    if len(best) < 2:
        return None
    most, least = max(best), min(best)
    return max(0.0, best[least] / best[most] - 1.0) / (most / least - 1.0)


def calibrated(
    cache_dir: Path,
    name: dict[str, object],
    measuring: Callable[[], tuple[StepCosts, int]],
    threads: int,
    at_work: Callable[[], StepCosts | None] = lambda: None,
) -> StepCosts:
    """Costs cached under ``name``, or measured now; cached permanently if all ``threads`` were available.

    Otherwise the figures are rough, and cached for ROUGH_S. A machine that is busy while it is measured may be
    idle for later clusters, which would then place requests by figures twice too high.

    ``at_work``: the figures of a similar worker that is running requests, or None. If there are such figures,
    they are used instead of rough ones, at once or after measuring. Next to that worker's streams every step
    takes several times as long. Figures from such steps, of this start or an earlier one, would keep requests
    away from this worker, and it would never get the chance to correct them.
    """
    identity = {"version": VERSION, "machine": machine(), "threads": threads, **name}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / f"costs-{key}.json"
    rough = path.with_suffix(".rough")
    if (costs := _read(path)) is not None:
        return costs
    with _alone(cache_dir):
        known = _read(path) or at_work() or _read(rough, younger_s=ROUGH_S)
        if known is not None:
            return known
        costs, fewest = measuring()
        if fewest < threads:
            if (known := at_work()) is not None:  # that worker began, or went on, while this one measured
                return known
            log.info("step costs are rough", threads=threads, threads_had=fewest)
            costs = attrs.evolve(costs, rough=True)
        try:
            _write(path if fewest >= threads else rough, msgspec.json.encode(costs))
        except OSError as error:  # a full disk must not keep a worker from starting
            log.warning(
                "step costs not saved", reason=str(error), consequence="the next start measures again"
            )
        return costs


def machine() -> str:
    """Identifies the machine of cached figures: architecture, CPU count, CPU model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features"))]
    return f"{platform.machine()} {os.cpu_count()} {' '.join(features)}"


@contextmanager
def _alone(cache_dir: Path) -> Iterator[None]:
    """Hold the lock of those who measure; in a read-only cache, which has none, hold nothing."""
    with ExitStack() as stack:
        with suppress(OSError):
            cache_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(cache_dir / "costs.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path, younger_s: float = math.inf) -> StepCosts | None:
    with suppress(OSError, msgspec.MsgspecError):
        age_s = abs(time.time() - path.stat().st_mtime)  # a clock that was set back makes files of the future
        if age_s <= younger_s:
            return msgspec.json.decode(path.read_bytes(), type=StepCosts)
    return None


def _write(path: Path, data: bytes) -> None:
    """Write the file atomically. Raises OSError, and leaves no part of a file behind."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
