"""One workload at several rates, numbers of clients, or shares of a shared prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import trio

from loadgen import api, generated, rundir
from loadgen.arrivals import Arrivals
from loadgen.errors import LoadgenError
from loadgen.options import RunOptions
from loadgen.rundir import Run


@attrs.frozen
class Plan:
    """The points of a sweep, each of them a run."""

    axis: str
    """``rate``, ``clients`` or ``share``."""
    points: tuple[RunOptions, ...]


def plan(options: RunOptions, rates: str, clients: str, shares: str, same_salt: bool = False) -> Plan:
    """The runs of a sweep.

    Raises LoadgenError unless exactly one axis is given, with values that fit the options.

    Unless ``same_salt``, every point gets its own salt, so that no point finds an earlier point's prompts in
    a cache. The same sweep has the same salts each time, so that two sweeps can be compared.
    """
    given = {"rate": rates, "clients": clients, "share": shares}
    axes = [name for name, text in given.items() if text]
    if len(axes) != 1:
        raise LoadgenError("sweep: give one of --rates, --clients-list and --shares")
    axis = axes[0]
    values = _numbers(axis, given[axis])
    if axis == "share" and options.kind != "prefix-share":
        raise LoadgenError(f"--shares: belongs to the workload prefix-share, not to {options.kind}")
    if axis != "share" and (options.arrivals.rate is not None or options.arrivals.clients is not None):
        raise LoadgenError("sweep: its points say the rate or the clients; leave --rate and --clients out")
    for value in values:
        _check(axis, value)
    points = [_at(options, axis, value) for value in values]
    if not same_salt:
        points = [_salted(one, f"{options.workload.salt}p{i}") for i, one in enumerate(points, 1)]
    return Plan(axis, tuple(points))


def _numbers(axis: str, text: str) -> list[float]:
    try:
        values = [float(int(one) if axis == "clients" else float(one)) for one in text.split(",")]
    except ValueError:
        values = []
    if not values:
        raise LoadgenError(f"sweep: must be numbers with commas between, such as 1,2,4, not {text!r}")
    return values


def _check(axis: str, value: float) -> None:
    """Raise LoadgenError for a value that cannot be played, before the points in front of it are."""
    if axis == "share":
        generated.prefix_share(1, 1, 1, value)
    elif axis == "clients":
        Arrivals("closed", clients=int(value))
    else:
        Arrivals("poisson", rate=value)


def _at(options: RunOptions, axis: str, value: float) -> RunOptions:
    if axis == "share":
        return attrs.evolve(options, workload=attrs.evolve(options.workload, share=value))
    if axis == "clients":
        return attrs.evolve(options, arrivals=attrs.evolve(options.arrivals, clients=int(value)))
    return attrs.evolve(options, arrivals=attrs.evolve(options.arrivals, rate=value))


def _salted(options: RunOptions, salt: str) -> RunOptions:
    return attrs.evolve(options, workload=attrs.evolve(options.workload, salt=salt))


def play(plan: Plan, directory: Path, pause_s: float = 2.0, quiet: bool = True) -> Iterator[Run]:
    """Play all points one after another, each into its own directory; yields every run as it ends."""
    from loadgen import terminal

    rundir.fresh(directory)
    names: list[str] = []
    for number, options in enumerate(plan.points, 1):
        if names:
            time.sleep(pause_s)
        name = f"point-{number:02}"
        watch = None if quiet else terminal.Live(options, f"point {number} of {len(plan.points)}").watch
        labelled = attrs.evolve(options, measures=attrs.evolve(options.measures, label=_label(plan, options)))
        run = trio.run(_one, labelled, directory / name, watch)
        names.append(name)
        rundir.write_json(directory / rundir.SWEEP, {"format": 1, "axis": plan.axis, "points": names})
        yield run


async def _one(options: RunOptions, directory: Path, watch: api.Watch | None) -> Run:
    return await api.play(options, directory, watch, signals=True)


def _label(plan: Plan, options: RunOptions) -> str:
    value = options.workload.share if plan.axis == "share" else getattr(options.arrivals, plan.axis)
    label = f"{plan.axis} {value:g}"
    return f"{options.measures.label} {label}" if options.measures.label else label
