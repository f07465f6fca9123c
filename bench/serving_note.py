"""The note of ``make bench-serving``: measured and predicted figures of each layout, as tables and plots.

Samples come from one run of the benchmark or from several (``notes.merged``), because long sweeps run in
pieces.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from cluster import ROOT
from notes import Note, number, table

BASE = "colocated"
"""The layout that ratios refer to, as in the paper's figure 8."""


@attrs.frozen
class Layout:
    """A way to use the cores: a configuration that comes with memserve, and settings that override it."""

    name: str
    config: str
    settings: tuple[str, ...]
    what: str

    @property
    def path(self) -> str:
        """Path of the configuration file."""
        return str(ROOT / "configs" / self.config)


@attrs.frozen
class Measure:
    """One figure of a run."""

    name: str
    unit: str
    source: str
    quantile: str

    def read(self, figures: dict[str, Any]) -> float | None:
        """The value in a summary's figures; None if no request has one."""
        found = figures[self.source]
        return float(found[self.quantile]) if found and found["count"] else None


MEASURES = (
    Measure("TTFT mean", "ms", "ttft_ms", "mean"),
    Measure("TTFT p99", "ms", "ttft_ms", "p99"),
    Measure("JCT mean", "ms", "jct_ms", "mean"),
    Measure("JCT p99", "ms", "jct_ms", "p99"),
    Measure("TPOT p99", "ms", "tpot_ms", "p99"),
)


SAME = ("seconds", "scale")
"""Fields that must be equal in all samples of a note."""


@attrs.frozen
class Sample:
    """One run of a workload at a rate on a layout."""

    layout: str
    kind: str
    rate: float
    values: dict[str, float]
    """Measured values, by measure; also ``requests``, ``failed``, ``cached_share`` and ``moved_mib``."""
    fell_behind: bool
    predicted: dict[str, float] = attrs.field(factory=dict)
    """The simulator's values for the same run, by measure; also ``cached_share``."""
    seconds: float = 0.0
    """Length of the run."""
    scale: float = 1.0
    """Factor on all lengths of the workload."""
    commit: str = ""


def median(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """Median of a measure over the rounds; None without values."""
    found = [
        one.values[name]
        for one in samples
        if (one.layout, one.kind, one.rate) == (layout, kind, rate) and name in one.values
    ]
    return statistics.median(found) if found else None


def ratio(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """A layout's median divided by the base layout's: below 1 is better."""
    value, base = (median(samples, one, kind, rate, name) for one in (layout, BASE))
    return value / base if value is not None and base else None


def cell(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> str:
    """A cell of the table: a value and its ratio to the base layout's."""
    value, times = median(samples, layout, kind, rate, name), ratio(samples, layout, kind, rate, name)
    if value is None:
        return ""
    return f"{number(value)} ({times:.2f})" if times is not None else number(value)


def results(samples: Sequence[Sample], kind: str, rate: float, layouts: Sequence[Layout]) -> str:
    """A table with a row per layout: each measure with its ratio to the base, cached share, MiB moved."""
    head = [
        "",
        *(f"{one.name}, {one.unit}" for one in MEASURES),
        "cached",
        "moved, MiB",
        "requests",
        "failed",
    ]
    rows = []
    for layout in layouts:
        measured = [cell(samples, layout.name, kind, rate, one.name) for one in MEASURES]
        cached, moved, asked, failed = (
            median(samples, layout.name, kind, rate, name) or 0.0
            for name in ("cached_share", "moved_mib", "requests", "failed")
        )
        rows.append([layout.name, *measured, f"{cached:.0%}", number(moved), f"{asked:.0f}", f"{failed:.0f}"])
    return table(head, rows)


def predictions(samples: Sequence[Sample], kind: str, rate: float, layouts: Sequence[Layout]) -> str:
    """A table with a row per layout: predicted over measured values."""
    rows = [
        [layout.name, *(_share(error_of(samples, layout.name, kind, rate, one.name)) for one in MEASURES)]
        for layout in layouts
    ]
    return table(["predicted / measured", *(one.name for one in MEASURES)], rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def error_of(samples: Sequence[Sample], layout: str, kind: str, rate: float, name: str) -> float | None:
    """Median over the rounds of predicted over measured; None without values."""
    found = [
        one.predicted[name] / one.values[name]
        for one in samples
        if (one.layout, one.kind, one.rate) == (layout, kind, rate)
        and name in one.predicted
        and one.values.get(name)
    ]
    return statistics.median(found) if found else None


def errors(samples: Sequence[Sample]) -> str:
    """The predictions' median errors, in words: of values, and of ratios to the base, which planning uses."""
    cells = sorted({(one.layout, one.kind, one.rate) for one in samples})
    medians = []
    for one in MEASURES:
        shares = {cell: share for cell in cells if (share := error_of(samples, *cell, one.name)) is not None}
        to_base = [share / shares[BASE, kind, rate] for (layout, kind, rate), share in shares.items()
                   if layout != BASE and (BASE, kind, rate) in shares]  # fmt: skip
        if shares and to_base:
            absolute, relative = (
                statistics.median(abs(share - 1) for share in many) for many in (shares.values(), to_base)
            )
            medians.append(f"{one.name} {absolute:.0%} ({relative:.0%})")
    return (
        "Median error of the predictions (in brackets: of their ratio to "
        + f"{BASE}): "
        + ", ".join(medians)
        + "."
    )


def draw(samples: Sequence[Sample], kind: str, layouts: Sequence[Layout], path: Path) -> None:
    """Plot mean TTFT, mean JCT and p99 TPOT against the rate, a line per layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in MEASURES if one.name in ("TTFT mean", "JCT mean", "TPOT p99")]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.5 * len(shown), 4), layout="constrained")
    rates = sorted({one.rate for one in samples})
    for axis, one in zip(axes, shown, strict=True):
        for layout in layouts:
            points = [(rate, median(samples, layout.name, kind, rate, one.name)) for rate in rates]
            known = [(rate, value) for rate, value in points if value is not None]
            axis.plot(
                [rate for rate, _ in known], [value for _, value in known], marker="o", label=layout.name
            )
        axis.set_xlabel("requests a second")
        axis.set_ylabel(f"{one.name}, {one.unit}")
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def write_note(samples: Sequence[Sample], layouts: Sequence[Layout], command: str) -> Path:
    """Write docs/measurements/<date>-serving.md with its plots."""
    note = Note("serving")
    layouts = [one for one in layouts if any(one.name == sample.layout for sample in samples)]
    parts = []
    for kind in dict.fromkeys(one.kind for one in samples):
        played = [one for one in samples if one.kind == kind]
        rates = sorted({one.rate for one in played})
        parts.append(f"## {kind}")
        if len(rates) > 1:
            plot = note.plot(kind)
            draw(played, kind, layouts, plot)
            parts.append(f"![{kind}]({plot.name})")
        for rate in rates:
            parts += [f"{rate:g} requests a second:", results(played, kind, rate, layouts)]
            parts.append(predictions(played, kind, rate, layouts))
    return note.write(
        "Layouts and caching modes under the paper's workloads",
        command,
        conditions(samples),
        "\n".join(f"- **{one.name}**: {one.what}." for one in layouts),
        errors(samples),
        *parts,
    )


def conditions(samples: Sequence[Sample]) -> str:
    """The conditions of the measurement, in words."""
    cells = Counter((one.layout, one.kind, one.rate) for one in samples)
    rounds = (
        f"{min(cells.values())} to {max(cells.values())}"
        if len(set(cells.values())) > 1
        else str(max(cells.values()))
    )
    behind, commits = sum(one.fell_behind for one in samples), sorted({one.commit for one in samples})
    return (
        f"Every layout has the same cores, and the load generator runs on them too. {rounds} interleaved rounds of "
        f"{samples[0].seconds:g} s a rate, the first fifth left out; all lengths times {samples[0].scale:g}; the model's own answers go "
        f"into the next prompts. Medians over the rounds; in brackets the ratio to {BASE}: below 1 is better. The load "
        f"generator fell behind in {behind} of {len(samples)} runs. Measured at {', '.join(commits)}."
    )
