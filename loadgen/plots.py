"""Plots of runs, as SVG text to embed in a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from loadgen import measures
from loadgen.records import Record
from loadgen.rundir import Run

# Each plot makes its own Figure: pyplot would keep global state and look for a window system.
COLOURS = ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#5d4e8c", "#8c6d46", "#2e4057", "#a23b72")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "legend.frameon": False,
}
BINS = 120
POINTS_MAX = 2000


def drawn(name: str, draw: Callable[[Figure], None], width: float = 6.2, height: float = 3.2) -> str:
    """One figure as SVG.

    The ids in it derive from ``name``, which must differ from other plots' on a page.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page decides how wide a plot is.
    return re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r' height="[\d.]+pt"', "", svg, count=1))


def _scaled(axes: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    """Make the axis logarithmic if values span more than a factor of 30."""
    lows = [float(one[one > 0].min()) for one in values if (one > 0).any()]
    highs = [float(one.max()) for one in values if len(one)]
    if lows and max(highs) > 30 * min(lows):
        axes.set_xscale("log")
        axes.set_xlim(left=min(lows))
    else:
        axes.set_xlim(left=0)


def cdf(runs: Sequence[Run], measure: str) -> str:
    """The share of values at or below each latency."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        each = [np.sort(measures.values(measured(run), measure)) for run in runs]
        for run, values, colour in zip(runs, each, COLOURS * 9, strict=False):
            if not len(values):
                continue
            steps = np.unique(np.linspace(0, len(values) - 1, POINTS_MAX).astype(int))
            axes.step(values[steps], (steps + 1) / len(values), where="post", color=colour, label=run.label)
        _scaled(axes, each)
        for share in (0.5, 0.9, 0.99):
            axes.axhline(share, color="#bbbbbb", linewidth=0.7, linestyle=":")
        axes.set(xlabel=f"{measures.NAMES[measure]}, ms", ylabel="share of values", ylim=(0, 1.01))
        if len(runs) > 1:
            axes.legend(loc="lower right")

    return drawn(f"cdf {measure}", draw)


def measured(run: Run) -> list[Record]:
    """The requests that were due in a run's window."""
    window = window_of(run)
    return [one for one in run.records if window.has(one.due_s)]


def window_of(run: Run) -> measures.Window:
    """The stretch of a run that was measured."""
    return measures.Window(run.summary["window"]["start_s"], run.summary["window"]["end_s"])


def load_over_time(run: Run) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Edges of time bins [bins + 1], and what happened in each bin [bins].

    The series are requests in flight, output tokens a second, and prompt and cached tokens of answers begun.
    """
    end = max((one.end_s for one in run.records), default=1.0) or 1.0
    edges = np.linspace(0, end, BINS + 1)
    width = end / BINS
    parts = [measures.tokens_at(one) for one in run.records]
    at = np.concatenate([one for one, _ in parts]) if parts else np.empty(0)
    counts = np.concatenate([one for _, one in parts]) if parts else np.empty(0)
    busy = np.zeros(BINS)
    for one in run.records:
        # Seconds of each bin in which the request was in flight.
        busy += np.clip(np.minimum(edges[1:], one.end_s) - np.maximum(edges[:-1], one.sent_s), 0, None)
    first = [one for one in run.records if one.event_ms and one.cached_tokens is not None]
    begun = np.asarray([one.sent_s + one.event_ms[0] / 1e3 for one in first])
    prompt = np.histogram(begun, edges, weights=[one.prompt_tokens or 0 for one in first])[0]
    cached = np.histogram(begun, edges, weights=[one.cached_tokens or 0 for one in first])[0]
    tokens = np.histogram(at, edges, weights=counts)[0] / width
    return edges, {"in flight": busy / width, "tokens": tokens, "prompt": prompt, "cached": cached}


def timeline(run: Run) -> str:
    """Load, output rate, cached share and TTFT over the run; stretches that are not measured are grey."""
    edges, series = load_over_time(run)
    middle = (edges[1:] + edges[:-1]) / 2
    window = window_of(run)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(4, 1, sharex=True)
        axes[0].fill_between(middle, series["in flight"], color=COLOURS[0], alpha=0.35, step="mid")
        axes[0].set_ylabel("requests\nin flight")
        axes[1].fill_between(middle, series["tokens"], color=COLOURS[2], alpha=0.5, step="mid")
        axes[1].set_ylabel("output\ntokens/s")
        # Smoothed over five bins, so that a bin without a first token does not break the line.
        prompt, cached = (np.convolve(series[name], np.ones(5), "same") for name in ("prompt", "cached"))
        share = np.divide(cached, prompt, out=np.full(BINS, np.nan), where=prompt > 0)
        axes[2].plot(middle, share, color=COLOURS[3])
        axes[2].set(ylabel="cached\nshare", ylim=(-0.02, 1.02))
        ttft = [(one.sent_s, one.ttft_ms) for one in run.records if one.ok and one.ttft_ms is not None]
        chosen = ttft[:: max(1, len(ttft) // POINTS_MAX)]
        axes[3].plot(*zip(*chosen, strict=True), ".", markersize=2.5, color=COLOURS[0]) if chosen else None
        failed = [one.sent_s for one in run.records if not one.ok]
        axes[3].plot(
            failed, [0] * len(failed), "x", markersize=4, color=COLOURS[1], label="failed"
        ) if failed else None
        axes[3].set(ylabel="TTFT, ms", xlabel="seconds since the run began", ylim=(0, None))
        for one in axes:
            one.set_xlim(0, edges[-1])
            one.set_ylim(bottom=0)
            one.axvspan(0, window.start_s, color="#999999", alpha=0.18, linewidth=0)
            one.axvspan(window.end_s, edges[-1], color="#999999", alpha=0.18, linewidth=0)
        figure.align_ylabels(axes)

    return drawn(f"timeline {run.label}", draw, 10, 6)


def against_rate(series: Sequence[tuple[str, Sequence[Run]]], axis: str, measure: str) -> str:
    """A latency's p50 (solid) and p99 (dashed) at the points of sweeps."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (label, runs), colour in zip(series, COLOURS * 9, strict=False):
            at = [point(run, axis) for run in runs]
            for name, style in (("p50", "-o"), ("p99", "--o")):
                found = [run.summary["figures"][measure] for run in runs]
                values = [one[name] if one else np.nan for one in found]
                shown = f"{label} {name}" if len(series) > 1 else name
                axes.plot(at, values, style, color=colour, markersize=4, label=shown)
        axes.set(xlabel=AXES[axis], ylabel=f"{measures.NAMES[measure]}, ms", ylim=(0, None))
        axes.legend()

    return drawn(f"points {measure}", draw)


def throughput(series: Sequence[tuple[str, Sequence[Run]]], axis: str) -> str:
    """Output tokens a second, and the cached share, at the points of sweeps."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        right = axes.twinx()
        right.grid(visible=False)
        for (label, runs), colour in zip(series, COLOURS * 9, strict=False):
            at = [point(run, axis) for run in runs]
            rates = [run.summary["figures"]["throughput"]["output_tokens_per_s"] for run in runs]
            shares = [run.summary["figures"]["cached_share"] for run in runs]
            name = f"{label} " if len(series) > 1 else ""
            axes.plot(at, rates, "-o", color=colour, markersize=4, label=f"{name}tokens/s")
            if any(one is not None for one in shares):
                values = [np.nan if one is None else one for one in shares]
                right.plot(at, values, ":s", color=colour, markersize=3, label=f"{name}cached share")
        axes.set(xlabel=AXES[axis], ylabel="output tokens/s", ylim=(0, None))
        right.set(ylabel="cached share", ylim=(0, 1.02))
        lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        axes.legend(handles=lines)

    return drawn("throughput", draw)


AXES = {"rate": "sessions/s offered", "clients": "clients", "share": "shared part of a prompt"}
"""What a sweep varies, in words."""


def point(run: Run, axis: str) -> float:
    """A run's position on a sweep's axis."""
    if axis == "share":
        return float(run.summary["workload"]["options"].get("share", 0.5))
    return float(run.summary["arrivals"][axis])
