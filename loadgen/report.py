"""Reports as self-contained HTML pages: of a run, of a sweep, of runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from jinja2 import Environment

from loadgen import plots
from loadgen.compare import Interval, Row
from loadgen.errors import LoadgenError
from loadgen.measures import LATENCIES, NAMES, stalled
from loadgen.plots import AXES, point
from loadgen.rundir import REPORT, Run

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COLUMNS = ("mean", "p50", "p90", "p99", "max")
SLOWEST = 10
LOWER_IS_BETTER = ("ms",)


@attrs.frozen
class Cell:
    """One cell of a table."""

    text: str
    style: str = ""
    link: str = ""


@attrs.frozen
class Table:
    """A table with its header row."""

    head: tuple[str, ...]
    rows: list[list[Cell]]


@attrs.frozen
class Section:
    """A section of a page; plots are SVG."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    plots: tuple[str, ...] = ()


def page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    warnings: Sequence[str] = (),
    cards: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> str:
    """A page as HTML that needs no other file."""
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        title=title, subtitle=subtitle, sections=sections, warnings=warnings, cards=cards, footer=footer
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain text."""
    return Table(tuple(head), [[Cell(one) for one in row] for row in rows])


def number(value: float | None, digits: int = 1) -> str:
    """A number for people; a dash for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "-" if value is None else f"{value:.1%}"


# ---- one run -------------------------------------------------------------------------------------------------


def of_run(run: Run) -> str:
    """The page of one run."""
    summary, figures = run.summary, run.summary["figures"]
    sections = [
        Section(
            "Latency",
            "Milliseconds, of whole answers to requests that were due in the measured window.",
            (latencies(figures),),
            tuple(plots.cdf([run], measure) for measure in LATENCIES if figures[measure]),
        ),
        Section("Along the run", "Grey stretches are not measured.", plots=(plots.timeline(run),)),
    ]
    if figures["errors"]:
        sections.append(Section("Errors", tables=(errors(figures),)))
    if summary["tenants"]:
        sections.append(Section("Tenants", tables=(tenants(summary["tenants"]),)))
    if "reference" in summary:
        sections.append(reference(summary["reference"]))
    sections += [
        Section("The slowest", "By job completion time.", (slowest(run),)),
        Section("How it was measured", tables=(circumstances(summary),)),
    ]
    title = f"{summary['workload']['name']} on {summary['server']['model']}"
    subtitle = f"{summary['arrivals']['text']}; {summary['server']['url']}; {summary['started']}"
    return page(title, subtitle, sections, summary["warnings"], cards(summary), footer(summary))


def footer(summary: dict[str, Any]) -> str:
    """The program and system that made the measurements."""
    return f"memserve-loadgen {summary['loadgen']} on {summary['machine']['system']}"


def cards(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that most readers look for."""
    figures, rates = summary["figures"], summary["figures"]["throughput"]
    found = [
        ("measured requests answered", f"{figures['ok']} / {figures['requests']}"),
        ("TTFT p50 / p99, ms", _two(figures["ttft_ms"])),
        ("TPOT p50 / p99, ms", _two(figures["tpot_ms"])),
        ("JCT p50 / p99, ms", _two(figures["jct_ms"], 0)),
        ("output tokens/s", number(rates["output_tokens_per_s"])),
        ("prompt tokens/s", number(rates["prompt_tokens_per_s"])),
        ("cached share of prompts", share(figures["cached_share"])),
    ]
    if figures["goodput"]["slos_ms"]:
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in figures["goodput"]["slos_ms"].items())
        found.append((f"requests with {limits}", share(figures["goodput"]["share"])))
    if figures["stalled"]["requests"]:
        found.append(
            (f"stalled over {figures['stalled']['after_s']:g} s", str(figures["stalled"]["requests"]))
        )
    return found


def _two(found: dict[str, float] | None, digits: int = 1) -> str:
    return "-" if found is None else f"{number(found['p50'], digits)} / {number(found['p99'], digits)}"


def latencies(figures: dict[str, Any]) -> Table:
    """Mean, percentiles, maximum and count of each latency."""
    rows = [
        [
            NAMES[measure],
            *(number(figures[measure][column]) for column in COLUMNS),
            f"{figures[measure]['count']:,}",
        ]
        for measure in LATENCIES
        if figures[measure]
    ]
    return table(("ms", *COLUMNS, "values"), rows)


def errors(figures: dict[str, Any]) -> Table:
    """Errors by kind."""
    rows = [
        [Cell(kind), Cell(str(one["count"])), Cell(one["example"], "text")]
        for kind, one in figures["errors"].items()
    ]
    return Table(("kind", "requests", "for example"), rows)


def tenants(found: dict[str, Any]) -> Table:
    """The figures of each tenant."""
    head = (
        "tenant",
        "answered",
        "TTFT p50 / p99, ms",
        "TPOT p50 / p99, ms",
        "tokens/s",
        "cached",
        "within SLOs",
    )
    rows = [
        [
            name,
            f"{one['ok']} / {one['requests']}",
            _two(one["ttft_ms"]),
            _two(one["tpot_ms"]),
            number(one["throughput"]["output_tokens_per_s"]),
            share(one["cached_share"]),
            share(one["goodput"]["share"]),
        ]
        for name, one in found.items()
    ]
    return table(head, rows)


def reference(found: dict[str, Any]) -> Section:
    """The comparison of the answers with those of another run."""
    head = ("same", "different", "to another prompt", "not in it")
    counts = [str(found[name]) for name in ("same", "different", "other_prompt", "missing")]
    examples = [
        [one["session"], str(one["turn"]), "-" if one["at"] is None else str(one["at"])]
        for one in found["examples"]
    ]
    tables = [table(head, [counts])]
    if examples:
        tables.append(table(("differs in session", "turn", "from character"), examples))
    return Section("Answers", f"Against {found['run']}.", tuple(tables))


def slowest(run: Run) -> Table:
    """The requests that took longest."""
    found = sorted((one for one in plots.measured(run) if one.ok), key=lambda one: -one.jct_ms)[:SLOWEST]
    stall_s = run.summary["figures"]["stalled"]["after_s"]
    rows = [
        [
            f"{one.session} / {one.turn}",
            number(one.sent_s),
            number(one.jct_ms, 0),
            number(one.ttft_ms),
            number(one.tpot_ms),
            str(one.prompt_tokens if one.prompt_tokens is not None else "-"),
            str(one.cached_tokens if one.cached_tokens is not None else "-"),
            str(one.output_tokens),
            "stalled" if stalled(one, stall_s) else "",
            one.request_id,
        ]
        for one in found
    ]
    head = (
        "session / turn",
        "sent, s",
        "JCT, ms",
        "TTFT, ms",
        "TPOT, ms",
        "prompt",
        "cached",
        "output",
        "",
        "id",
    )
    return table(head, rows)


def setting_text(value: Any) -> str:
    """A setting as text for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting_text(one)}" for name, one in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def circumstances(summary: dict[str, Any]) -> Table:
    """Everything that was chosen, and how late the generator was."""
    lag, window, work = summary["lag"], summary["window"], summary["workload"]
    rows = [
        ("server", f"{summary['server']['model']} at {summary['server']['url']}"),
        ("workload", f"{work['name']}: {work['sessions']} sessions, {work['requests']} requests"),
        *((f"workload: {name}", setting_text(value)) for name, value in work["options"].items()),
        ("measured", f"from {window['start_s']:.1f} s to {window['end_s']:.1f} s"),
        ("send lag p50 / p99, ms", _two(lag["send_ms"], 2)),
        ("clock's ticks late by p50 / p99, ms", _two(lag["tick_ms"], 2)),
        *((f"identity: {name}", setting_text(value)) for name, value in summary["identity"].items()),
    ]
    return Table(("", ""), [[Cell(name), Cell(value, "text")] for name, value in rows])


# ---- sweeps --------------------------------------------------------------------------------------------------


def of_sweep(series: Sequence[tuple[str, Sequence[Run]]], axis: str) -> str:
    """The page of one sweep, or of several side by side."""
    several = len(series) > 1
    drawn = [plots.against_rate(series, axis, measure) for measure in LATENCIES]
    sections = [Section(f"Against {AXES[axis]}", plots=(*drawn, plots.throughput(series, axis)))]
    sections += [
        Section(label if several else "Points", tables=(points(runs, axis),)) for label, runs in series
    ]
    warnings = [
        f"{run.label}: {one}" for _, runs in series for run in runs for one in run.summary["warnings"]
    ]
    first = series[0][1][0].summary
    title = f"{first['workload']['name']}, swept over {AXES[axis]}"
    subtitle = " and ".join(f"{label}: {runs[0].summary['server']['model']}" for label, runs in series)
    return page(title, subtitle, sections, warnings, footer=footer(first))


def points(runs: Sequence[Run], axis: str) -> Table:
    """The figures of each point of a sweep, with links to their pages."""
    head = (AXES[axis], "answered", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "JCT p50 / p99, ms",
            "output tokens/s", "requests/s", "cached", "within SLOs")  # fmt: skip
    rows = []
    for run in runs:
        figures = run.summary["figures"]
        link = f"{run.directory.name}/{REPORT}" if run.directory else ""
        cells = [
            f"{figures['ok']} / {figures['requests']}",
            _two(figures["ttft_ms"]),
            _two(figures["tpot_ms"]),
            _two(figures["jct_ms"], 0),
            number(figures["throughput"]["output_tokens_per_s"]),
            number(figures["throughput"]["requests_per_s"], 2),
            share(figures["cached_share"]),
            share(figures["goodput"]["share"]) if figures["goodput"]["slos_ms"] else "-",
        ]
        rows.append([Cell(f"{point(run, axis):g}", link=link), *(Cell(one) for one in cells)])
    return Table(head, rows)


# ---- comparisons ---------------------------------------------------------------------------------------------


def of_comparison(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """The page of runs side by side."""
    first = runs[0]
    head = ["", first.label]
    for run in runs[1:]:
        head += [run.label, f"/ {first.label}", "95 % interval"]
    text = (
        f"Ratios are to {first.label}; intervals are by bootstrap over sessions. Green and red ratios differ from 1 "
        "with 95 % confidence, for the better or the worse."
    )
    drawn = tuple(plots.cdf(runs, measure) for measure in LATENCIES if first.summary["figures"][measure])
    sections = [
        Section("Figures", text, (Table(tuple(head), [compared(row) for row in rows]),)),
        Section("Latency", plots=drawn),
        *(Section(f"{run.label} along the run", plots=(plots.timeline(run),)) for run in runs),
    ]
    warnings = [f"{run.label}: {one}" for run in runs for one in run.summary["warnings"]]
    title = " and ".join(run.label for run in runs)
    subtitle = f"{first.summary['workload']['name']}; {first.summary['arrivals']['text']}"
    return page(title, subtitle, sections, warnings, footer=footer(first.summary))


def compared(row: Row) -> list[Cell]:
    """One row of a comparison."""
    cells = [
        Cell(f"{row.name}, {row.unit}" if row.unit != "share" else row.name),
        Cell(_value(row, row.values[0])),
    ]
    for value, ratio in zip(row.values[1:], row.ratios, strict=True):
        cells.append(Cell(_value(row, value)))
        cells += [Cell("-"), Cell("")] if ratio is None else [
            Cell(f"{ratio.ratio:.3f}", verdict(row, ratio)), Cell(f"{ratio.low:.3f} to {ratio.high:.3f}")
        ]  # fmt: skip
    return cells


def verdict(row: Row, ratio: Interval) -> str:
    """``better``, ``worse``, or ``same`` if the interval contains 1."""
    if not ratio.differs:
        return "same"
    return "better" if (ratio.ratio < 1) == (row.unit in LOWER_IS_BETTER) else "worse"


def _value(row: Row, value: float | None) -> str:
    return share(value) if row.unit == "share" else number(value)


def write(path: Path, html: str) -> Path:
    """Write a page to disk. Raises LoadgenError if that fails."""
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise LoadgenError(f"{path}: cannot be written: {error.strerror}") from None
    return path
