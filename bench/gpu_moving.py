"""Sections of ``bench/gpu.py`` about where pages are: shared or private, handed over, in host memory, cached.

The section's own process acts as the shard. Workers are separate processes, which open the shard's pages by
CUDA IPC as real workers do.
"""

from __future__ import annotations

import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import msgspec
import torch
import trio
import zmq

from gpu_parts import (
    GREEDY,
    PAGE_TOKENS,
    Ceilings,
    Figure,
    decode_s,
    engine_on,
    host_s,
    private_pages,
    prompt_rows,
    some_ids,
    spec_of,
    tried,
    weights_for,
)
from memserve.engine.cuda import pages_of, weights_of
from memserve.engine.plans import BatchPlan, Row, StepEngine
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import random_weights, save_weights
from memserve.identity import ActorId
from memserve.kernels.arena import serve_packet
from memserve.kernels.gpu_memory import GpuArena, attach_gpu_arena
from memserve.kernels.gpu_store import open_gpu_store
from memserve.kernels.page_store import Run
from memserve.mempool.addresses import Tier, slot
from memserve.settings.gpu_room import SCRATCH_PAGES
from memserve.tokens import pack, pages_for

SHARD = ActorId("g0.00000001")
HANDED = (1024, 2048, 4096, 8192, 16384, 32768)
"""Context lengths of the measured handoffs, in tokens."""
HAND_OVERS = 20
"""Handoffs of each length."""
HANDED_OVER_FIGURES = "handed-over.jsonl"
WAIT_MS = 60_000
"""Longest wait for the other worker's message: that worker may still be starting."""
SHARED = (64, 2048)
"""Rows and context tokens of the step that is timed on shared and on private pages."""
RUNS = (1, 4, 16, 64, 256)
"""Lengths of the runs of consecutive pages that are swapped."""
SWAPPED = 1 << 30
"""Largest size of one swap, in bytes."""
PROMPT, CHUNK = 4096, 2048
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)

HANDED_OVER = spec_of("1b", layers=4, vocab=8192)
"""Model of the handoffs, with four layers: a handoff moves page numbers, whatever the pages hold."""


def _some_weights(folder: Path, spec: ModelSpec) -> Path:
    """Write random weights in the form that a shard loads; returns the file."""
    path = folder / "weights"
    save_weights(random_weights(spec, "bfloat16", 1), path)
    return path


def _small_weights(folder: Path) -> Path:
    """Write a tiny file of weights, for an arena of which only the pages are used."""
    return _some_weights(
        folder, spec_of("1b", layers=1, hidden=64, intermediate=64, heads=1, kv_heads=1, vocab=64)
    )


def _shard(folder: Path, spec: ModelSpec, pages: int, weights: Path) -> GpuArena:
    return GpuArena.create(SHARD, 0, pages, spec.page_bytes(PAGE_TOKENS, "bfloat16"), weights)


async def _with_workers(arena: GpuArena, folder: Path, roles: Sequence[str]) -> list[str]:
    """Serve the arena to worker processes of these roles; return the last line that each prints."""
    script, place = str(Path(__file__).with_name("gpu.py")), folder / "arena.sock"
    printed = [""] * len(roles)

    async def play(number: int, role: str) -> None:
        command = [sys.executable, script, "--worker", role, "--folder", str(folder)]
        done = await trio.run_process(command, stdout=subprocess.PIPE, capture_stdout=False)
        printed[number] = done.stdout.decode().strip().rpartition("\n")[2]

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, arena.header.encode(), (), place)
        async with trio.open_nursery() as workers:
            for number, role in enumerate(roles):
                workers.start_soon(play, number, role)
        nursery.cancel_scope.cancel()
    return printed


def _attach(folder: Path, spec: ModelSpec) -> GpuArena:
    page_bytes = spec.page_bytes(PAGE_TOKENS, "bfloat16")
    return attach_gpu_arena(folder / "arena.sock", 0, page_bytes, folder / "weights")


# ---- shared and private pages ------------------------------------------------------------------------------


def shared(roof: Ceilings) -> Iterator[Figure]:
    """One decode step on another process's pages, and on private pages."""
    spec = spec_of("1b")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows, context = SHARED
        arena = _shard(folder, spec, rows * pages_for(context + 30, PAGE_TOKENS), _small_weights(folder))
        (said,) = trio.run(_with_workers, arena, folder, ["shared"])
        arena.close()
    ours, theirs = msgspec.json.decode(said, type=tuple[float, float])
    yield Figure(
        f"1b decode step on pages shared by CUDA IPC, {rows} rows of {context} tokens", ours / theirs,
        "of the speed on private pages", note=f"{theirs * 1e3:.2f} ms shared, {ours * 1e3:.2f} ms private",
    )  # fmt: skip


def shared_worker(folder: Path) -> str:
    """Time the step on both kinds of pages in turn; return JSON: seconds on private and on shared pages."""
    spec = spec_of("1b")
    attached, weights = _attach(folder, spec), weights_for(spec)
    rows, context = SHARED
    theirs = pages_of(attached, spec, PAGE_TOKENS, torch.bfloat16)
    theirs.zero_()
    ours = private_pages(spec, attached.header.pages)
    engines = [engine_on(spec, weights, pages, rows, context + 30) for pages in (ours, theirs)]
    times: list[list[float]] = [[], []]
    for _ in range(5):
        for found, engine in zip(times, engines, strict=True):
            found.append(decode_s(engine, rows, context))
    return msgspec.json.encode([statistics.median(found) for found in times]).decode()


# ---- handoff -----------------------------------------------------------------------------------------------


@attrs.frozen
class Handed:
    """Message of the prefill worker: a request, and when its last step had ended."""

    context: int
    token: int
    pages: tuple[int, ...]
    sent_s: float


@attrs.frozen
class Taken:
    """Message of the decode worker: when the next step was planned, how long it took, and its token."""

    planned_s: float
    step_s: float
    token: int


def hand_over(
    engine: StepEngine, other: zmq.Socket[bytes], contexts: Sequence[int], vocab: int
) -> Iterator[Figure]:
    """Be the prefill worker: run prompts, and hand each to the other worker ``HAND_OVERS`` times.

    Times come from the clock that all processes of a machine share. The page numbers are sent after the
    step's ``run`` has returned, so its kernels have ended.
    """
    for context in contexts:
        pages = tuple(range(pages_for(context + 1, PAGE_TOKENS)))
        plans = list(prompt_rows(some_ids(context, context, vocab), pages, CHUNK))
        for plan in plans:
            engine.run(plan)
        times, paces, same = [], [], 0
        for _ in range(HAND_OVERS):
            (token,) = engine.run(plans[-1]).tokens
            assert token is not None
            sent = time.perf_counter()
            other.send(msgspec.msgpack.encode(Handed(context, token, pages, sent)))
            taken = msgspec.msgpack.decode(other.recv(), type=Taken)
            times.append(taken.planned_s - sent)
            paces.append(taken.step_s)
            same += engine.run(_next(context, token, pages)).tokens == (taken.token,)
        yield Figure(
            f"handoff of {context} tokens, {len(pages)} pages", statistics.median(times) * 1e3, "ms", 1.0, True,
            f"longest {max(times) * 1e3:.2f} ms; first step after it {statistics.median(paces) * 1e3:.2f} ms; "
            f"next token the same as without it in {same} of {HAND_OVERS}",
        )  # fmt: skip
    other.send(b"")


def take_over(engine: StepEngine, other: zmq.Socket[bytes]) -> None:
    """Be the decode worker: run the next step of every request handed over, until an empty message."""
    while packet := other.recv():
        handed = msgspec.msgpack.decode(packet, type=Handed)
        plan = _next(handed.context, handed.token, handed.pages)
        planned = time.perf_counter()
        (token,) = engine.run(plan).tokens
        assert token is not None
        other.send(msgspec.msgpack.encode(Taken(planned, time.perf_counter() - planned, token)))


def _next(context: int, token: int, pages: tuple[int, ...]) -> BatchPlan:
    return BatchPlan((Row(pack([token]), context, pages, GREEDY),))


def handoff(roof: Ceilings) -> Iterator[Figure]:
    """Handoffs from one worker process to another on the same GPU, by context length."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pages = pages_for(max(HANDED) + 1, PAGE_TOKENS)
        arena = _shard(folder, HANDED_OVER, pages, _some_weights(folder, HANDED_OVER))
        problem: Exception | None = None
        try:
            trio.run(_with_workers, arena, folder, ["prefill", "decode"])
        except Exception as error:
            problem = error
        if (found := folder / HANDED_OVER_FIGURES).exists():
            yield from (msgspec.json.decode(line, type=Figure) for line in found.read_bytes().splitlines())
        arena.close()
    if problem is not None:
        raise problem


def handoff_worker(folder: Path, gives: bool) -> str:
    """Be one of the two workers. The one that ``gives`` writes the figures to the folder, each at once."""
    attached = _attach(folder, HANDED_OVER)
    pages = pages_of(attached, HANDED_OVER, PAGE_TOKENS, torch.bfloat16)
    weights = weights_of(attached, folder / "weights")
    engine = engine_on(HANDED_OVER, weights, pages, 1, max(HANDED) + 1)
    with zmq.Context() as context, context.socket(zmq.PAIR) as other:
        other.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        other.setsockopt(zmq.LINGER, 1000)
        address = f"ipc://{folder}/workers"
        other.bind(address) if gives else other.connect(address)
        if gives:
            with (folder / HANDED_OVER_FIGURES).open("wb", buffering=0) as out:
                for figure in hand_over(engine, other, HANDED, HANDED_OVER.vocab):
                    out.write(msgspec.json.encode(figure) + b"\n")
        else:
            take_over(engine, other)
    engine.close()
    return ""


WORKERS: dict[str, Callable[[Path], str]] = {
    "shared": shared_worker,
    "prefill": partial(handoff_worker, gives=True),
    "decode": partial(handoff_worker, gives=False),
}


# ---- the host's memory -------------------------------------------------------------------------------------


def swap(roof: Ceilings) -> Iterator[Figure]:
    """Swaps between the GPU and the pinned host tier, by run length, relative to the link's bandwidth."""
    for name in ("1b", "8b"):
        spec = spec_of(name)
        page_bytes = spec.page_bytes(PAGE_TOKENS, "bfloat16")
        pages = SWAPPED // page_bytes
        with tempfile.TemporaryDirectory() as place:
            arena = _shard(Path(place), spec, pages, _small_weights(Path(place)))
            store = open_gpu_store(arena, memoryview(mmap.mmap(-1, pages * page_bytes)), None)
            for run in (one for one in RUNS if one <= pages):
                for up, link in ((False, roof.to_host), (True, roof.to_device)):
                    way = "in from" if up else "out to"
                    what = f"{name} swap {way} the host, {run} pages of {page_bytes >> 10} KiB in a row"
                    moves = swap_runs(pages, run, up)
                    nbytes = pages // run * run * page_bytes
                    yield tried(what, "of the link's bandwidth", _swapped, store, moves, nbytes, link)
            store.close()
            arena.close()


def _swapped(what: str, unit: str, store: Any, moves: Sequence[Run], nbytes: int, link: float) -> Figure:
    rate = nbytes / host_s(partial(store.copy, moves))
    return Figure(what, rate / link, unit, note=f"{rate / 1e9:.1f} GB/s")


def swap_runs(pages: int, run: int, up: bool) -> list[tuple[int, int, int]]:
    """As many runs of ``run`` pages as fit into ``pages``; none continues another on both sides.

    Runs that did would be joined into one copy.
    """
    firsts = range(0, pages // run * run, run)
    backwards = reversed(firsts)
    device = [slot(Tier.DEVICE, first) for first in firsts]
    host = [slot(Tier.HOST, first) for first in backwards]
    pairs = zip(host, device, strict=True) if up else zip(device, host, strict=True)
    return [(source, target, run) for source, target in pairs]


# ---- cached prefixes ---------------------------------------------------------------------------------------


def ttft(name: str, roof: Ceilings) -> Iterator[Figure]:
    """Time to a prompt's first token, by the cached share of the prompt and its tier: figure 13 of the paper.

    The time covers the copy into the arena and the prefill chunks for the rest. HTTP and scheduling, which
    are the same in all cases, are left out.
    """
    spec = spec_of(name)
    pages = pages_for(PROMPT, PAGE_TOKENS)
    with tempfile.TemporaryDirectory() as place:
        arena = _shard(Path(place), spec, pages, _small_weights(Path(place)))
        store = open_gpu_store(arena, memoryview(mmap.mmap(-1, pages * arena.header.page_bytes)), None)
        engine = engine_on(
            spec, weights_for(spec), pages_of(arena, spec, PAGE_TOKENS, torch.bfloat16), 1, PROMPT
        )
        yield from first_tokens(engine, store, spec, pages)
        engine.close()
        store.close()
        arena.close()


def first_tokens(engine: StepEngine, store: Any, spec: ModelSpec, pages: int) -> Iterator[Figure]:
    """The figures of an engine on the pages of a store."""
    ids, table = some_ids(PROMPT, 3, spec.vocab), tuple(range(pages))

    def first(cached: int, tier: Tier) -> None:
        if tier is not Tier.DEVICE:
            assert not store.copy([(slot(tier, 0), slot(Tier.DEVICE, 0), cached // PAGE_TOKENS)])
        for plan in prompt_rows(ids, table, CHUNK, cached):
            engine.run(plan)

    whole = host_s(partial(first, 0, Tier.DEVICE))
    yield Figure(f"{spec.name} first token, {PROMPT} tokens computed", whole * 1e3, "ms")
    assert not store.copy([(slot(Tier.DEVICE, 0), slot(Tier.HOST, 0), pages)])
    for tier in (Tier.DEVICE, Tier.HOST):
        for share in SHARES:
            cached = min(int(PROMPT * share), PROMPT - 1) // PAGE_TOKENS * PAGE_TOKENS
            took = host_s(partial(first, cached, tier))
            where = "the GPU" if tier is Tier.DEVICE else "the host"
            yield Figure(
                f"{spec.name} first token, {share:.0%} of {PROMPT} tokens cached on {where}", took * 1e3, "ms",
                note=f"{took / whole:.2f} of computing all",
            )  # fmt: skip


assert SCRATCH_PAGES == 1, "private_pages makes one"
