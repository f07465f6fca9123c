"""The simulator's prediction of a run on a real cluster: the same sessions, layout and step costs.

Used by bench/serving.py and bench/policies.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import msgspec

from loadgen import arrivals, build, workload
from loadgen.errors import LoadgenError
from loadgen.options import RunOptions
from memserve.commands.simulate import layout_of
from memserve.costs import Site, StepCosts
from memserve.identity import actor_name
from memserve.scheduling.cost_model import CostModel
from memserve.settings.configfile import load
from memserve.sim.clients import Call
from memserve.sim.layout import Layout
from memserve.sim.report import Spread, tpot_s
from memserve.sim.run import READY_S, Run, play
from memserve.sim.workloads import Piece, Session, Turn
from memserve.tokens import count


def costs_of(members: Sequence[dict[str, Any]]) -> CostModel:
    """The step costs that a worker of a running cluster has measured. Raises ValueError if none has."""
    for one in members:
        if one.get("costs"):
            return CostModel(msgspec.convert(one["costs"], StepCosts))
    raise ValueError("no worker of the cluster reports what its steps cost")


def sites_of(members: Sequence[dict[str, Any]]) -> dict[str, Site]:
    """The site (shared cores) of each worker of a running cluster, by name.

    Workers that report none are left out; they have cores of their own.
    """
    return {actor_name(one["id"]): msgspec.convert(one["site"], Site) for one in members if one.get("site")}


def as_running(layout: Layout, members: Sequence[dict[str, Any]]) -> Layout:
    """A layout with what a running cluster tells of each worker: its site, and how its steps' costs drifted.

    A worker measures its costs alone at its start. Under load its steps take longer, by what the other
    actors and the load generator take of the cores; the worker watches that for its scheduler.
    """
    sites = sites_of(members)
    drift = {actor_name(one["id"]): one["load"].get("step_cost_scale", 1.0) for one in members}
    workers = [
        attrs.evolve(one, site=sites.get(one.name), slower=drift.get(one.name, 1.0)) for one in layout.workers
    ]
    return attrs.evolve(layout, workers=tuple(workers))


def sessions_of(options: RunOptions) -> tuple[Session, ...]:
    """The sessions that the load generator plays with these options, with answers of the requested lengths.

    Raises LoadgenError for a workload that is not made of generated pieces.
    """
    work = build.workload(options.kind, options.workload)
    begin = arrivals.times(build.arrivals(options.arrivals, work, options.workload.seed), work.sessions)
    ends = options.arrivals.duration_s
    return tuple(
        Session(one.id, at, tuple(_turn(turn) for turn in one.turns))
        for one, at in zip(work.sessions, begin, strict=True)
        if ends is None or at < ends
    )


def _turn(turn: workload.Turn) -> Turn:
    pieces: list[Piece] = []
    for message in turn.messages:
        if isinstance(message.content, str):
            raise LoadgenError(
                "a prediction needs generated content: of recorded texts no length is known here"
            )
        pieces += [Piece(one.key, one.tokens) for one in message.content]
    return Turn(tuple(pieces), turn.output_tokens, turn.think_s, turn.fresh)


def predict(
    name: str,
    settings: Sequence[str],
    pages: int,
    costs: CostModel,
    members: Sequence[dict[str, Any]],
    options: RunOptions,
) -> dict[str, float]:
    """Predicted figures for bench/serving.py's measures, from the requests due in the measured window.

    ``members`` are the running cluster's, after the run. Times are in milliseconds.
    """
    layout = as_running(layout_of(name, load(name, list(settings)), pages), members)
    clients, _ = play(Run(layout=layout, sessions=sessions_of(options), seed=0, costs=costs))
    end = options.arrivals.duration_s or float("inf")
    measured = [
        one
        for one in clients.calls
        if options.arrivals.warmup_s <= one.asked_at - READY_S < end and one.complete
    ]
    return figures(measured)


def figures(calls: Sequence[Call]) -> dict[str, float]:
    """Figures of answered calls, times in milliseconds; empty without calls."""
    if not calls:
        return {}
    ttft = Spread.of([one.first_at - one.asked_at for one in calls])
    jct = Spread.of([one.last_at - one.asked_at for one in calls])
    tpot = Spread.of([tpot_s(one) for one in calls if count(one.answer) > 1])
    return {
        "TTFT mean": ttft.mean * 1e3,
        "TTFT p99": ttft.p99 * 1e3,
        "JCT mean": jct.mean * 1e3,
        "JCT p99": jct.p99 * 1e3,
        "TPOT p99": tpot.p99 * 1e3,
        "cached_share": sum(one.cached_tokens for one in calls) / sum(count(one.prompt) for one in calls),
    }
