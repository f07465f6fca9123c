"""Deadlines under too much load, in the simulator: what is accepted is in time, and as much is accepted as possible."""

from __future__ import annotations

import random

import attrs
import pytest

from memserve.sim.clients import Call
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
