"""The paper's figure 8 in miniature, on this machine: ``make bench-serving``.

Layouts of the same cores (colocated and disaggregated, caching off and on, the caching modes, the adaptive policy) play the same
sessions of the paper's three workloads at the same rates, in rounds that begin with another layout each time. Every
layout of a round starts afresh and caches nothing of another's; rates follow one another in one cluster, each with
prompts of its own. Beside each run stands what the simulator says of it, with the costs that the cluster's own workers have
measured (bench/prediction.py). Writes docs/measurements/<date>-serving.md, with a plot a
workload where there are several rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

import prediction
from cluster import ROOT, Running, cluster
from loadgen import api
from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, Kind, RunOptions, ServerOptions, WorkloadOptions
from memserve.scheduling.cost_model import CostModel
from notes import Note, number, table

KINDS: tuple[Kind, ...] = ("sharegpt-like", "loogle-like", "react-like")
TWO_BOTH = ("worker.p0.role=both", "worker.d0.role=both")


@attrs.frozen
class Layout:
    """A way to use the same cores: a configuration that comes with memserve, and what is set over it."""

    name: str
    config: str
    settings: tuple[str, ...]
    what: str

    @property
    def path(self) -> str:
        """Of the configuration."""
        return str(ROOT / "configs" / self.config)


LAYOUTS = (
    Layout("colocated", "demo.toml", (*TWO_BOTH, "cache.mode=off", "scheduler.policy=least_load"), "two workers that do both, nothing cached: the paper's PD-colocated"),
    Layout("colocated-cc", "demo.toml", (*TWO_BOTH, "scheduler.policy=least_load"), "the same with context caching: PD-CC"),
    Layout("pd-basic", "2shards.toml", ("cache.mode=off", "scheduler.policy=least_load"), "one prefill and one decode worker on a shard each, nothing cached: PD-Basic"),
    Layout("pd-1", "2shards.toml", ("cache.mode=1", "scheduler.policy=least_load"), "PD-Caching-1"),
    Layout("pd-2", "2shards.toml", ("cache.mode=2", "scheduler.policy=least_load"), "PD-Caching-2"),
    Layout("pd-3", "2shards.toml", ("cache.mode=3", "scheduler.policy=least_load"), "PD-Caching-3"),
    Layout("pd-shared", "demo.toml", ("scheduler.policy=least_load",), "one prefill and one decode worker on one shard: caching, and no byte moved"),
    Layout("cost", "demo.toml", (*TWO_BOTH, "scheduler.policy=cost"), "two workers that may do both, placed by predicted cost"),
)  # fmt: skip
THINK_S = 1.0
"""From an answer to the next turn: in mode 3 an answer's pages come back meanwhile."""
BASE = "colocated"
"""Whom ratios are to, as in the paper's figure 8."""


@attrs.frozen
class Measure:
    """One figure of a run."""

    name: str
    unit: str
    source: str
    quantile: str

    def read(self, figures: dict[str, Any]) -> float | None:
        """The value in a summary's figures; None where no request gave one."""
        found = figures[self.source]
        return float(found[self.quantile]) if found and found["count"] else None


MEASURES = (
    Measure("TTFT mean", "ms", "ttft_ms", "mean"),
    Measure("TTFT p99", "ms", "ttft_ms", "p99"),
    Measure("JCT mean", "ms", "jct_ms", "mean"),
    Measure("JCT p99", "ms", "jct_ms", "p99"),
    Measure("TPOT p99", "ms", "tpot_ms", "p99"),
)


@attrs.frozen
class Sample:
    """One layout under one workload at one rate, once."""

    layout: str
    kind: str
    rate: float
    values: dict[str, float]
    """By measure, and ``requests``, ``failed``, ``cached_share``, ``moved_mib``."""
    fell_behind: bool
    predicted: dict[str, float] = attrs.field(factory=dict)
    """By measure, and ``cached_share``: what the simulator says of the same run."""


# ---- playing -------------------------------------------------------------------------------------------------


def options_of_run(kind: Kind, rate: float, url: str, salt: str, given: argparse.Namespace) -> RunOptions:
    """What is asked: the same for every layout of a round."""
    return RunOptions(
        kind=kind,
        workload=WorkloadOptions(sessions=400, scale=given.scale, answers="own", think_s=THINK_S, salt=salt, seed=given.seed),
        arrivals=ArrivalOptions(rate=rate, per="requests", duration_s=given.seconds, warmup_s=given.seconds / 5),
        server=ServerOptions(url=url, token_ids=True, timeout_s=300),
    )  # fmt: skip


def moved_bytes(running: Running) -> float:
    """KV bytes that have gone from shard to shard, as the shards count them."""
    members = httpx.get(f"{running.url}/cluster").json()["members"]
    return sum(one["load"].get("transfer_in_bytes_total", 0.0) for one in members)


def play(
    running: Running, layout: Layout, kind: Kind, rate: float, salt: str, given: argparse.Namespace
) -> Sample:
    """One run against a started cluster."""
    before, options = moved_bytes(running), options_of_run(kind, rate, running.url, salt, given)
    summary = api.run(options).summary
    figures = summary["figures"]
    values = {one.name: value for one in MEASURES if (value := one.read(figures)) is not None}
    values["requests"] = figures["requests"]
    values["failed"] = figures["requests"] - figures["ok"]
    values["cached_share"] = figures["cached_share"] or 0.0
    values["moved_mib"] = (moved_bytes(running) - before) / 2**20
    words = [*layout.settings, *given.set]
    sites = prediction.sites_of(running.members())
    predicted = prediction.predict(layout.path, words, pages_of(running), costs_of(running), sites, options)
    return Sample(layout.name, kind, rate, values, summary["lag"]["fell_behind"], predicted)


def pages_of(running: Running) -> int:
    """Pages of a shard's device tier; all shards of a layout have as many."""
    shards = [one["load"] for one in running.members() if one["kind"] == "MemPoolShard"]
    return int(shards[0]["pages_total"])


def costs_of(running: Running) -> CostModel:
    """As the cluster's workers measured at their start."""
    return prediction.costs_of(running.members())


def play_layout(layout: Layout, turn: int, given: argparse.Namespace) -> Iterator[Sample]:
    """Every workload at every rate on one layout, with a cluster for each workload."""
    for kind in given.kinds:
        with cluster(layout.config, *layout.settings, *given.set) as running:
            for rate in given.rates:
                yield play(running, layout, kind, rate, f"{turn} {rate}", given)


def measure(layouts: Sequence[Layout], given: argparse.Namespace) -> Iterator[list[Sample]]:
    """All layouts in rounds; after each round everything so far."""
    samples: list[Sample] = []
    for turn in range(given.rounds):
        for layout in (*layouts[turn % len(layouts) :], *layouts[: turn % len(layouts)]):
            print(f"round {turn + 1} of {given.rounds}: {layout.name}", flush=True)
            for sample in play_layout(layout, turn, given):
                shown = ", ".join(f"{name} {number(value)}" for name, value in sample.values.items())
                print(f"  {sample.kind} at {sample.rate:g}/s: {shown}", flush=True)
                samples.append(sample)
        yield samples


# ---- the note ------------------------------------------------------------------------------------------------


def median(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """Over the rounds; None where there is no value."""
    found = [
        one.values[name]
        for one in samples
        if (one.layout, one.kind, one.rate) == (layout, kind, rate) and name in one.values
    ]
    return statistics.median(found) if found else None


def ratio(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """A layout's median over the base's: below 1 is better."""
    value, base = (median(samples, one, kind, rate, name) for one in (layout, BASE))
    return value / base if value is not None and base else None


def cell(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> str:
    """A value, and its ratio to the base."""
    value, times = median(samples, layout, kind, rate, name), ratio(samples, layout, kind, rate, name)
    if value is None:
        return ""
    return f"{number(value)} ({times:.2f})" if times is not None else number(value)


def results(samples: Sequence[Sample], kind: str, rate: float, layouts: Sequence[Layout]) -> str:
    """A row a layout: each measure with its ratio to the base, what was cached and what moved."""
    head = ["", *(f"{one.name}, {one.unit}" for one in MEASURES), "cached", "moved, MiB", "failed"]
    rows = []
    for layout in layouts:
        told = [cell(samples, layout.name, kind, rate, one.name) for one in MEASURES]
        cached, moved, failed = (
            median(samples, layout.name, kind, rate, name) or 0.0
            for name in ("cached_share", "moved_mib", "failed")
        )
        rows.append([layout.name, *told, f"{cached:.0%}", number(moved), f"{failed:.0f}"])
    return table(head, rows)


def predictions(samples: Sequence[Sample], kind: str, rate: float, layouts: Sequence[Layout]) -> str:
    """A row a layout: what the simulator says over what was measured."""
    rows = [
        [layout.name, *(_share(error_of(samples, layout.name, kind, rate, one.name)) for one in MEASURES)]
        for layout in layouts
    ]
    return table(["predicted / measured", *(one.name for one in MEASURES)], rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def error_of(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """Median over the rounds of predicted over measured."""
    found = [
        one.predicted[name] / one.values[name]
        for one in samples
        if (one.layout, one.kind, one.rate) == (layout, kind, rate)
        and name in one.predicted
        and one.values.get(name)
    ]
    return statistics.median(found) if found else None


def errors(samples: Sequence[Sample]) -> str:
    """How far off the predictions are: in absolute terms, and in the ratio to the base that a planner goes by."""
    cells = sorted({(one.layout, one.kind, one.rate) for one in samples})
    told = []
    for one in MEASURES:
        shares = {cell: share for cell in cells if (share := error_of(samples, *cell, one.name)) is not None}
        to_base = [share / shares[BASE, kind, rate] for (layout, kind, rate), share in shares.items()
                   if layout != BASE and (BASE, kind, rate) in shares]  # fmt: skip
        if shares and to_base:
            absolute, relative = (
                statistics.median(abs(share - 1) for share in many) for many in (shares.values(), to_base)
            )
            told.append(f"{one.name} {absolute:.0%} ({relative:.0%})")
    return (
        "Median error of the predictions (in brackets: of their ratio to "
        + f"{BASE}): "
        + ", ".join(told)
        + "."
    )


def draw(samples: Sequence[Sample], kind: str, layouts: Sequence[Layout], path: Path) -> None:
    """Mean TTFT and JCT and the 99th percentile of TPOT against the rate, a line a layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in MEASURES if one.name in ("TTFT mean", "JCT mean", "TPOT p99")]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.5 * len(shown), 4), layout="constrained")
    rates = sorted({one.rate for one in samples})
    for axis, one in zip(axes, shown, strict=True):
        for layout in layouts:
            points = [(rate, median(samples, layout.name, kind, rate, one.name)) for rate in rates]
            known = [(rate, value) for rate, value in points if value is not None]
            axis.plot(
                [rate for rate, _ in known], [value for _, value in known], marker="o", label=layout.name
            )
        axis.set_xlabel("requests a second")
        axis.set_ylabel(f"{one.name}, {one.unit}")
        axis.set_yscale("log")
    axes[-1].legend(fontsize="small")
    figure.suptitle(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def write_note(
    samples: Sequence[Sample], layouts: Sequence[Layout], given: argparse.Namespace, command: str
) -> Path:
    """Write docs/measurements/<date>-serving.md with its plots."""
    note = Note("serving")
    parts = []
    for kind in given.kinds:
        parts.append(f"## {kind}")
        for rate in given.rates:
            parts += [f"{rate:g} requests a second:", results(samples, kind, rate, layouts)]
            parts.append(predictions(samples, kind, rate, layouts))
        if len(given.rates) > 1:
            plot = note.plot(kind)
            draw(samples, kind, layouts, plot)
            parts.append(f"![{kind}]({plot.name})")
    behind = sum(one.fell_behind for one in samples)
    return note.write(
        "Layouts and caching modes under the paper's workloads",
        command,
        f"Every layout has the same cores, and the load generator runs on them too. {given.rounds} interleaved rounds of "
        f"{given.seconds:g} s a rate, the first fifth left out; all lengths times {given.scale:g}; the model's own answers go "
        f"into the next prompts. Medians over the rounds; in brackets the ratio to {BASE}: below 1 is better. The load "
        f"generator fell behind in {behind} of {len(samples)} runs.",
        "\n".join(f"- **{one.name}**: {one.what}." for one in layouts),
        errors(samples),
        *parts,
    )


# ---- the command ---------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[float, ...]:
    """Numbers by comma. Raises ValueError, which argparse reports."""
    return tuple(float(one) for one in text.split(","))


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Ends the program when a name is not known."""
    names = [one.name for one in LAYOUTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rates", type=numbers, default=(0.5, 1.0, 2.0), help="requests a second, by comma")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a run at one rate")
    parser.add_argument("--scale", type=float, default=0.25, help="all lengths of the workloads times this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=list(KINDS), help="workloads, by comma"
    )
    parser.add_argument(
        "--layouts", type=lambda text: text.split(","), default=names, help="only these, by comma"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE over every layout's configuration"
    )
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    given = parser.parse_args(arguments)
    for option, found, known in (("--layouts", given.layouts, names), ("--kinds", given.kinds, KINDS)):
        if unknown := set(found) - set(known):
            parser.error(f"{option}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    return given


def told(arguments: Sequence[str]) -> list[str]:
    """The words that a note repeats: without --json and its path."""
    return [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before != "--json" and not word.startswith("--json")
    ]


def main() -> None:
    """Measure and write the note, after each round, so that a run that is ended early leaves what it has."""
    given = options_of(sys.argv[1:])
    layouts = [one for one in LAYOUTS if one.name in given.layouts]
    words = " ".join(told(sys.argv[1:]))
    command = f'make bench-serving ARGS="{words}"' if words else "make bench-serving"
    try:
        for samples in measure(layouts, given):
            path = write_note(samples, layouts, given, command)
            if given.json:
                given.json.write_text(json.dumps([attrs.asdict(one) for one in samples], indent=1) + "\n")
    except LoadgenError as error:
        sys.exit(f"bench-serving: {error}")
    print(path.read_text())


if __name__ == "__main__":
    main()
