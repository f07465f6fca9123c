"""The paper's figure 8 in miniature, on this machine: ``make bench-serving``.

Several layouts of the same cores (colocated and disaggregated, caching off and on, the caching modes, the
adaptive policy) serve the same sessions of the paper's three workloads at the same rates. Each round begins
with a different layout. In a round every layout starts with empty caches; the rates of a workload follow one
another on one cluster, each with prompts of its own. Each run is compared with the simulator's prediction,
which uses the costs that the cluster's own workers measured (bench/prediction.py). Writes
docs/measurements/<date>-serving.md, with a plot per workload if there are several rates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import httpx

import prediction
from cluster import Running, cluster
from loadgen import api
from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, Kind, RunOptions, ServerOptions, WorkloadOptions
from notes import commit, merged, number, quoted, save, take_pieces
from serving_note import MEASURES, SAME, Layout, Sample, write_note

KINDS: tuple[Kind, ...] = ("sharegpt-like", "loogle-like", "react-like")
TWO_BOTH = ("worker.p0.role=both", "worker.d0.role=both")


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
"""Seconds between an answer and the next turn; in mode 3 the answer's pages return during this time."""
# ---- playing -------------------------------------------------------------------------------------------------


def options_of_run(kind: Kind, rate: float, url: str, salt: str, given: argparse.Namespace) -> RunOptions:
    """Options of one run of the load generator: the same for every layout of a round."""
    return RunOptions(
        kind=kind,
        workload=WorkloadOptions(sessions=400, scale=given.scale, answers="own", think_s=THINK_S, salt=salt, seed=given.seed),
        arrivals=ArrivalOptions(rate=rate, per="requests", duration_s=given.seconds, warmup_s=given.seconds / 5),
        server=ServerOptions(url=url, token_ids=True, timeout_s=300),
    )  # fmt: skip


def moved_bytes(running: Running) -> float:
    """KV bytes that have moved between shards so far, as the shards count them."""
    members = httpx.get(f"{running.url}/cluster").json()["members"]
    return sum(one["load"].get("transfer_in_bytes_total", 0.0) for one in members)


def play(
    running: Running, layout: Layout, kind: Kind, rate: float, salt: str, given: argparse.Namespace
) -> Sample:
    """Play one workload at one rate against a running cluster."""
    before, options = moved_bytes(running), options_of_run(kind, rate, running.url, salt, given)
    summary = api.run(options).summary
    figures = summary["figures"]
    values = {one.name: value for one in MEASURES if (value := one.read(figures)) is not None}
    values["requests"] = figures["requests"]
    values["failed"] = figures["requests"] - figures["ok"]
    values["cached_share"] = figures["cached_share"] or 0.0
    values["moved_mib"] = (moved_bytes(running) - before) / 2**20
    words = [*layout.settings, *given.set]
    members = running.members()
    predicted = prediction.predict(
        layout.path, words, pages_of(running), prediction.costs_of(members), members, options
    )
    return Sample(layout.name, kind, rate, values, summary["lag"]["fell_behind"], predicted,
                  given.seconds, given.scale, commit())  # fmt: skip


def pages_of(running: Running) -> int:
    """Pages of a shard's device tier; equal for all shards of a layout."""
    shards = [one["load"] for one in running.members() if one["kind"] == "MemPoolShard"]
    return int(shards[0]["pages_total"])


def play_layout(layout: Layout, turn: int, given: argparse.Namespace) -> Iterator[Sample]:
    """Play every workload at every rate on one layout, with a new cluster for each workload."""
    for kind in given.kinds:
        with cluster(layout.config, *layout.settings, *given.set) as running:
            for rate in given.rates:
                yield play(running, layout, kind, rate, f"{turn} {rate}", given)


def measure(layouts: Sequence[Layout], given: argparse.Namespace) -> Iterator[list[Sample]]:
    """Measure all layouts in rounds; after each round, yield all samples so far."""
    samples: list[Sample] = []
    for turn in range(given.rounds):
        for layout in (*layouts[turn % len(layouts) :], *layouts[: turn % len(layouts)]):
            print(f"round {turn + 1} of {given.rounds}: {layout.name}", flush=True)
            for sample in play_layout(layout, turn, given):
                shown = ", ".join(f"{name} {number(value)}" for name, value in sample.values.items())
                print(f"  {sample.kind} at {sample.rate:g}/s: {shown}", flush=True)
                samples.append(sample)
        yield samples


# ---- the command ---------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises ValueError, which argparse reports."""
    return tuple(float(one) for one in text.split(","))


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Ends the program if a layout or workload is unknown."""
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
    take_pieces(parser)
    given = parser.parse_args(arguments)
    for option, found, known in (("--layouts", given.layouts, names), ("--kinds", given.kinds, KINDS)):
        if unknown := set(found) - set(known):
            parser.error(f"{option}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    return given


def main() -> None:
    """Measure, and write the note after each round, so that an interrupted run keeps its results."""
    given = options_of(sys.argv[1:])
    layouts = [one for one in LAYOUTS if one.name in given.layouts]
    try:
        if given.merge:
            print(
                write_note(
                    merged(given.merge, Sample, SAME), LAYOUTS, "make bench-serving, in pieces"
                ).read_text()
            )
            return
        words = " ".join(quoted(sys.argv[1:]))
        command = f'make bench-serving ARGS="{words}"' if words else "make bench-serving"
        for samples in measure(layouts, given):
            if given.json:
                save(samples, given.json)
            else:
                path = write_note(samples, LAYOUTS, command)
    except (LoadgenError, ValueError) as error:
        sys.exit(f"bench-serving: {error}")
    if not given.json:
        print(path.read_text())


if __name__ == "__main__":
    main()
