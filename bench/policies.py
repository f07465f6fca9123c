"""The paper's scheduler experiment on a real cluster: ``make bench-policies``.

LooGLE-like sessions, of which one, two or three ask about the same document, run on three prefill workers and
one decode worker, each with a pool of its own (configs/3p1d.toml). Each policy places the same sessions, at
the same times, on a cluster started for it. Each run is compared with the simulator's prediction, which uses
the costs that the cluster's workers measured. Writes docs/measurements/<date>-policies.md with a plot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import attrs
import numpy as np
import trio

import asking
import prediction
from cluster import ROOT, UP, Running, cluster
from loadgen import workload
from loadgen.arrivals import Arrivals
from loadgen.records import Record
from memserve.commands.simulate import layout_of
from memserve.settings.configfile import load
from memserve.sim.run import Run, play
from memserve.sim.workloads import Piece, Session, shared_documents
from notes import commit, merged, number, quoted, save, take_pieces
from policies_note import MEASURES, POLICIES, SAME, Sample, pools, write_note

CONFIG = "3p1d.toml"
SHARES = (1, 2, 3)
MAX_CONTEXT, TOKENS_PER_MIB = 8192, 40
"""Limits of the demo model; its KV takes 22.5 KiB per token."""
WARM_UP_SEED = 0
"""Seed for the words of the warm-up requests; no measured run uses it."""


# ---- playing -------------------------------------------------------------------------------------------------


def sessions_of(share: int, seed: int, given: argparse.Namespace) -> tuple[Session, ...]:
    """The sessions of a share ratio: the simulator's, with all prompt lengths multiplied by the scale."""
    made = shared_documents(sessions=given.sessions, share=share, rate=given.rate, seed=seed)
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


async def ask(url: str, sessions: Sequence[Session], seed: int) -> list[Record]:
    """Play the sessions at their times; a record per request. ``seed`` changes the words of every piece."""
    work = workload.Workload("shared documents", tuple(asked(one) for one in sessions))
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return await asking.ask(url, work, Arrivals("trace"), form="ids", body=body, seed=seed)


def settings_of(policy: str, given: argparse.Namespace) -> list[str]:
    """Settings that override the configuration."""
    sizes = pools(given.scale)
    memory = [f"shard.s{i}.memory={size}MiB" for i, size in enumerate(sizes)]
    context = min(MAX_CONTEXT, min(sizes) * TOKENS_PER_MIB)  # a shard must be able to hold one whole context
    return [*memory, f"model.max_context={context}", f"scheduler.policy={policy}", *given.set]


def run_policy(policy: str, share: int, seed: int, given: argparse.Namespace) -> Sample:
    """Measure one cell on a cluster of its own. Ends the program if no request was answered."""
    sessions, words = sessions_of(share, seed, given), settings_of(policy, given)
    with cluster(CONFIG, *words, up=up(given)) as running:
        trio.run(ask, running.url, sessions[:4], WARM_UP_SEED)  # start threads, page code in
        records = trio.run(ask, running.url, sessions, seed)
        predicted = predict(running, words, sessions)
    well = [one for one in records if one.ok]
    if not well:
        sys.exit(
            f"bench-policies: no request of {policy} was answered: {records[0].error}: {records[0].detail}"
        )
    values = {one.name: one.read(well) for one in MEASURES}
    values |= {"requests": float(len(records)), "failed": float(len(records) - len(well))}
    of = given.sessions, given.rate, given.scale, given.cores, given.costs
    return Sample(policy, share, values, predicted, commit(), seed, *of)


def up(given: argparse.Namespace) -> Sequence[str]:
    """The command that starts a cluster: as shipped, with part of a core per worker, or with slept steps."""
    script = Path(__file__).with_name
    if given.costs is not None:
        return sys.executable, str(script("null_cluster.py")), "up", "--costs", given.costs
    if given.cores is not None:
        return sys.executable, str(script("apart_cluster.py")), "up", "--cores", given.cores
    return UP


def predict(running: Running, words: Sequence[str], sessions: tuple[Session, ...]) -> dict[str, float]:
    """The simulator's figures for the same sessions, pool sizes, sites and costs as the running cluster's."""
    members = running.members()
    layout = layout_of(CONFIG, load(str(ROOT / "configs" / CONFIG), list(words)), None)
    layout = prediction.as_running(layout, members)
    clients, _ = play(Run(layout=layout, sessions=sessions, seed=0, costs=prediction.costs_of(members)))
    calls = [one for one in clients.calls if one.complete]
    times = [(one.first_at - one.asked_at) * 1e3 for one in calls]
    return {
        **prediction.figures(calls),
        "TTFT p50": float(np.percentile(times, 50)),
        "cached": prediction.figures(calls)["cached_share"],
    }


def measure(given: argparse.Namespace) -> Iterator[list[Sample]]:
    """Run all policies for each seed and share ratio; after each cell, yield all samples so far."""
    samples: list[Sample] = []
    for turn, (seed, share) in enumerate(product(given.seeds, given.shares)):
        for policy in (*POLICIES[turn % len(POLICIES) :], *POLICIES[: turn % len(POLICIES)]):
            if policy in given.policies:
                sample = run_policy(policy, share, seed, given)
                shown = ", ".join(f"{name} {number(value)}" for name, value in sample.values.items())
                print(f"seed {seed}, share ratio {share}, {policy}: {shown}", flush=True)
                samples.append(sample)
                yield samples


# ---- the command ---------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """Integers separated by commas."""
    return [int(one) for one in text.split(",")]


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Ends the program if a policy is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=72)
    parser.add_argument("--rate", type=float, default=2.0, help="sessions a second")
    parser.add_argument("--scale", type=float, default=0.5, help="lengths of prompts times this")
    parser.add_argument("--shares", type=numbers, default=list(SHARES), help="share ratios, by comma")
    parser.add_argument("--seeds", type=numbers, default=[1], help="of the sessions, a run each, by comma")
    parser.add_argument(
        "--policies", type=lambda text: text.split(","), default=list(POLICIES), help="only these, by comma"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--cores",
        help="of CPU for each worker as on a machine of its own: p0=0.25,...; unset: all share all",
    )
    where.add_argument(
        "--costs", help="steps take what this table says, asleep, as on machines of their own; unset: run"
    )
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE over the configuration")
    take_pieces(parser)
    given = parser.parse_args(arguments)
    if given.costs is not None and not Path(given.costs).is_file():
        parser.error(f"--costs: there is no file {given.costs}")
    if unknown := set(given.policies) - set(POLICIES):
        parser.error(f"--policies: {', '.join(sorted(unknown))} is not one of {', '.join(POLICIES)}")
    return given


def main() -> None:
    """Measure, and write the note after each cell, so that an interrupted run keeps its results."""
    given = options_of(sys.argv[1:])
    if given.merge:
        try:
            samples = merged(given.merge, Sample, SAME)
        except ValueError as error:
            sys.exit(f"bench-policies: {error}")
        print(write_note(samples, "make bench-policies, in pieces").read_text())
        return
    words = " ".join(quoted(sys.argv[1:]))
    command = f'make bench-policies ARGS="{words}"' if words else "make bench-policies"
    for samples in measure(given):
        if given.json:
            save(samples, given.json)
        else:
            path = write_note(samples, command)
    if not given.json:
        print(path.read_text())


if __name__ == "__main__":
    main()
