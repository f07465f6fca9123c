"""Policies and layouts in the simulator. Writes docs/measurements/<date>-simulator.md and plots.

Three parts: the paper's scheduler experiment, a trace on up to a thousand instances, and the adaptive policy
against the best fixed layout at every load. Everything simulated is seeded: the same commit gives the same
figures on any machine. Only placements per second and memory, in the second part, are measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from memserve.messages import Submit
from memserve.scheduling import scheduler
from memserve.scheduling.pricing import Weights
from memserve.sim.layout import Layout, ShardPlan, WorkerPlan, fixed
from memserve.sim.report import Report
from memserve.sim.run import Run, simulate
from memserve.sim.workloads import generated, one_pool_bound, read_trace, shared_documents
from notes import Note, table

SEEDS = (1, 2, 3, 4)
"""Seeds of each cell. A difference smaller than the spread between seeds is not significant."""
POLICIES = ("round_robin", "least_load", "session", "longest_prefix", "cost")


# ---- 1: the paper's scheduler experiment ---------------------------------------------------------------------

SHARES = (1, 2, 3)
SESSIONS = 240
"""Sessions of each run."""
DECODE_PAGES = 7_500
"""Pages of the decode instance's pool."""
PAGES_EACH = 2_500
"""Pages of each prefill instance's pool: 40,000 tokens of KV, about twenty documents."""


def three_prefills(policy: str) -> Layout:
    """Three prefill instances and one decode instance, each with a pool of its own."""
    decodes = WorkerPlan("d0", "decode", "s3")
    return Layout(
        name="3P1D",
        policy=policy,
        shards=(*(ShardPlan(f"s{i}", PAGES_EACH) for i in range(3)), ShardPlan("s3", DECODE_PAGES)),
        workers=(*(WorkerPlan(f"p{i}", "prefill", f"s{i}") for i in range(3)), decodes),
        page_bytes=16 * 820_000,
    )


def scheduler_run(policy: str, share: int, rate: float, seed: int) -> Run:
    """A run of LooGLE-like sessions, ``share`` per document, arriving at ``rate`` sessions per second."""
    sessions = tuple(shared_documents(sessions=SESSIONS, share=share, rate=rate, seed=seed))
    return Run(layout=three_prefills(policy), sessions=sessions, seed=seed)


RATES = (12.0, 20.0)
"""Sessions per second; prefill instances are busy for a third of the time, and for about half of it."""


def scheduler_part(map_runs: Callable[..., list[Report]], note: Note) -> str:
    """The note's first part: TTFT by policy and share ratio, as means over seeds of the runs' percentiles."""
    cases = [
        (policy, share, rate, seed)
        for policy in POLICIES
        for share in SHARES
        for rate in RATES
        for seed in SEEDS
    ]
    found = dict(zip(cases, map_runs([scheduler_run(*one) for one in cases]), strict=True))
    parts = [
        "## The paper's scheduler experiment",
        f"{SESSIONS} LooGLE-like sessions (documents of 1,700 tokens, two to four questions each) on 3P1D: three prefill instances with a pool of "
        f"{PAGES_EACH * 16:,} tokens each and one decode instance with {DECODE_PAGES * 16:,}, all on shards of their own, so that every request moves its pages. "
        f"Links of 100 GB/s (a fourth of an H800's NVLink), one transfer after another on each. Mean over {len(SEEDS)} seeds, of P50 with its standard error; "
        "what is saved is by runs of one seed, with its standard error. The paper's own gain is "
        "59 % of P99 against session at share ratio 3.",
    ]
    for rate in RATES:
        rows, runs_of = [], {}
        for policy in POLICIES:
            by_share = runs_of[policy] = [
                [found[policy, share, rate, seed] for seed in SEEDS] for share in SHARES
            ]
            p50 = [spread([one.ttft_s.p50 * 1e3 for one in runs]) for runs in by_share]
            p99 = [mean(one.ttft_s.p99 for one in runs) for runs in by_share]
            hits = [mean(one.hit_share for one in runs) for runs in by_share]
            cells = zip(p50, p99, hits, strict=True)
            rows.append([policy, *(f"{a}; {b * 1e3:.1f}; {c:.0%}" for a, b, c in cells)])
            plt.plot(SHARES, [one * 1e3 for one in p99], marker="o", label=policy)
        plot = note.plot(f"scheduler-{rate:g}")
        save(plot, "sessions that share a document", "P99 time to first token, ms", xticks=SHARES)
        head = (
            f"{rate:g} sessions/s: P50; P99 of TTFT, ms; hit share",
            *(f"share ratio {one}" for one in SHARES),
        )
        parts += [table(head, rows), gains(runs_of, rate), image(plot)]
    return "\n\n".join(parts)


def gains(runs_of: dict[str, list[list[Report]]], rate: float) -> str:
    """A table of what `cost` saves of the other policies' p50 and p99.

    Runs of the same seed are compared; the standard error over all seeds shows whether the saving exceeds
    chance.
    """
    rows = []
    for other in ("round_robin", "session"):
        cells = []
        for ours, theirs in zip(runs_of["cost"], runs_of[other], strict=True):
            pairs = list(zip(ours, theirs, strict=True))
            cells += [
                saved([1 - one.ttft_s.p50 / two.ttft_s.p50 for one, two in pairs]),
                saved([1 - one.ttft_s.p99 / two.ttft_s.p99 for one, two in pairs]),
            ]
        rows.append([other, *(f"{a}; {b}" for a, b in zip(cells[::2], cells[1::2], strict=True))])
    head = (f"{rate:g} sessions/s: `cost` saves of P50; P99", *(f"share ratio {one}" for one in SHARES))
    return table(head, rows)


def spread(values: Sequence[float]) -> str:
    """A mean with its standard error, as text. Near saturation, one seed's median may be half of another's."""
    return f"{mean(values):.1f} ± {error(values):.1f}"


def saved(shares: Sequence[float]) -> str:
    """A mean share with its standard error, as text."""
    return f"{mean(shares):.0%} ± {error(shares):.0%}"


# ---- 2: a trace on many instances ----------------------------------------------------------------------------

INSTANCES = ((4, 8.0), (16, 32.0), (64, 128.0), (256, 256.0), (1000, 256.0))
"""Numbers of instances, each with the factor by which the trace is sped up."""
TRACE_REQUESTS = 3_000


@attrs.frozen
class Traced:
    """One run of the trace."""

    report: Report
    placements_s: float
    """Placements per second of the scheduler's CPU time."""
    resident: int
    """Peak resident bytes of the whole simulation."""


def traced(run: Run) -> Traced:
    """Simulate a run and time every placement, in a process of its own: peak memory is the process's."""
    plain, spent = scheduler._HANDLERS[Submit], [0.0, 0.0]

    def timed(core: Any, sender: Any, message: Any, now: float) -> None:
        began = time.process_time()
        plain(core, sender, message, now)
        spent[0] += 1
        spent[1] += time.process_time() - began

    scheduler._HANDLERS[Submit] = timed
    found = simulate(run)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Traced(found, spent[0] / spent[1], resident)


def trace_part(trace: Path, jobs: int, note: Note) -> str:
    """The second part of the note: a trace on four to a thousand instances.

    It shows the hit share relative to a single pool's, the balance of the load, and the cost of placement.
    """
    cases = []
    for instances, speed in INSTANCES:
        sessions = tuple(read_trace(trace, block_tokens=16, speed=speed, first=TRACE_REQUESTS))
        for policy in ("cost", "least_load") if instances <= 64 else ("cost",):
            layout = fixed("colocated", instances, pages=30_000 if instances <= 16 else 8_000, policy=policy)
            cases.append((instances, speed, policy, Run(layout=layout, sessions=sessions)))
    found, total = one_pool_bound(sessions, 16)
    bound = found / total
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        results = list(pool.map(traced, [one[3] for one in cases]))
    rows = [
        [str(instances), policy, f"{speed:g}x", f"{one.report.hit_share:.1%}", f"{one.report.hit_share / bound:.0%}",
         f"{one.report.imbalance:.2f}", f"{one.report.ttft_s.p50 * 1e3:.0f}; {one.report.ttft_s.p99 * 1e3:.0f}",
         f"{one.placements_s:,.0f}", f"{one.resident / 2**20:,.0f}", f"{one.report.events:,}"]
        for (instances, speed, policy, _), one in zip(cases, results, strict=True)
    ]  # fmt: skip
    priced = [(one[0], two) for one, two in zip(cases, results, strict=True) if one[2] == "cost"]
    plot_trace(priced, bound, note.plot("trace"))
    head = (
        "instances", "policy", "speed", "hit share", "of one pool's", "imbalance", "TTFT P50; P99, ms", "placements/s",
        "MiB", "events",
    )  # fmt: skip
    text = (
        f"The first {TRACE_REQUESTS:,} requests of `{trace.name}` with blocks of 16 tokens, so 1/32 of its lengths; every instance runs prompts and "
        f"streams on a pool of its own. One pool without limits, one request after another, would find {bound:.1%}. Imbalance: the busiest instance's "
        "time in steps over the mean. Placements a second of the scheduler's CPU time, its index fed by all shards meanwhile; MiB of the whole simulation. The "
        "load of each instance falls beyond 64, and with it what an even spread could be worth."
    )
    return "\n\n".join(("## A trace on many instances", text, table(head, rows), image(note.plot("trace"))))


def plot_trace(priced: Sequence[tuple[int, Traced]], bound: float, path: Path) -> None:
    """Plot hit share relative to one pool's, imbalance, and placements per second against instances."""
    instances = [one for one, _ in priced]
    lines = {
        "hit share / one pool's": [two.report.hit_share / bound for _, two in priced],
        "imbalance": [two.report.imbalance for _, two in priced],
        "placements/s of CPU": [two.placements_s for _, two in priced],
    }
    figure, places = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axes, (label, values) in zip(places, lines.items(), strict=True):
        axes.plot(instances, values, "o-")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("instances")
        axes.set_title(label)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# ---- 3: one adaptive policy against the best fixed layout ----------------------------------------------------

LOADS: dict[str, tuple[float, ...]] = {"sharegpt": (4, 40), "loogle": (10, 100), "react": (6, 60)}
"""Requests per second over four instances; three instances get three quarters of this."""
LAYOUT_SEEDS = (1, 2, 3)
METRICS = ("mean JCT", "P99 JCT", "P99 TPOT", "mean TTFT")
ADAPTIVE = ("colocated", "cost", "3")
FIXED = {
    4: (
        *((kind, "cost", "3") for kind in ("1P3D", "2P2D", "3P1D")),
        ("colocated", "least_load", "3"),
        ("colocated", "least_load", "off"),
        ("2P2D", "least_load", "off"),
    ),
    3: (*((kind, "cost", "3") for kind in ("1P2D", "2P1D")), ("colocated", "least_load", "3")),
}
"""Fixed layouts by number of instances: layout, policy, caching."""
POOL_PAGES = 3_000
"""Pages that each instance adds to the pool that all share: 192,000 tokens for four instances."""


def layout_run(
    instances: int, kind: str, policy: str, caching: str, workload: str, rate: float, seed: int, requests: int
) -> Run:
    """A run of a layout under bursts; instances are up to 20 % off the speed that the scheduler assumes."""
    rate *= instances / 4
    sessions = tuple(generated(workload, rate=rate, requests=requests, seed=seed, burst=3.0))
    layout = fixed(
        kind,
        instances,
        pages=POOL_PAGES,
        shared=True,
        policy=policy,
        caching=caching,
        weights=WEIGHTS,
        page_bytes=16 * 820_000,
    )
    return Run(layout=layout, sessions=sessions, seed=seed, error=0.2, warm=0.1)


WEIGHTS = Weights()


def measures(one: Report) -> tuple[float, ...]:
    """The metrics of a report, in the order of METRICS, in seconds."""
    return one.jct_s.mean, one.jct_s.p99, one.tpot_s.p99, one.ttft_s.mean


def layouts_part(map_runs: Callable[..., list[Report]], note: Note, requests: int) -> str:
    """The third part of the note: the adaptive policy's ratio to the best fixed layout, for each metric."""
    places = [(workload, rate) for workload, rates in LOADS.items() for rate in rates]
    cases = [
        (instances, *kind, *place, seed, requests)
        for instances, kinds in FIXED.items()
        for place in places
        for kind in (ADAPTIVE, *kinds)
        for seed in LAYOUT_SEEDS
    ]
    found = dict(zip(cases, map_runs([layout_run(*one) for one in cases]), strict=True))
    parts = ["## Adaptive against the best fixed layout", layouts_text(requests)]
    for instances, kinds in FIXED.items():
        rows, ratios = [], {}
        for place in places:
            of = {
                kind: [measures(found[instances, *kind, *place, seed, requests]) for seed in LAYOUT_SEEDS]
                for kind in (ADAPTIVE, *kinds)
            }
            cells = [against_best(of, i) for i in range(len(METRICS))]
            ratios[place] = [ratio for ratio, _ in cells]
            rows.append([place[0], f"{place[1] * instances / 4:g}", *(text for _, text in cells)])
        worst = ", ".join(
            f"{name} {max(one[i] for one in ratios.values()):.2f}" for i, name in enumerate(METRICS)
        )
        parts += [
            table((f"workload, {instances} instances", "req/s", *METRICS), rows),
            f"Worst ratios: {worst}.",
        ]
        if instances == 4:
            plot_ratios(ratios, note)
    return "\n\n".join((*parts, image(note.plot("layouts"))))


def layouts_text(requests: int) -> str:
    """The conditions of the third part, in words."""
    return (
        f"Equal instances on one pool of {POOL_PAGES * 16:,} tokens each, {requests} requests a run, bursts of three times the calm rate, every "
        "instance up to 20 % faster or slower than the scheduler assumes, another draw for each seed. *Adaptive*: every instance may prefill and decode, `cost` decides for each "
        "request. *Fixed*: colocated (`least_load`), 1P3D, 2P2D and 3P1D, or 1P2D and 2P1D (`cost` within the roles) with caching, colocated and 2P2D (`least_load`) "
        "without; 1P1D is 2P2D here, for equal instances; prompts are chunked in all of them. Each cell: adaptive / best fixed, by the means over "
        f"{len(LAYOUT_SEEDS)} seeds, ± the standard error of the ratios of one seed (adaptive; which fixed one and its value). The best of several noisy "
        "figures looks better than it is."
    )


def against_best(of: dict[tuple[str, str, str], list[tuple[float, ...]]], i: int) -> tuple[float, str]:
    """Compare metric ``i`` of the adaptive layout with that of the fixed layout whose mean is lowest.

    ``of``: the metrics by layout, a tuple for each seed. The ratio, and the table's cell with it.
    """
    ours = [one[i] for one in of[ADAPTIVE]]
    best = min((kind for kind in of if kind != ADAPTIVE), key=lambda kind: mean(one[i] for one in of[kind]))
    theirs = [one[i] for one in of[best]]
    ratio, noise = mean(ours) / mean(theirs), error([a / b for a, b in zip(ours, theirs, strict=True)])
    value, other = mean(ours) * 1e3, mean(theirs) * 1e3
    return ratio, f"**{ratio:.2f}** ± {noise:.2f} ({value:.1f} ms; {label(best)} {other:.1f})"


def label(kind: tuple[str, str, str]) -> str:
    """A short name of a fixed layout."""
    name, policy, caching = kind
    return " ".join(
        [
            name,
            *([policy] if name != "colocated" and policy == "cost" else []),
            *(["uncached"] if caching == "off" else []),
        ]
    )


def plot_ratios(ratios: dict[tuple[str, float], list[float]], note: Note) -> None:
    """Plot the ratios over workloads and loads, a line per metric."""
    names = [f"{workload}\n{rate:g}/s" for workload, rate in ratios]
    plt.figure(figsize=(8, 4))
    for i, metric in enumerate(METRICS):
        plt.plot(names, [one[i] for one in ratios.values()], marker="o", label=metric)
    plt.axhline(1.0, color="grey", linewidth=1)
    save(note.plot("layouts"), "", "adaptive / best fixed layout")


# ---- the note ------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """Mean of at least one value."""
    found = list(values)
    return math.fsum(found) / len(found)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two values."""
    middle = mean(values)
    return math.sqrt(math.fsum((one - middle) ** 2 for one in values) / (len(values) - 1) / len(values))


def save(path: Path, xlabel: str, ylabel: str, xticks: Sequence[float] = ()) -> None:
    """Label the current plot, write it to ``path`` and close it."""
    plt.xlabel(xlabel)
    plt.ylabel(ylabel)
    if xticks:
        plt.xticks(list(xticks))
    plt.ylim(bottom=0)
    plt.legend()
    plt.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path)
    plt.close()


def image(path: Path) -> str:
    """The Markdown that shows a plot in the note."""
    return f"![{path.stem}]({path.name})"


def main(words: Sequence[str] | None = None) -> None:
    """Run the requested parts and write the note."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trace", type=Path, help="a Mooncake-format trace; without it that part is left out"
    )
    parser.add_argument("--requests", type=int, default=300, help="requests of each run of the last part")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--name", default="simulator", help="of the note")
    asked = parser.parse_args(words)
    note = Note(asked.name)
    with ProcessPoolExecutor(asked.jobs) as pool:

        def map_runs(runs: list[Run]) -> list[Any]:
            return list(pool.map(simulate, runs))

        parts = [scheduler_part(map_runs, note)]
        if asked.trace is not None:
            parts.append(trace_part(asked.trace, asked.jobs, note))
        parts.append(layouts_part(map_runs, note, asked.requests))
    command = f'make bench-sim ARGS="{"--trace " + asked.trace.name if asked.trace else ""}"'
    print(note.write("Policies and layouts in the simulator", command, *parts))


if __name__ == "__main__":
    main()
