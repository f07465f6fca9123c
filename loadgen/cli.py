"""The command line: run, sweep, compare, report."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import trio
from cyclopts import App, CycloptsError, Parameter

from loadgen import rundir
from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, Kind, MeasureOptions, RunOptions, ServerOptions, WorkloadOptions
from memserve import __version__

WORKLOAD, ARRIVALS, SERVER, MEASURES = WorkloadOptions(), ArrivalOptions(), ServerOptions(), MeasureOptions()
if TYPE_CHECKING:
    from loadgen.compare import Row

STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141

app = App(
    name="memserve-loadgen",
    help="Put load on an OpenAI-compatible server, and measure it.",
    version=__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

Out = Annotated[
    Path | None,
    Parameter(help="A new directory for what is measured; default: one in runs/ with the time in its name."),
]
Quiet = Annotated[bool, Parameter(help="Print only the summary.", negative=())]


def run(words: Sequence[str]) -> int:
    """Run one command; returns the exit status.

    A wrong command line or file is explained on stderr, without a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal's character set has all that is shown
    try:
        status = app(list(words), exit_on_error=False, print_error=False)
        if sys.stdout is not None:  # None where the shell has closed it
            sys.stdout.flush()
    except (LoadgenError, CycloptsError) as error:
        print(error, file=sys.stderr)
        return STATUS_USER_ERROR
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STATUS_BROKEN_PIPE
    return status if isinstance(status, int) else 0


@app.command(name="run")
def run_once(
    workload: Annotated[Kind, Parameter(help="What is asked.")],
    /,
    *,
    given: WorkloadOptions = WORKLOAD,
    arrivals: ArrivalOptions = ARRIVALS,
    server: ServerOptions = SERVER,
    measures: MeasureOptions = MEASURES,
    out: Out = None,
    quiet: Quiet = False,
    html: Annotated[bool, Parameter(help="Write report.html, which takes a few seconds.")] = True,
) -> int:
    """Play one workload, and write its request records, summary and report."""
    from loadgen import api, terminal

    options = RunOptions(kind=workload, workload=given, arrivals=arrivals, server=server, measures=measures)
    directory = out or place(workload)
    watch = None if quiet else terminal.Live(options).watch
    done = trio.run(lambda: api.play(options, directory, watch, signals=True))
    terminal.summary(done)
    if html:
        print(f"report: {write_report(done)}")
    return STATUS_INTERRUPTED if done.summary["outcome"]["interrupted"] else 0


@app.command(name="sweep")
def sweep_points(
    workload: Annotated[Kind, Parameter(help="What is asked at every point.")],
    /,
    *,
    rates: Annotated[str, Parameter(help="Rates of an open loop, such as 1,2,4,8.")] = "",
    clients_list: Annotated[
        str, Parameter(name="--clients-list", help="Clients of a closed loop, such as 1,4,16.")
    ] = "",
    shares: Annotated[
        str,
        Parameter(
            help="prefix-share: shared parts of a prompt, such as 0,0.5,0.9; with --rate or --clients."
        ),
    ] = "",
    pause_s: Annotated[float, Parameter(help="Seconds between points.")] = 2.0,
    same_salt: Annotated[
        bool,
        Parameter(
            help="Send the same prompts at every point; a cache then has them from the point before.",
            negative=(),
        ),
    ] = False,
    given: WorkloadOptions = WORKLOAD,
    arrivals: ArrivalOptions = ARRIVALS,
    server: ServerOptions = SERVER,
    measures: MeasureOptions = MEASURES,
    out: Out = None,
    quiet: Quiet = False,
) -> int:
    """Play one workload at several rates, numbers of clients or prefix shares; plot latency against them."""
    from loadgen import sweep, terminal

    options = RunOptions(kind=workload, workload=given, arrivals=arrivals, server=server, measures=measures)
    plan = sweep.plan(options, rates, clients_list, shares, same_salt)
    directory = out or place(f"sweep-{workload}")
    runs = []
    for run in sweep.play(plan, directory, pause_s, quiet):
        terminal.summary(run)
        write_report(run)
        runs.append(run)
        if run.summary["outcome"]["interrupted"]:
            return STATUS_INTERRUPTED
    from loadgen import report

    print(
        f"report: {report.write(directory / rundir.REPORT, report.of_sweep([(directory.name, runs)], plan.axis))}"
    )
    return 0


@app.command(name="compare")
def compare_runs(
    runs: Annotated[
        tuple[Path, ...], Parameter(help="Directories of runs or of sweeps; ratios are to the first.")
    ],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Write the comparison as a page, with plots.")] = None,
    json: Annotated[bool, Parameter(help="Print JSON instead of a table.", negative=())] = False,
    replicates: Annotated[
        int, Parameter(help="Number of times that sessions are resampled for an interval.")
    ] = 1000,
) -> None:
    """Compare runs of one workload: ratios with 95 % confidence intervals.

    Runs of other workloads are refused.
    """
    from loadgen import compare, terminal

    if replicates < compare.REPLICATES_MIN:
        raise LoadgenError(f"--replicates: must be {compare.REPLICATES_MIN} or more, not {replicates}")
    groups = matched(runs)
    tables = [(group, compare.compare(group, replicates)) for group in groups]
    if json:
        terminal.print_json([terminal.comparison_document(group, rows) for group, rows in tables])
    else:
        for group, rows in tables:
            terminal.comparison(group, rows)
    if out:
        from loadgen import report

        print(f"report: {report.write(out, comparison_page(runs, groups, tables[0][1]))}", file=sys.stderr)


@app.command(name="report")
def report_again(
    directory: Annotated[Path, Parameter(help="A directory that run or sweep wrote.")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="The page; default: report.html in the directory.")] = None,
) -> None:
    """Make the page of a run or a sweep again from its files."""
    from loadgen import report

    runs = rundir.points(directory)
    html = report.of_run(runs[0])
    if (directory / rundir.SWEEP).exists():
        axis = str(rundir.read_json(directory / rundir.SWEEP)["axis"])
        html = report.of_sweep([(directory.name, runs)], axis)
    print(f"report: {report.write(out or directory / rundir.REPORT, html)}")


def write_report(run: rundir.Run) -> Path:
    """Write the page of a run into the run's directory."""
    from loadgen import report

    assert run.directory is not None
    return report.write(run.directory / rundir.REPORT, report.of_run(run))


def matched(directories: Sequence[Path]) -> list[list[rundir.Run]]:
    """Groups of runs to compare with each other: one group, or one for each point of sweeps.

    Raises LoadgenError for fewer than two directories, or for sweeps of different lengths.
    """
    if len(directories) < 2:
        raise LoadgenError("compare: needs the directories of two runs or more")
    each = [rundir.points(one) for one in directories]
    if len({len(points) for points in each}) > 1:
        counts = ", ".join(f"{one} {len(points)}" for one, points in zip(directories, each, strict=True))
        raise LoadgenError(f"compare: sweeps must have as many points as each other: {counts}")
    return [list(group) for group in zip(*each, strict=True)]


def comparison_page(
    directories: Sequence[Path], groups: Sequence[Sequence[rundir.Run]], rows: Sequence[Row]
) -> str:
    """The page that compares runs, or sweeps."""
    from loadgen import report

    if len(groups) == 1:
        return report.of_comparison(groups[0], rows)
    axis = str(rundir.read_json(directories[0] / rundir.SWEEP)["axis"])
    series = [
        (one.name, list(points)) for one, points in zip(directories, zip(*groups, strict=True), strict=True)
    ]
    return report.of_sweep(series, axis)


def place(kind: str) -> Path:
    """The directory name for a run that begins now."""
    return Path("runs") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
