"""The command line: run, sweep, compare, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, CycloptsError, Parameter

from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, Kind, MeasureOptions, RunOptions, ServerOptions, WorkloadOptions
from memserve import __version__

WORKLOAD, ARRIVALS, SERVER, MEASURES = WorkloadOptions(), ArrivalOptions(), ServerOptions(), MeasureOptions()
STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 130

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
    """Run one command; the exit status. A wrong command line or file is explained on stderr, without a traceback."""
    try:
        status = app(list(words), exit_on_error=False, print_error=False)
    except (LoadgenError, CycloptsError) as error:
        print(error, file=sys.stderr)
        return STATUS_USER_ERROR
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
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
) -> int:
    """Play one workload, and write its requests, summary and report."""
    from loadgen import api, terminal

    options = RunOptions(kind=workload, workload=given, arrivals=arrivals, server=server, measures=measures)
    directory = out or place(workload)
    watch = None if quiet else terminal.Live(options).watch
    done = trio.run(lambda: api.play(options, directory, watch, signals=True))
    terminal.summary(done)
    return STATUS_INTERRUPTED if done.summary["outcome"]["interrupted"] else 0


def place(kind: str) -> Path:
    """A directory's name for a run that begins now."""
    return Path("runs") / f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
