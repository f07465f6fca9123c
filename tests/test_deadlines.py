"""Deadlines under too much load, in the simulator: what is accepted is in time, and as much is accepted as possible."""

from __future__ import annotations

import random

import attrs
import pytest

from memserve.sim.clients import Call, Clients
from memserve.sim.cluster import SimCluster
from memserve.sim.layout import Layout, fixed, on_sites
from memserve.sim.run import Run, play
from memserve.sim.workloads import Piece, Session, Turn

WANTED_S = 0.8
COLOCATED = fixed("colocated", 2, pages=8_000, rows=24)


def rushed(rate: float, ttft_s: float | None) -> tuple[Session, ...]:
    """Six seconds of requests that share nothing."""
    rng, at, made = random.Random("rush"), 0.0, []
    while at < 6.0:
        at += rng.expovariate(rate)
        turn = Turn((Piece(f"p{len(made)}", rng.randint(200, 2000)),), rng.randint(20, 120))
        made.append(Session(f"r{len(made)}", at, (turn,), ttft_s=ttft_s))
    return tuple(made)


def shares(calls: list[Call]) -> tuple[float, float]:
    """Of all requests, the shares answered in time and answered late."""
    waits = [one.first_at - one.asked_at for one in calls if one.complete]
    good = sum(one <= WANTED_S for one in waits)
    return good / len(calls), (len(waits) - good) / len(calls)


@pytest.mark.parametrize(
    ("layout", "rate", "least"),
    [
        (COLOCATED, 80.0, 0.40),
        (fixed("1P1D", 2, pages=8_000, rows=24), 60.0, 0.30),
        (on_sites(COLOCATED, 1), 40.0, 0.30),
    ],
    ids=["colocated", "1P1D", "one host"],
)
def test_what_is_let_in_is_in_time(layout: Layout, rate: float, least: float) -> None:
    """Under overload nearly no answer is late, and more are in time than without deadlines."""
    clients, _ = play(Run(layout=layout, sessions=rushed(rate, WANTED_S)))
    good, late = shares(clients.calls)
    without, _ = shares(play(Run(layout=layout, sessions=rushed(rate, None)))[0].calls)
    assert late < 0.03
    assert good > max(least, without)


def test_a_deadline_that_is_far_away_changes_nothing() -> None:
    """Deadlines far in the future change no placement."""
    clients, _ = play(Run(layout=COLOCATED, sessions=rushed(20.0, None)))
    far = tuple(attrs.evolve(one, ttft_s=1e6) for one in rushed(20.0, None))
    others, _ = play(Run(layout=COLOCATED, sessions=far))
    assert [one.prefill for one in clients.calls] == [one.prefill for one in others.calls]


def test_deadlines_are_kept_again_once_a_busy_machine_is_free() -> None:
    """A minute in which steps take five times as long does not have every later request refused.

    Where nothing is accepted, nothing runs, and so nothing can show that steps are fast again.
    """
    run = Run(layout=fixed("colocated", 1, pages=8_000), sessions=())
    cluster, made = run.cluster(), []
    for i in range(400):
        turn = Turn((Piece(f"p{i}", 4000),), 40)
        made.append(Session(f"r{i}", 5.0 + i * 0.5, (turn,), ttft_s=WANTED_S / 2))
    clients = Clients(cluster, made, 0)
    cluster.start()
    cluster.world.at(20.0, slow_down, cluster, 5.0)
    cluster.world.at(80.0, slow_down, cluster, 1.0)
    cluster.world.run(300.0, lambda: clients.done)
    good = [one.complete and one.first_at - one.asked_at <= WANTED_S / 2 for one in clients.calls]
    assert all(good[:30]), "before"
    assert sum(one.complete for one in clients.calls[40:150]) < 12, "what cannot be in time is not accepted"
    assert all(good[200:]), "from half a minute after"


def slow_down(cluster: SimCluster, factor: float) -> None:
    """Let every step take ``factor`` times as long, as beside another program."""
    for worker in cluster.layout.workers:
        cluster.world.actors[worker.name].slowness = factor
