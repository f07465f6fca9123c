"""Placements per second that a GlobalScheduler makes on one core: ``make bench-scheduler``.

It runs the real core with its default policy, and a tree filled by the events of shards. Submits go in;
plans, log lines and everything else come out. There are no sockets. Half of the requests continue a cached
chat, half are new. Heartbeats with changing load come between the rounds and are timed separately. Rates are
per second of CPU time of the one thread. Memory is what the process needs for the tree, per cached page; many
shards hold the same openings.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import attrs

from memserve.costs import Site, StepCosts
from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import Load, Member, Request, Submit
from memserve.pool_messages import IndexDelta, IndexEvent
from memserve.scheduling.pricing import Cost
from memserve.scheduling.scheduler import SchedulerCore
from memserve.tokens import TOKEN_BYTES, count

PAGE_BYTES = 16 * TOKEN_BYTES
OPENING_PAGES, CHAT_PAGES = 16, 48
OPENINGS = 20
COSTS = StepCosts(((1, 0.0113), (300, 0.0113), (600, 0.0218)), 2e-5, 1.2e-7, 2e-9, 512, 819_200)
FRONTEND = ActorId("frontend-0.1")


@attrs.frozen
class Result:
    """Figures for one size."""

    instances: int
    pages: int
    decisions_s: float
    """Placements per second of CPU time in the median round."""
    worst_s: float
    """Placements per second of CPU time in the slowest round."""
    heartbeats_s: float
    events_s: float
    bytes_a_page: float


def main() -> None:
    options = _options()
    results = []
    for instances, pages in _sizes(options):
        result = _alone(instances, pages, options)
        results.append(result)
        print(
            f"{instances:5} instances {result.pages:9,} pages: {result.decisions_s:8,.0f} decisions/s "
            f"(slowest round {result.worst_s:,.0f}), {result.heartbeats_s:8,.0f} heartbeats/s, "
            f"{result.events_s:8,.0f} events/s, {result.bytes_a_page:5.0f} bytes a page",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([attrs.asdict(one) for one in results], indent=1))
    if options.svg:
        _plot(results, options.svg)


def _alone(instances: int, pages: int, options: argparse.Namespace) -> Result:
    """Measure one size in a process of its own, so that the process's memory is that of this size alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, instances, pages, options).result()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", type=int, nargs="+", default=[4, 16, 64, 256, 1000])
    parser.add_argument("--pages", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--a-site", type=int, default=1, help="workers that share a host's cores")
    parser.add_argument("--decisions", type=int, default=1000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--svg", type=Path, help="plot them into this file")
    return parser.parse_args()


def _sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Every number of instances with the most pages, and every number of pages with the most instances."""
    most = max(options.instances), max(options.pages)
    across = [(instances, most[1]) for instances in options.instances]
    return across + [(most[0], pages) for pages in options.pages if pages != most[1]]


def _measure(instances: int, pages: int, options: argparse.Namespace) -> Result:
    rng = random.Random(1)
    me = Member(ActorId("scheduler-0.1"), "GlobalScheduler", "", 1, "ready")
    core = SchedulerCore(me, "cost", Cost())
    members = [_heartbeat(core, number, options.a_site, rng) for number in range(instances)]
    before = _resident()
    began = time.process_time()
    chats = _fill(core, instances, pages, rng)
    filled = time.process_time() - began
    held = sum(core.index.tree.pages.values())
    bytes_a_page = (_resident() - before - sum(len(one) for one in chats)) / held
    gc.freeze()
    rates, heartbeats = [], []
    for number in range(options.rounds):
        submits = [_submit(chats, f"{number}-{i}", rng) for i in range(options.decisions)]
        began = time.process_time()
        for submit in submits:
            core.receive(FRONTEND, submit, 1.0 + number)
            core.take()
        rates.append(options.decisions / (time.process_time() - began))
        began = time.process_time()
        for one in members:
            core.receive(one.id, Load(attrs.evolve(one, load=_load(rng))), 1.5 + number)
        heartbeats.append(instances / (time.process_time() - began))
        core.take()
    gc.unfreeze()
    rates.sort()
    return Result(
        instances,
        held,
        rates[len(rates) // 2],
        rates[0],
        sorted(heartbeats)[len(heartbeats) // 2],
        core.index.events / filled,
        bytes_a_page,
    )


def _heartbeat(core: SchedulerCore, number: int, a_site: int, rng: random.Random) -> Member:
    """Let a shard and its worker join; the worker."""
    shard = Member(ActorId(f"s{number}.1"), "MemPoolShard", "", 1, "ready")
    worker = Member(
        ActorId(f"w{number}.1"),
        "PrefillWorker",
        "",
        1,
        "ready",
        "both",
        shard.id,
        _load(rng),
        COSTS,
        site=Site(f"host-{number // a_site}", 2, 2),
    )
    for one in (shard, worker):
        core.fleet.heard(one, 0.0)
        core.membership.hear(one, 0.0)
    return worker


def _load(rng: random.Random) -> dict[str, float]:
    rows, waiting = rng.randrange(40), rng.choice((0, 0, 0, 1)) * rng.randrange(3000)
    return {
        "waiting_tokens": float(waiting),
        "waiting_pairs": float(waiting * 800),
        "decode_rows": float(rows),
        "context_tokens": rows * 900.0,
        "step_cost_scale": 1.0,
    }


def _fill(core: SchedulerCore, instances: int, pages: int, rng: random.Random) -> list[bytes]:
    """Cache chats on all shards in turn until ``pages`` pages are held; the tokens of each chat.

    Each chat follows one of a few openings, which many shards hold.
    """
    openings = [rng.randbytes(OPENING_PAGES * PAGE_BYTES) for _ in range(OPENINGS)]
    known: list[dict[int, int]] = [{} for _ in range(instances)]
    numbers = [0] * instances
    chats, held = [], 0
    while held < pages:
        shard = len(chats) % instances
        kind = rng.randrange(OPENINGS)
        events = []
        if kind not in known[shard]:
            known[shard][kind] = number = len(known[shard]) * 1_000_000 + 1
            events.append(IndexEvent("stored", number, 0, "anne", openings[kind]))
            held += OPENING_PAGES
        chat = rng.randbytes(CHAT_PAGES * PAGE_BYTES)
        entry = numbers[shard] + len(events) + 1_000_000_000
        events.append(IndexEvent("stored", entry, known[shard][kind], "", chat))
        held += CHAT_PAGES
        core.receive(ActorId(f"s{shard}.1"), IndexDelta(numbers[shard], tuple(events)), 0.0)
        numbers[shard] += len(events)
        chats.append(openings[kind] + chat)
    core.take()
    return chats


def _submit(chats: list[bytes], name: str, rng: random.Random) -> Submit:
    known = rng.choice(chats)
    tokens = known if rng.random() < 0.5 else known[: OPENING_PAGES * PAGE_BYTES]
    tokens += rng.randbytes(rng.randrange(20, 400) * TOKEN_BYTES)
    request = Request(name, 0, FRONTEND, "anne", tokens, count(tokens), 200, (), Sampling())
    return Submit(request)


def _resident() -> int:
    """Resident bytes of this process."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def _plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    most_pages, most = max(one.pages for one in results), max(one.instances for one in results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    across = [one for one in results if one.pages > 0.5 * most_pages]
    left.plot([one.instances for one in across], [one.decisions_s for one in across], "o-")
    left.set_xlabel(f"instances, with {most_pages / 1e6:.1f} million cached pages")
    deep = sorted((one for one in results if one.instances == most), key=lambda one: one.pages)
    right.plot([one.pages for one in deep], [one.decisions_s for one in deep], "o-")
    right.set_xlabel(f"cached pages, with {most} instances")
    left.set_ylabel("placements a second, one core")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
