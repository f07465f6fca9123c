"""The note and plot of bench/policies.py. Samples come from one run of it or from several (``--json``)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np

from loadgen.records import Record
from notes import Note, number, table

POLICIES = ("round_robin", "session", "longest_prefix", "cost")
POOLS_MIB = (450, 450, 450, 2700)
"""Pool sizes for prompts of full length: of the three prefill workers' shards and of the decode worker's.

Each prefill pool holds about ten documents, a small part of all, as in the simulator and in the paper, so
that it matters which ones it keeps. The decode pool has room for all requests that decode at once, so that
none waits for it.
"""


def pools(scale: float) -> list[int]:
    """MiB of each shard for prompts whose lengths are multiplied by ``scale``."""
    return [round(size * scale) for size in POOLS_MIB]


def _first_token(percentile: float) -> Callable[[Sequence[Record]], float]:
    return lambda records: float(np.percentile([one.ttft_ms or one.jct_ms for one in records], percentile))


def _jct(records: Sequence[Record]) -> float:
    return statistics.mean(one.jct_ms for one in records)


def _cached(records: Sequence[Record]) -> float:
    cached, asked = (
        sum(one.cached_tokens or 0 for one in records),
        sum(one.prompt_tokens or 0 for one in records),
    )
    return cached / asked


@attrs.frozen
class Measure:
    """One figure of a cell."""

    name: str
    unit: str
    read: Callable[[Sequence[Record]], float]
    """The figure from records that all succeeded."""


MEASURES = (
    Measure("TTFT p50", "ms", _first_token(50)),
    Measure("TTFT p99", "ms", _first_token(99)),
    Measure("JCT mean", "ms", _jct),
    Measure("cached", "", _cached),
)


SAME = ("sessions", "rate", "scale", "cores", "costs")
"""Fields that must be equal in all samples of a note."""


@attrs.frozen
class Sample:
    """One run of a policy at a share ratio."""

    policy: str
    share: int
    values: dict[str, float]
    """Measured values, by the measure's name; also ``requests`` and ``failed``."""
    predicted: dict[str, float]
    commit: str = ""
    seed: int = 1
    """Seed from which the sessions were made."""
    sessions: int = 72
    rate: float = 2.0
    """Sessions per second."""
    scale: float = 0.5
    """Factor on all prompt lengths."""
    cores: str | None = None
    """Part of a core for each worker, as given on the command line. None: all workers share all cores."""
    costs: str | None = None
    """Cost table by which steps slept instead of running the model. None: they ran it."""


def runs_of(samples: Sequence[Sample], policy: str, share: int) -> list[Sample]:
    """All runs of a cell."""
    return [one for one in samples if (one.policy, one.share) == (policy, share)]


def median(runs: Sequence[Sample], name: str) -> float:
    """Median of a measure over a cell's runs."""
    return statistics.median(one.values[name] for one in runs)


def results(samples: Sequence[Sample], share: int) -> str:
    """A table with a row per policy: each measure, and in brackets predicted over measured."""
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
    """Median and range over the runs, and the ratio of the prediction to the median."""

    def shown(value: float) -> str:
        return f"{value:.0%}" if name == "cached" else number(value)

    values, value = [one.values[name] for one in runs], median(runs, name)
    span = f", {shown(min(values))} to {shown(max(values))}" if min(values) < max(values) else ""
    predicted = [one.predicted[name] for one in runs if name in one.predicted]
    share = f" ({statistics.median(predicted) / value:.2f})" if value and predicted else ""
    return f"{shown(value)}{span}{share}"


def gains(samples: Sequence[Sample], shares: Sequence[int]) -> str:
    """A table of what `cost` saves of each other policy's TTFT, by share ratio: see :func:`saved`."""
    head = ["`cost` saves of P50; P99", *(f"share ratio {share}" for share in shares)]
    rows = [
        [
            other,
            *(
                "; ".join(saved(samples, other, share, name) for name in ("TTFT p50", "TTFT p99"))
                for share in shares
            ),
        ]
        for other in POLICIES
        if other != "cost" and any(one.policy == other for one in samples)
    ]
    return table(head, rows)


def saved(samples: Sequence[Sample], other: str, share: int, name: str) -> str:
    """By how much a measure is lower with `cost` than with ``other``, as text.

    Runs of the same seed are compared. The result is the mean over seeds, with its standard error if there
    are several; empty if no seed was run with both policies.
    """
    ours, theirs = (
        {one.seed: one.values[name] for one in runs_of(samples, policy, share)} for policy in ("cost", other)
    )
    parts = [1 - ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys()]
    if not parts:
        return ""
    error = f" ± {statistics.stdev(parts) / len(parts) ** 0.5:.0%}" if len(parts) > 1 else ""
    return f"{statistics.mean(parts):.0%}{error}"


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Plot p50 and p99 of TTFT by share ratio, a line per policy."""
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


def whose_cores(of: Sample) -> str:
    """The cores that the workers ran on, in words."""
    if of.costs is not None:
        return f"every process and page as they are, but steps slept for what {Path(of.costs).name} says of them, so that no worker slows another"
    if of.cores is None:
        return "four workers and the load generator on the same cores"
    parts = of.cores.replace("=", " ").replace(",", ", ")
    return f"each worker with a part of a core to itself by a control group ({parts}) and steps of one thread"


def write_note(samples: Sequence[Sample], command: str) -> Path:
    """Write docs/measurements/<date>-policies.md, -policies-apart.md or -policies-slept.md, with its plot."""
    of = samples[0]
    note = Note("policies-slept" if of.costs else "policies-apart" if of.cores else "policies")
    plot = note.plot("ttft")
    draw(samples, plot)
    count, shares = (
        int(max(one.values["requests"] for one in samples)),
        sorted({one.share for one in samples}),
    )
    return note.write(
        "Policies of the scheduler on a real cluster",
        command,
        f"{of.sessions} LooGLE-like sessions of two to four questions, up to {count} requests a run, {of.rate:g} sessions a second, "
        f"prompts' lengths times {of.scale:g} (documents of {round(1700 * of.scale):,} tokens), on 3P1D with pools of "
        f"{', '.join(map(str, pools(of.scale)))} MiB, {whose_cores(of)}. "
        "Medians over the runs and their range; the P99 of a run is about its third slowest request. In brackets predicted over measured: the simulator, with the costs that the cluster's own workers have "
        "measured. The paper's own gain is 59 % of P99 against session at share ratio 3. "
        f"Measured at {', '.join(sorted({one.commit for one in samples}))}.",
        *(results(samples, share) for share in shares),
        gains(samples, shares),
        f"![TTFT by share ratio]({plot.name})",
    )
