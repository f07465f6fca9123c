"""The paper's scheduler experiment on a real cluster: ``make bench-policies``.

LooGLE-like sessions, of which one, two or three ask about the same document, on three prefill workers with a pool each and one
decode worker with another (configs/3p1d.toml). Each policy places the same sessions, at the same times, on a cluster that was
started for it; beside each run stands what the simulator says of it, with the costs that the cluster's workers have measured.
Writes docs/measurements/<date>-policies.md with a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import msgspec
import numpy as np
import trio

import prediction
from cluster import ROOT, Running, cluster
from loadgen import workload
from loadgen.arrivals import Arrivals
from loadgen.client import Client
from loadgen.content import Filler
from loadgen.conversation import Style
from loadgen.records import Record
from loadgen.runner import Manner, Player
from memserve import config
from memserve.sim.run import Run, play
from memserve.sim.workloads import Piece, Session, shared_documents
from memserve.simulate import layout_of
from notes import Note, commit, number, table, told

CONFIG = "3p1d.toml"
POLICIES = ("round_robin", "session", "longest_prefix", "cost")
SHARES = (1, 2, 3)
POOLS = ("225MiB", "225MiB", "225MiB", "512MiB")
"""Of the prefill workers' shards and the decode worker's: the former hold about ten documents of 850 tokens each, as the
simulator's and the paper's hold a small part of all, so that it matters what each of them keeps."""
SEED = 1
TIMEOUT_S = 120.0


@attrs.frozen
class Measure:
    """One figure of a cell."""

    name: str
    unit: str

    def read(self, records: Sequence[Record]) -> float:
        """Of records that are all well."""
        if self.name == "JCT mean":
            return statistics.mean(one.jct_ms for one in records)
        if self.name == "cached":
            return sum(one.cached_tokens or 0 for one in records) / sum(
                one.prompt_tokens or 0 for one in records
            )
        times = [one.ttft_ms or one.jct_ms for one in records]
        return float(np.percentile(times, {"TTFT p50": 50, "TTFT p99": 99}[self.name]))


MEASURES = (
    Measure("TTFT p50", "ms"),
    Measure("TTFT p99", "ms"),
    Measure("JCT mean", "ms"),
    Measure("cached", ""),
)


@attrs.frozen
class Sample:
    """One policy at one share ratio, once."""

    policy: str
    share: int
    values: dict[str, float]
    """By measure, and ``requests``, ``failed``."""
    predicted: dict[str, float]
    commit: str = ""


# ---- playing -------------------------------------------------------------------------------------------------


def sessions_of(share: int, given: argparse.Namespace) -> tuple[Session, ...]:
    """What is asked at a share ratio: the simulator's sessions, with all lengths of prompts times the scale."""
    made = shared_documents(sessions=given.sessions, share=share, rate=given.rate, seed=SEED)
    return tuple(
        attrs.evolve(
            one,
            turns=tuple(
                attrs.evolve(turn, pieces=tuple(_scaled(piece, given.scale) for piece in turn.pieces))
                for turn in one.turns
            ),
        )
        for one in made
    )


def _scaled(piece: Piece, scale: float) -> Piece:
    return attrs.evolve(piece, tokens=max(1, round(piece.tokens * scale)))


def asked(one: Session) -> workload.Session:
    """A session as the load generator plays it."""
    turns = tuple(
        workload.Turn(
            (
                workload.Message(
                    "user", tuple(workload.Piece(piece.key, piece.tokens) for piece in turn.pieces)
                ),
            ),
            turn.output,
            think_s=turn.wait_s,
        )
        for turn in one.turns
    )
    return workload.Session(one.id, turns, plain=True, at_s=one.at_s)


async def ask(url: str, sessions: Sequence[Session], seed: int = SEED) -> list[Record]:
    """Play the sessions at their times; a record a request. Another ``seed``: other words in every piece."""
    client = Client(url)
    try:
        model = str((await client.get_json("/v1/models"))["data"][0]["id"])
        # The model's own answers, because those are what is in the caches.
        style = Style("completions", "ids", "own")
        body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        manner = Manner(model, style, body, timeout_s=TIMEOUT_S, keep_answers=True)
        records: list[Record] = []
        player = Player(
            workload.Workload("shared documents", tuple(asked(one) for one in sessions)),
            Arrivals("trace"),
            manner,
            client,
            Filler(seed),
            records.append,
        )
        await player.play()
        return records
    finally:
        await client.aclose()


def settings_of(policy: str, given: argparse.Namespace) -> list[str]:
    """What is set over the configuration."""
    pools = [f"shard.s{i}.memory={memory}" for i, memory in enumerate(POOLS)]
    return [*pools, f"scheduler.policy={policy}", *given.set]


def run_policy(policy: str, share: int, given: argparse.Namespace) -> Sample:
    """One cell, on a cluster of its own."""
    sessions, words = sessions_of(share, given), settings_of(policy, given)
    with cluster(CONFIG, *words) as running:
        trio.run(ask, running.url, sessions[:4], SEED + 1)  # threads started, code paged in
        records = trio.run(ask, running.url, sessions)
        predicted = predict(running, words, sessions)
    well = [one for one in records if one.ok]
    if not well:
        sys.exit(
            f"bench-policies: no request of {policy} was answered: {records[0].error}: {records[0].detail}"
        )
    values = {one.name: one.read(well) for one in MEASURES}
    values |= {"requests": float(len(records)), "failed": float(len(records) - len(well))}
    return Sample(policy, share, values, predicted, commit())


def predict(running: Running, words: Sequence[str], sessions: tuple[Session, ...]) -> dict[str, float]:
    """The same from the simulator, for pools of as many pages as the running cluster's."""
    members = running.members()
    layout = layout_of(CONFIG, config.load(str(ROOT / "configs" / CONFIG), list(words)), None)
    sites = prediction.sites_of(members)
    layout = attrs.evolve(
        layout, workers=tuple(attrs.evolve(one, site=sites.get(one.name)) for one in layout.workers)
    )
    clients, _ = play(Run(layout=layout, sessions=sessions, seed=0, costs=prediction.costs_of(members)))
    calls = [one for one in clients.calls if one.complete]
    times = [(one.first_at - one.asked_at) * 1e3 for one in calls]
    return {
        **prediction.figures(calls),
        "TTFT p50": float(np.percentile(times, 50)),
        "cached": prediction.figures(calls)["cached_share"],
    }


def measure(given: argparse.Namespace) -> Iterator[list[Sample]]:
    """Policies in turn, at one share ratio after the other; after each cell everything so far."""
    samples: list[Sample] = []
    for turn, share in enumerate(given.shares):
        for policy in (*POLICIES[turn % len(POLICIES) :], *POLICIES[: turn % len(POLICIES)]):
            if policy in given.policies:
                sample = run_policy(policy, share, given)
                shown = ", ".join(f"{name} {number(value)}" for name, value in sample.values.items())
                print(f"share ratio {share}, {policy}: {shown}", flush=True)
                samples.append(sample)
                yield samples


# ---- the note ------------------------------------------------------------------------------------------------


def runs_of(samples: Sequence[Sample], policy: str, share: int) -> list[Sample]:
    """All runs of a cell."""
    return [one for one in samples if (one.policy, one.share) == (policy, share)]


def median(runs: Sequence[Sample], name: str) -> float:
    """Of a measure over a cell's runs."""
    return statistics.median(one.values[name] for one in runs)


def results(samples: Sequence[Sample], share: int) -> str:
    """A row a policy: each measure, and in brackets what was predicted over it."""
    head = [
        f"share ratio {share}",
        *(f"{one.name}, {one.unit}".rstrip(", ") for one in MEASURES),
        "runs",
        "failed",
    ]
    rows = []
    for policy in POLICIES:
        if runs := runs_of(samples, policy, share):
            failed = sum(one.values["failed"] for one in runs)
            cells = [cell(runs, measure.name) for measure in MEASURES]
            rows.append([policy, *cells, str(len(runs)), f"{failed:.0f}"])
    return table(head, rows)


def cell(runs: Sequence[Sample], name: str) -> str:
    """The median over the runs and their range, and how the prediction compares to it."""

    def shown(value: float) -> str:
        return f"{value:.0%}" if name == "cached" else number(value)

    values, value = [one.values[name] for one in runs], median(runs, name)
    span = f", {shown(min(values))} to {shown(max(values))}" if min(values) < max(values) else ""
    predicted = [one.predicted[name] for one in runs if name in one.predicted]
    share = f" ({statistics.median(predicted) / value:.2f})" if value and predicted else ""
    return f"{shown(value)}{span}{share}"


def gains(samples: Sequence[Sample], shares: Sequence[int]) -> str:
    """What `cost` saves of the others' times."""
    said = []
    for share in shares:
        ours = runs_of(samples, "cost", share)
        for other in ("round_robin", "session"):
            theirs = runs_of(samples, other, share)
            for name in ("TTFT p50", "TTFT p99"):
                if ours and theirs:
                    saved = 1 - median(ours, name) / median(theirs, name)
                    said.append(
                        f"{saved:.0%} of the {name.split()[1].upper()} against {other} at share ratio {share}"
                    )
    return f"`cost` saves {', '.join(said)}." if said else ""


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Median and 99th percentile of TTFT by share ratio, a line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, name in zip(axes, ("TTFT p50", "TTFT p99"), strict=True):
        for policy in POLICIES:
            shares = sorted({one.share for one in samples if one.policy == policy})
            points = [(share, median(runs_of(samples, policy, share), name)) for share in shares]
            axis.plot(
                [share for share, _ in points], [value for _, value in points], marker="o", label=policy
            )
        axis.set_xlabel("sessions that ask about a document")
        axis.set_ylabel(f"{name}, ms")
        axis.set_xticks(sorted({one.share for one in samples}))
        axis.set_ylim(bottom=0)
    axes[-1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def write_note(samples: Sequence[Sample], given: argparse.Namespace, command: str) -> Path:
    """Write docs/measurements/<date>-policies.md with its plot."""
    note = Note("policies")
    plot = note.plot("ttft")
    draw(samples, plot)
    count, shares = (
        int(max(one.values["requests"] for one in samples)),
        sorted({one.share for one in samples}),
    )
    return note.write(
        "Policies of the scheduler on a real cluster",
        command,
        f"{given.sessions} LooGLE-like sessions of two to four questions, up to {count} requests a run, {given.rate:g} sessions a second, "
        f"prompts' lengths times {given.scale:g} (documents of {round(1700 * given.scale):,} tokens), on 3P1D with pools of {', '.join(POOLS)}: four "
        "workers and the load generator on the same cores. Medians over the runs and their range; the P99 of a run is about its third "
        "slowest request. In brackets predicted over measured: the simulator, with the costs that the cluster's own workers have "
        "measured. The paper's own gain is 59 % of P99 against session at share ratio 3. "
        f"Measured at {', '.join(sorted({one.commit for one in samples}))}.",
        *(results(samples, share) for share in shares),
        gains(samples, shares),
        f"![TTFT by share ratio]({plot.name})",
    )


# ---- the command ---------------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Ends the program when a policy is not known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=72)
    parser.add_argument("--rate", type=float, default=2.0, help="sessions a second")
    parser.add_argument("--scale", type=float, default=0.5, help="lengths of prompts times this")
    parser.add_argument(
        "--shares",
        type=lambda text: [int(one) for one in text.split(",")],
        default=list(SHARES),
        help="share ratios, by comma",
    )
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=list(POLICIES), help="only these, by comma"
    )
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE over the configuration")
    parser.add_argument("--json", type=Path, help="write all samples to this file too")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        help="measure nothing: write the note of these files' samples together",
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.policies) - set(POLICIES):
        parser.error(f"--policies: {', '.join(sorted(unknown))} is not one of {', '.join(POLICIES)}")
    return given


def main() -> None:
    """Measure and write the note, after each cell, so that a run that is ended early leaves what it has."""
    given = options_of(sys.argv[1:])
    if given.merge:
        samples = [
            one for path in given.merge for one in msgspec.json.decode(path.read_bytes(), type=list[Sample])
        ]
        print(write_note(samples, given, "make bench-policies, in pieces").read_text())
        return
    words = " ".join(told(sys.argv[1:]))
    command = f'make bench-policies ARGS="{words}"' if words else "make bench-policies"
    for samples in measure(given):
        path = write_note(samples, given, command)
        if given.json:
            given.json.write_text(json.dumps([attrs.asdict(one) for one in samples], indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
