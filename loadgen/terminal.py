"""What a person sees: a live table while a run is under way, and its figures at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import orjson
import trio
from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadgen.compare import Row
from loadgen.measures import LATENCIES, NAMES
from loadgen.options import RunOptions
from loadgen.rundir import Run
from loadgen.runner import Progress

REFRESH_S = 0.5
LINE_S = 5.0
"""Seconds between two lines where there is no terminal."""


class Live:
    """The live report of one run, on stderr; ``watch`` runs concurrently with it."""

    def __init__(self, options: RunOptions, title: str = "") -> None:
        self.title = title or f"{options.kind} -> {options.server.url}"
        self.duration_s = options.arrivals.duration_s
        self.console = Console(stderr=True)
        self._last = (0.0, 0)
        self._rate = 0.0

    async def watch(self, progress: Progress) -> None:
        """Show the progress until cancelled."""
        if not self.console.is_terminal:
            await self._lines(progress)
            return
        with RichLive(console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                await trio.sleep(REFRESH_S)
                live.update(self.page(progress, trio.current_time() - progress.began_s), refresh=True)

    async def _lines(self, progress: Progress) -> None:
        while True:
            await trio.sleep(LINE_S)
            print(self.line(progress, trio.current_time() - progress.began_s), file=sys.stderr, flush=True)

    def line(self, progress: Progress, elapsed_s: float) -> str:
        """The progress on one line."""
        figures = ", ".join(f"{name} {value}" for name, value in self.cells(progress, elapsed_s))
        return f"{elapsed_s:7.1f} s  {figures}"

    def page(self, progress: Progress, elapsed_s: float) -> Group:
        """The progress as a bar and a table."""
        ended = progress.ok + progress.failed
        bar = ProgressBar(total=progress.planned, completed=ended)
        if self.duration_s is not None:
            bar = ProgressBar(total=self.duration_s, completed=min(elapsed_s, self.duration_s))
        table = Table(box=None, show_header=False)
        for name, value in self.cells(progress, elapsed_s):
            table.add_row(name, value)
        for kind, count in progress.errors.items():
            table.add_row(f"[red]{kind}[/red]", str(count))
        return Group(Text(f"{self.title}, {elapsed_s:.0f} s"), table, bar)

    def cells(self, progress: Progress, elapsed_s: float) -> list[tuple[str, str]]:
        """Names and values of the progress figures."""
        then, events = self._last
        if elapsed_s - then >= REFRESH_S / 2:
            self._rate = (progress.events - events) / (elapsed_s - then)
            self._last = (elapsed_s, progress.events)
        cached = progress.cached_tokens / progress.prompt_tokens if progress.prompt_tokens else None
        return [
            ("sent", f"{progress.sent} of {progress.planned}"),
            ("in flight", str(progress.in_flight)),
            ("ok", str(progress.ok)),
            ("failed", str(progress.failed)),
            ("events/s", f"{self._rate:,.0f}"),
            ("TTFT p50/p99", _pair(progress.ttft_ms)),
            ("JCT p50/p99", _pair(progress.jct_ms)),
            ("cached", "-" if cached is None else f"{cached:.1%}"),
            ("send lag max", f"{progress.lag_max_s * 1e3:.0f} ms"),
        ]


def _pair(values: Any) -> str:
    if not values:
        return "-"
    low, high = np.percentile(list(values), (50, 99))
    return f"{low:,.0f}/{high:,.0f} ms"


def summary(run: Run) -> None:
    """Print the figures of a run on stdout."""
    console = Console()
    figures, server = run.summary["figures"], run.summary["server"]
    console.print(
        f"{run.summary['workload']['name']}: {figures['ok']} of {figures['requests']} measured requests answered "
        f"by {server['model']} at {server['url']}; {run.summary['arrivals']['text']}",
        highlight=False,
        markup=False,
    )
    console.print(latencies(figures))
    for line in figure_lines(run.summary):
        console.print(line, highlight=False, markup=False)
    for warning in run.summary["warnings"]:
        console.print(f"! {warning}", style="yellow", highlight=False, markup=False)
    if run.directory:
        console.print(f"written to {run.directory}", highlight=False, markup=False)


def latencies(figures: dict[str, Any]) -> Table:
    """Percentiles of the four latencies in milliseconds."""
    table = Table("ms", "mean", "p50", "p90", "p99", "max", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for measure in LATENCIES:
        found = figures[measure]
        if found:
            table.add_row(
                NAMES[measure], *(f"{found[one]:,.1f}" for one in ("mean", "p50", "p90", "p99", "max"))
            )
    return table


def figure_lines(found: dict[str, Any]) -> list[str]:
    """The figures other than latencies, one line each."""
    figures, rates = found["figures"], found["figures"]["throughput"]
    lines = [
        f"throughput: {rates['output_tokens_per_s']:,.1f} output tokens/s, {rates['prompt_tokens_per_s']:,.1f} prompt "
        f"tokens/s, {rates['requests_per_s']:,.2f} requests/s"
    ]
    if figures["cached_share"] is not None:
        lines.append(f"cached share of prompt tokens: {figures['cached_share']:.1%}")
    if figures["goodput"]["slos_ms"]:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in figures["goodput"]["slos_ms"].items())
        share = figures["goodput"]["share"]
        lines.append(
            f"goodput: {figures['goodput']['requests_per_s']:,.2f} requests/s"
            f" ({share or 0:.1%}) within {limits}"
        )
    if figures["stalled"]["requests"]:
        lines.append(
            f"stalled for more than {figures['stalled']['after_s']:g} s: {figures['stalled']['requests']}"
        )
    for kind, one in figures["errors"].items():
        lines.append(f"{kind}: {one['count']}, for example: {one['example']}")
    for name, tenant in found["tenants"].items():
        ttft = tenant["ttft_ms"] or {"p50": 0.0, "p99": 0.0}
        lines.append(
            f"tenant {name}: {tenant['ok']} of {tenant['requests']} answered, TTFT p50/p99 "
            f"{ttft['p50']:,.1f}/{ttft['p99']:,.1f} ms, {tenant['throughput']['output_tokens_per_s']:,.1f} tokens/s"
        )
    if "reference" in found:
        check = found["reference"]
        lines.append(
            f"answers against {check['run']}: {check['same']} the same, {check['different']} different, "
            f"{check['other_prompt']} to another prompt, {check['missing']} not in it"
        )
    return lines


def comparison(runs: Sequence[Run], rows: Sequence[Row]) -> None:
    """Print runs side by side on stdout."""
    console = Console()
    table = Table("", runs[0].label, box=None)
    for run in runs[1:]:
        table.add_column(run.label)
        table.add_column("ratio")
        table.add_column("95 % interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        cells = [_figure(row, row.values[0])]
        for value, ratio in zip(row.values[1:], row.ratios, strict=True):
            cells.append(_figure(row, value))
            cells += ["-", ""] if ratio is None else [
                f"{ratio.ratio:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}{' *' if ratio.differs else ''}"
            ]  # fmt: skip
        table.add_row(row.name if row.unit == "share" else f"{row.name}, {row.unit}", *cells)
    console.print(table)
    console.print("* differs from 1 with 95 % confidence", highlight=False)
    for run in runs:
        for warning in run.summary["warnings"]:
            console.print(f"! {run.label}: {warning}", style="yellow", highlight=False, markup=False)


def _figure(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if row.unit == "share" else f"{value:,.1f}"


def comparison_document(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    """A comparison as plain values."""
    return {"runs": [one.label for one in runs], "rows": [attrs.asdict(row) for row in rows]}


def print_json(document: Any) -> None:
    """Print JSON on stdout."""
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
