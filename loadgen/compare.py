"""Runs of one workload side by side: ratios to the first, with confidence intervals by bootstrap.

Sessions are resampled, not requests: the turns of a session depend on each other. All runs use the same
resampled sessions, since all were asked the same; that removes the workload's own variance from the ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import attrs
import numpy as np
from numpy.typing import NDArray

from loadgen import measures
from loadgen.errors import LoadgenError
from loadgen.measures import LATENCIES, Window
from loadgen.records import Record
from loadgen.rundir import Run

Floats = NDArray[np.float64]

REPLICATES = 1000
REPLICATES_MIN = 40
"""With fewer, none lies outside an interval of 95 % on either side."""
CELLS_MAX = 20_000_000
"""Maximum of values times replicates: beyond it there are fewer replicates, but at least 100."""
PART_CELLS_MAX = 4_000_000
"""Maximum of values times replicates in memory at once, 8 bytes each, in a few copies."""
CONFIDENCE = 0.95
SLICES = 20
"""Number of slices of a run's window, over which rates are resampled."""


@attrs.frozen
class Interval:
    """A ratio and its 95 % confidence interval."""

    ratio: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 1 lies outside the interval."""
        return not self.low <= 1 <= self.high


@attrs.frozen
class Row:
    """One figure, for all runs."""

    name: str
    unit: str
    values: tuple[float | None, ...]
    ratios: tuple[Interval | None, ...]
    """Ratios of all runs but the first to the first."""


@attrs.frozen
class Sample:
    """Values, each with the number of its session; the methods weight each session."""

    values: Floats
    sessions: NDArray[np.int64]

    def mean(self, weights: Floats) -> Floats:
        """The mean for each replicate, float64 [replicates]; ``weights`` are [replicates, sessions]."""
        each = weights[:, self.sessions]
        return np.asarray((each @ self.values) / np.maximum(each.sum(axis=1), 1e-12))

    def percentile(self, weights: Floats, percent: float) -> Floats:
        """The smallest value with at least ``percent`` of the weight at or below it, float64 [replicates]."""
        order = np.argsort(self.values)
        below = np.cumsum(weights[:, self.sessions[order]], axis=1)
        wanted = below[:, -1:] * (percent / 100)
        at = np.minimum((below < wanted - 1e-9).sum(axis=1), len(order) - 1)
        return np.asarray(self.values[order][at])


def _percentile(percent: float, sample: Sample, weights: Floats) -> Floats:
    return sample.percentile(weights, percent)


Statistic = Callable[[Sample, Floats], Floats]
STATISTICS: Mapping[str, Statistic] = {
    "mean": Sample.mean,
    **{f"p{percent}": partial(_percentile, percent) for percent in measures.PERCENTILES},
}


def comparable(runs: Sequence[Run]) -> None:
    """Raise LoadgenError if runs were not asked the same; it names what differs, and both values."""
    first = runs[0]
    for other in runs[1:]:
        ours, theirs = first.summary["identity"], other.summary["identity"]
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            differences = "; ".join(
                f"{name}: {ours.get(name)} and {theirs.get(name)}" for name in sorted(differing)
            )
            raise LoadgenError(
                f"{first.label} and {other.label} are runs of different workloads, and their ratio would mean "
                f"nothing. They differ in {differences}"
            )


def compare(runs: Sequence[Run], replicates: int = REPLICATES) -> list[Row]:
    """All figures of runs of one workload, with ratios to the first run.

    Raises LoadgenError for fewer than two runs, or for different workloads.
    """
    if len(runs) < 2:
        raise LoadgenError("compare: needs two runs or more")
    comparable(runs)
    windows = [Window(one.summary["window"]["start_s"], one.summary["window"]["end_s"]) for one in runs]
    measured = [
        [record for record in run.records if window.has(record.due_s)]
        for run, window in zip(runs, windows, strict=True)
    ]
    rows = [row for measure in LATENCIES for row in _latency_rows(measure, measured, replicates)]
    rows += [_share_row("cached share", measured, _cached, replicates)]
    rows += [_share_row("requests answered", measured, _answered, replicates)]
    if slos := runs[0].summary["figures"]["goodput"]["slos_ms"]:
        rows += [
            _share_row(
                "requests within SLOs",
                measured,
                lambda one: (measures.kept_slos(one, slos), 1.0),
                replicates,
            )
        ]
    pairs = list(zip(runs, windows, strict=True))
    return [*rows, _rate_row("output tokens", "1/s", pairs, _tokens, replicates),
            _rate_row("requests", "1/s", pairs, _requests, replicates)]  # fmt: skip


# ---- latencies -----------------------------------------------------------------------------------------------


def _numbers(runs: Sequence[Sequence[Record]]) -> dict[str, int]:
    """A number for every session that occurs in any run."""
    names = dict.fromkeys(record.session for records in runs for record in records)
    return {name: i for i, name in enumerate(names)}


def sample(records: Sequence[Record], measure: str, numbers: Mapping[str, int]) -> Sample:
    """The values of a latency with their sessions."""
    found: list[float] = []
    sessions: list[int] = []
    for record in records:
        values = measures.values([record], measure)
        found += values
        sessions += [numbers[record.session]] * len(values)
    return Sample(np.asarray(found, float), np.asarray(sessions, np.int64))


def _latency_rows(measure: str, runs: Sequence[Sequence[Record]], replicates: int) -> list[Row]:
    numbers = _numbers(runs)
    samples = [sample(records, measure, numbers) for records in runs]
    if not all(len(one.values) for one in samples):
        return []
    size = max(len(one.values) for one in samples)
    weights = draws(len(numbers), min(replicates, max(100, CELLS_MAX // size)))
    rows = []
    for name, statistic in STATISTICS.items():
        points = [_point(one.values, name) for one in samples]
        replicas = [_in_parts(statistic, one, weights) for one in samples]
        ratios = [
            interval(points[0], one, replicas[0], many)
            for one, many in zip(points[1:], replicas[1:], strict=True)
        ]
        rows.append(Row(f"{measures.NAMES[measure]} {name}", "ms", tuple(points), tuple(ratios)))
    return rows


def _in_parts(statistic: Statistic, sample: Sample, weights: Floats) -> Floats:
    """A statistic of all replicates, a few at a time: all values times replicates may not fit into memory."""
    parts = -(-len(weights) * len(sample.values) // PART_CELLS_MAX)
    return np.concatenate([statistic(sample, part) for part in np.array_split(weights, parts)])


def _point(values: Floats, name: str) -> float:
    return float(values.mean()) if name == "mean" else float(np.percentile(values, float(name[1:])))


def draws(clusters: int, replicates: int, stream: int = 0) -> Floats:
    """How often each cluster is drawn with replacement, float64 [replicates, clusters].

    Always the same for one ``stream``; those of different ones are independent.
    """
    if not clusters:
        return np.zeros((replicates, 0))
    rng = np.random.default_rng([stream, 4])
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), replicates).astype(float)


def interval(base: float, other: float, bases: Floats, others: Floats) -> Interval | None:
    """The ratio and its percentile interval; None if the base is 0."""
    usable = bases > 0
    if not base > 0 or not usable.any():
        return None
    low, high = np.quantile(others[usable] / bases[usable], ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(other / base, float(low), float(high))


# ---- shares and rates ----------------------------------------------------------------------------------------

Part = Callable[[Record], tuple[float, float]]
"""What a request adds to a share: to the numerator and to the denominator."""


def _cached(record: Record) -> tuple[float, float]:
    if record.cached_tokens is None:
        return 0.0, 0.0
    return float(record.cached_tokens), float(record.prompt_tokens or 0)


def _answered(record: Record) -> tuple[float, float]:
    return float(record.ok), 1.0


def _share_row(name: str, runs: Sequence[Sequence[Record]], part: Part, replicates: int) -> Row:
    numbers = _numbers(runs)
    sums = np.zeros((len(runs), 2, len(numbers)))
    for i, records in enumerate(runs):
        for record in records:
            sums[i, :, numbers[record.session]] += part(record)
    totals = sums.sum(axis=2)
    points = [float(above / below) if below else None for above, below in totals]
    weights = draws(len(numbers), replicates)
    replicas = [(weights @ above) / np.maximum(weights @ below, 1e-12) for above, below in sums]
    ratios = tuple(
        interval(points[0], one, replicas[0], many) if points[0] is not None and one is not None else None
        for one, many in zip(points[1:], replicas[1:], strict=True)
    )
    return Row(name, "share", tuple(points), ratios)


def _tokens(records: Sequence[Record]) -> tuple[Floats, Floats]:
    parts = [measures.tokens_at(one) for one in records]
    return np.concatenate([at for at, _ in parts]), np.concatenate([count for _, count in parts])


def _requests(records: Sequence[Record]) -> tuple[Floats, Floats]:
    ends = np.asarray([one.end_s for one in records if one.ok], float)
    return ends, np.ones(len(ends))


def _rate_row(
    name: str,
    unit: str,
    runs: Sequence[tuple[Run, Window]],
    events: Callable[[Sequence[Record]], tuple[Floats, Floats]],
    replicates: int,
) -> Row:
    """A rate over the window.

    Its interval comes from resampling slices of the window, separately in each run.
    """
    slices = []
    for run, window in runs:
        at, count = events(run.records) if run.records else (np.empty(0), np.empty(0))
        edges = np.linspace(window.start_s, window.end_s + measures.ROUNDING_S, SLICES + 1)
        slices.append(np.histogram(at, edges, weights=count)[0] * SLICES / window.length_s)
    points = [float(one.mean()) for one in slices]
    replicas = [draws(SLICES, replicates, i) @ one / SLICES for i, one in enumerate(slices)]
    ratios = [
        interval(points[0], one, replicas[0], many)
        for one, many in zip(points[1:], replicas[1:], strict=True)
    ]
    return Row(name, unit, tuple(points), tuple(ratios))
