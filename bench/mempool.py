"""Cost of the MemPool's operations: ``make bench-mempool``.

- Index and allocator: the calls that the shard's core makes. Prompts have 2,048 tokens in pages of 16; half
  of each prompt is shared with its family (there are 64), the rest is its own.
- Acquire: called from another process over ipc, for a fully cached prompt.
- Swaps: 128 pages of the demo model between two arenas and a file. For comparison: one copy of the same
  number of bytes (``memcpy``), and one write and one read of them (``the file's own`` speed, through the page
  cache as the pool does).
- With ``--ttft``: time until a prompt is ready, by cached share and tier, compared with computing all of it.
  Cached pages are swapped in as the pool copies them; the engine computes the rest.

Installed peers are measured in the same rounds: see ``bench/index_peers.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import trio

from index_peers import available
from memserve.actors.mempool_shard import ShardSettings, open_shard
from memserve.client import open_pool
from memserve.kernels.page_store import DiskFile, PageStore
from memserve.mempool.addresses import Tier, slot
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.room import Capacity, Room
from memserve.tokens import TOKEN_BYTES

PAGE_TOKENS = 16
PROMPT = 2048
PAGES = PROMPT // PAGE_TOKENS
SHARED = PROMPT // 2
FAMILIES = 64
PAGE_BYTES = 368_640
"""Bytes of one page of SmolLM2-135M in bfloat16."""
SWAP_PAGES = 128

Figures = dict[str, list[float]]


def main() -> None:
    options = _options()
    if options.serve:
        trio.run(_serve, options.serve)
        return
    figures: Figures = {}
    for stored in options.stored:
        _index(stored, options.rounds, figures)
    for _ in range(options.rounds):
        _allocator(figures)
    trio.run(_acquire, options.rounds, figures)
    _swaps(options, figures)
    if options.ttft:
        from mempool_ttft import measure

        measure(options.rounds, figures)
    _report(figures, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stored", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--disk", type=Path, default=Path(tempfile.gettempdir()), help="directory of the disk tier"
    )
    parser.add_argument(
        "--ttft", action="store_true", help="time to first token by cached share; takes minutes"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _note(figures: Figures, name: str, value: float) -> None:
    figures.setdefault(name, []).append(value)


def _each(calls: int, call: Callable[[int], object]) -> Iterator[float]:
    """Make ``calls`` calls; yield the seconds that each takes."""
    clock = time.perf_counter
    for i in range(calls):
        start = clock()
        call(i)
        yield clock() - start


# ---- the index -----------------------------------------------------------------------------------------------


def prompts(n: int) -> list[bytes]:
    """``n`` prompts as packed tokens."""
    rng = random.Random(0)
    shared = [array("i", (rng.randrange(150_000) for _ in range(SHARED))) for _ in range(FAMILIES)]
    pool = array("i", (rng.randrange(150_000) for _ in range(200_000)))
    found = []
    for i in range(n):
        at = rng.randrange(190_000)
        own = array("i", [i % 150_000, i // 150_000]) + pool[at : at + PROMPT - SHARED - 2]
        found.append((shared[i % FAMILIES] + own).tobytes())
    return found


def _store(tree: PromptTree, tokens: bytes, first: int) -> None:
    pin = tree.pin("", tokens)
    at = pin.tokens * TOKEN_BYTES
    tree.insert(pin, tokens[at:], range(first + pin.tokens // PAGE_TOKENS, first + PAGES))
    tree.unpin(pin)


def _index(stored: int, rounds: int, figures: Figures) -> None:
    """Measure match and insert with ``stored`` prompts in the index; peers run in the same rounds."""
    texts = prompts(stored + 200 * rounds)
    tracemalloc.start()
    tree = PromptTree(PAGE_TOKENS)
    for i, tokens in enumerate(texts[:stored]):
        _store(tree, tokens, i * PAGES)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    name = f"{stored:,} prompts"
    _note(figures, f"index bytes a stored token, {name}", used / (tree.pages_total * PAGE_TOKENS))
    peers = [make(texts[:stored], PAGE_TOKENS) for make in available()]
    rng = random.Random(1)
    for number in range(rounds):
        new = texts[stored + 200 * number :][:200]
        _index_round(
            tree, rng.sample(texts[:stored], 400), new, (stored + 200 * number) * PAGES, name, figures
        )
        for peer in peers:
            asked = rng.sample(texts[:stored], 400)
            _note(figures, f"match us, {name}, {peer.name}", _p50(_each(400, peer.matcher(asked))))
            _note(figures, f"insert us, {name}, {peer.name}", _p50(_each(200, peer.inserter(new))))


def _index_round(
    tree: PromptTree, asked: list[bytes], new: list[bytes], first: int, name: str, figures: Figures
) -> None:
    for tokens in asked[:10]:
        assert tree.match("", tokens).tokens == PROMPT
    _note(figures, f"match us, {name}", _p50(_each(400, lambda i: tree.match("", asked[i]))))
    pinned = _p50(_each(400, lambda i: tree.unpin(tree.pin("", asked[i]))))
    _note(figures, f"match pinned and given back us, {name}", pinned)
    inserted = _p50(_each(200, lambda i: _store(tree, new[i], first + i * PAGES)))
    _note(figures, f"insert us, {name}", inserted)


def _p50(seconds: Iterator[float]) -> float:
    return statistics.median(seconds) * 1e6


# ---- the allocator -------------------------------------------------------------------------------------------


def _allocator(figures: Figures) -> None:
    room = Room(Capacity(100_000), PromptTree(PAGE_TOKENS))
    for batch in (1, 16, 64, 256):
        taken: list[list[int]] = []
        calls = 20_000 // batch

        def take(_: int, batch: int = batch, taken: list[list[int]] = taken) -> None:
            slots = room.take(batch)
            assert slots is not None
            taken.append(slots)

        def give(_: int, taken: list[list[int]] = taken) -> None:
            room.give(taken.pop())

        for what, call in (("alloc", take), ("free", give)):
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            _note(
                figures,
                f"{what} us a page, batches of {batch}",
                (time.perf_counter() - start) / calls / batch * 1e6,
            )


# ---- acquire from another process ----------------------------------------------------------------------------


async def _serve(folder: Path) -> None:
    settings = ShardSettings(capacity=Capacity(4096), page_tokens=PAGE_TOKENS, page_bytes=4096)
    async with open_shard("s0", folder, settings) as endpoint:
        print(endpoint, flush=True)
        await trio.sleep_forever()


async def _acquire(rounds: int, figures: Figures) -> None:
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, "--serve", name]
        shard = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
        try:
            assert shard.stdout is not None
            endpoint = (await shard.stdout.receive_some()).decode().strip()
            async with open_pool("bench", Path(name), {"s0": endpoint}) as pool:
                (tokens,) = prompts(1)
                lease = await pool.acquire(tokens, 0, "s0")
                await pool.insert(tokens, lease.addresses)
                await pool.free_mem(lease)
                for _ in range(rounds):
                    seconds = []
                    for _ in range(500):
                        start = time.perf_counter()
                        lease = await pool.acquire(tokens, 1, "s0")
                        seconds.append(time.perf_counter() - start)
                        await pool.free_mem(lease)
                    assert lease.cached_tokens == PROMPT - PAGE_TOKENS
                    cuts = statistics.quantiles(seconds, n=100)
                    _note(figures, "acquire over ipc ms, p50", cuts[49] * 1e3)
                    _note(figures, "acquire over ipc ms, p99", cuts[98] * 1e3)
        finally:
            shard.kill()
            await shard.wait()


# ---- copies between tiers ------------------------------------------------------------------------------------


def _swaps(options: argparse.Namespace, figures: Figures) -> None:
    size = SWAP_PAGES * PAGE_BYTES
    disk = DiskFile.create(options.disk, SWAP_PAGES, PAGE_BYTES)
    raw = DiskFile.create(options.disk, SWAP_PAGES, PAGE_BYTES)
    memory = {tier: memoryview(bytearray(os.urandom(size))) for tier in (Tier.DEVICE, Tier.HOST)}
    store = PageStore(PAGE_BYTES, memory, disk)
    a, b = (np.frombuffer(view, np.uint8) for view in memory.values())
    scattered = list(range(0, SWAP_PAGES, 2)) + list(range(1, SWAP_PAGES, 2))

    def run(source: Tier, target: Tier, order: list[int]) -> tuple[tuple[int, int, int], ...]:
        if order == sorted(order):
            return ((slot(source, 0), slot(target, 0), SWAP_PAGES),)
        return tuple((slot(source, i), slot(target, j), 1) for i, j in enumerate(order))

    whole = list(range(SWAP_PAGES))
    cases: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(b, a)}
    cases["the file's own write"] = lambda: os.pwrite(raw.fd, memory[Tier.DEVICE], 0)
    cases["the file's own read"] = lambda: os.preadv(raw.fd, [memory[Tier.HOST]], 0)
    for name, source, target in (
        ("swap-out to host", Tier.DEVICE, Tier.HOST),
        ("swap-in from host", Tier.HOST, Tier.DEVICE),
        ("swap-out to disk", Tier.DEVICE, Tier.DISK),
        ("swap-in from disk", Tier.DISK, Tier.DEVICE),
    ):
        for how, order in (("one run", whole), ("page by page", scattered)):
            runs = run(source, target, order)
            cases[f"{name}, {how}"] = lambda runs=runs: store.copy(runs)  # type: ignore[misc]
    for _ in range(options.rounds):
        for name, case in cases.items():
            (seconds,) = _each(1, lambda _, case=case: case())  # type: ignore[misc]
            _note(figures, f"{name} GB/s", size / seconds / 1e9)
    disk.close()
    raw.close()


# ---- the report ----------------------------------------------------------------------------------------------

GOALS = {"match us": 15, "insert us": 40, "alloc us a page, batches of 64": 0.2, "free us a page, batches of 64": 0.2,
         "acquire over ipc ms, p50": 0.5}  # fmt: skip
"""Upper limit of each figure, by the beginning of its name."""


def _report(figures: Figures, options: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print(f"{options.rounds} rounds, {platform.machine()}, Python {platform.python_version()}")
    print(f"{'':62}{'median':>10} {'range':>21}")
    for name, values in figures.items():
        share = _share(name, medians)
        ours = "Radix" not in name  # peers are shown for comparison and have no goal
        goal = next((f"goal {most}" for start, most in GOALS.items() if ours and name.startswith(start)), "")
        print(
            f"{name:62}{medians[name]:10.3f} {f'{min(values):.3f} - {max(values):.3f}':>21}  {share or goal}"
        )
    if options.json:
        rows = {name: {"median": medians[name], "min": min(v), "max": max(v)} for name, v in figures.items()}
        options.json.write_text(json.dumps({"python": platform.python_version(), "figures": rows}, indent=1))


def _share(name: str, medians: dict[str, float]) -> str:
    if not name.startswith("swap-"):
        return ""
    disk = "the file's own write GB/s" if "out to disk" in name else "the file's own read GB/s"
    base = disk if "disk" in name else "memcpy GB/s"
    return f"{medians[name] / medians[base]:.0%} of {base.removesuffix(' GB/s')}"


if __name__ == "__main__":
    main()
