"""One run of a cluster on a workload, from its settings to its report."""

from __future__ import annotations

import math
import random

import attrs

from memserve.scheduling.cost_model import CostModel
from memserve.sim.audit import Audit
from memserve.sim.clients import Clients
from memserve.sim.cluster import SimCluster
from memserve.sim.engines import PAPER
from memserve.sim.faults import Faults
from memserve.sim.layout import Layout, Times
from memserve.sim.network import LinkCosts, Network
from memserve.sim.report import Report, report
from memserve.sim.workloads import Session
from memserve.sim.world import World

ENDS_S = 3600.0
"""Seconds after the last arrival by which everything must have ended."""
READY_S = 3.0
"""Seconds by which every session comes later than it says, because the cluster starts first."""


@attrs.frozen(kw_only=True)
class Run:
    """Everything that determines a run."""

    layout: Layout
    sessions: tuple[Session, ...]
    seed: int = 0
    costs: CostModel = PAPER
    times: Times = Times()
    faults: tuple[str, ...] = ()
    error: float = 0.0
    """Each worker's steps take up to this share more or less than by the costs that schedulers are told."""
    checked: bool = False
    """Keep the content of pages and check every core after its turns; otherwise check only at the end."""
    serial: bool = False
    """Play sessions one after another, whatever their times say."""
    warm: float = 0.0
    """Share of requests that the report leaves out, counted from the first."""

    def cluster(self) -> SimCluster:
        """The cluster, not yet started."""
        network = Network(random.Random(f"{self.seed}/network"), LinkCosts())
        cluster = SimCluster(World(network), self.layout, self.costs, self.times, pages_checked=self.checked)
        errors = _errors(self.seed, self.error, [one.name for one in self.layout.workers])
        cluster.noise = {one.name: one.slower * errors[one.name] for one in self.layout.workers}
        return cluster


def _errors(seed: int, error: float, workers: list[str]) -> dict[str, float]:
    rng = random.Random(f"{seed}/error")
    return {name: 1.0 + error * rng.uniform(-1.0, 1.0) for name in workers}


def simulate(run: Run) -> Report:
    """Play a run to its end and summarize it.

    Raises Violation when an invariant does not hold on the way, or when something never ends.
    """
    clients, happened = play(run)
    return report(clients.cluster, clients, run.seed, happened, int(run.warm * len(clients.calls)))


def play(run: Run) -> tuple[Clients, dict[str, int]]:
    """Play a run to its end; returns its clients with all of their calls, and the count of faults by kind."""
    cluster = run.cluster()
    sessions = [attrs.evolve(one, at_s=one.at_s + READY_S) for one in run.sessions]
    clients = Clients(cluster, sessions, run.seed, serial=run.serial)
    audit = Audit(cluster, 16 if run.checked else 0)
    last = max(one.at_s for one in sessions)
    faults = Faults(cluster, random.Random(f"{run.seed}/faults"), run.faults, max(last, 1.0))
    cluster.start()
    if run.faults:
        clients.patience = faults.patience
        faults.arrange()
    audit.finish(clients, math.inf if run.serial else last + ENDS_S)
    return clients, faults.happened
