"""When sessions begin: in an open loop at times drawn before the run, or in a closed loop of clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import attrs
import numpy as np

from loadgen.errors import LoadgenError
from loadgen.workload import Session

Kind = Literal["poisson", "constant", "gamma", "trace", "closed"]


@attrs.frozen
class Arrivals:
    """How sessions begin. Open loops do not wait for answers; a closed loop's clients do."""

    kind: Kind
    rate: float = 0.0
    """Sessions a second, for poisson, constant and gamma."""
    burstiness: float = 1.0
    """For gamma: coefficient of variation of the gaps; 1 is poisson, more is burstier, towards 0 constant."""
    clients: int = 0
    """For closed: number of sessions under way at a time."""
    time_factor: float = 1.0
    """For trace: factor on its times; 2 plays it in twice the time, at half the rate."""
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        """Raise LoadgenError for values that cannot be played."""
        if self.kind in ("poisson", "constant", "gamma") and not self.rate > 0:
            raise LoadgenError(f"--rate: must be above 0 for --arrival {self.kind}, not {self.rate}")
        if self.kind == "gamma" and not self.burstiness > 0:
            raise LoadgenError(f"--burstiness: must be above 0, not {self.burstiness}")
        if self.kind == "closed" and self.clients < 1:
            raise LoadgenError(f"--clients: must be 1 or more, not {self.clients}")
        if self.kind == "trace" and not self.time_factor > 0:
            raise LoadgenError(f"--time-factor: must be above 0, not {self.time_factor}")

    def describe(self) -> str:
        """A description in words, for reports."""
        if self.kind == "closed":
            return f"closed loop, {self.clients} client{'s' if self.clients > 1 else ''}"
        if self.kind == "trace":
            return f"at the trace's times x {self.time_factor:g}"
        bursts = f", burstiness {self.burstiness:g}" if self.kind == "gamma" else ""
        return f"{self.kind}, {self.rate:g} sessions/s{bursts}"


def times(arrivals: Arrivals, sessions: Sequence[Session]) -> list[float]:
    """When each session of an open loop begins, in seconds from the run's start, in order.

    In a random process the first session comes after the first gap; a trace's first session begins at 0.
    """
    if arrivals.kind == "trace":
        return _trace_times(arrivals, sessions)
    moments: list[float] = np.cumsum(list(_gaps(arrivals, len(sessions)))).tolist()
    return moments


def _trace_times(arrivals: Arrivals, sessions: Sequence[Session]) -> list[float]:
    known = [one.at_s for one in sessions if one.at_s is not None]
    if len(known) < len(sessions):
        raise LoadgenError("--arrival trace: this workload has no times; use --rate or --clients")
    if sorted(known) != known:
        raise LoadgenError("--arrival trace: the file's times go backwards; sort it by its time field")
    return [(at - known[0]) * arrivals.time_factor for at in known]


def _gaps(arrivals: Arrivals, count: int) -> Iterator[float]:
    rng = np.random.default_rng([arrivals.seed, 1])
    mean = 1 / arrivals.rate
    if arrivals.kind == "constant":
        yield from (mean for _ in range(count))
    elif arrivals.kind == "poisson":
        yield from rng.exponential(mean, count).tolist()
    else:
        # Shape and scale of a gamma distribution with this mean and this coefficient of variation.
        spread = arrivals.burstiness**2
        yield from rng.gamma(1 / spread, mean * spread, count).tolist()
