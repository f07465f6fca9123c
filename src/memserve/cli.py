"""The command line: the verbs for people.

Each imports its dependencies when it is called, so that --help is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

from memserve import __version__
from memserve.commands.cluster_options import ClusterOptions
from memserve.commands.sim_options import SimOptions
from memserve.errors import UserError

if TYPE_CHECKING:
    from memserve.inspect import Filter, Tally

STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 130
STATUS_BROKEN_PIPE = 141

app = App(
    name="memserve",
    help="Serve large language models from a pool of KV pages that outlives requests and workers.",
    version=__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

ConfigPath = Annotated[
    str,
    Parameter(
        name=["--config", "-c"], help="A TOML file, or the name of a configuration that comes with memserve."
    ),
]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="KEY=VALUE overrides the file's value, such as frontend.port=8123; may be repeated.",
    ),
]
Level = Literal["debug", "info", "warning", "error", "critical"]


def run(words: Sequence[str]) -> int:
    """Run one command; the exit status.

    A wrong command line or setting is explained on stderr, without a traceback.
    """
    try:
        status = app(list(words), exit_on_error=False, print_error=False)
        if sys.stdout is not None:  # None where the shell has closed it
            sys.stdout.flush()
    except (UserError, CycloptsError) as error:
        print(f"{error}{how_to_configure(words, error)}", file=sys.stderr)
        return STATUS_USER_ERROR
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left.
        discard_output()
        return STATUS_BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        discard_output()
        print(f"cannot write: {error.strerror}", file=sys.stderr)
        return STATUS_USER_ERROR
    return status if isinstance(status, int) else 0


def how_to_configure(words: Sequence[str], error: Exception) -> str:
    """How to give a configuration, for command lines such as ``up my.toml`` and ``up --port 8000``."""
    if not isinstance(error, UnknownOptionError | UnusedCliTokensError) or words[0] not in ("up", "check"):
        return ""
    return " A file is given with -c, as in -c cluster.toml; a setting with --set, as in --set frontend.port=8123."


def discard_output() -> None:
    """Send what stdout still holds to nowhere: Python would complain when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command
def up(*, config: ConfigPath = "demo", set_: Overrides = None) -> int:
    """Start a cluster and serve until Ctrl-C or SIGTERM; requests in flight are finished first."""
    from memserve import supervisor

    return supervisor.up(config, set_ or [])


@app.command
def join(
    head: Annotated[str, Parameter(show=False)] = "",
    /,
    *,
    name: str,
    role: Literal["prefill", "decode", "both"] = "both",
    shard: str = "",
    threads: int | None = None,
    config: Annotated[str | None, Parameter(name=["--config", "-c"])] = None,
    set_: Overrides = None,
    log_dir: Path | None = None,
) -> int:
    """Add a worker to a cluster on this host; returns when it has left. Ctrl-C drains it.

    Parameters
    ----------
    head
        Not supported: a cluster on another host is joined by `memserve up` with [cluster] join.
    name
        The worker's name; the cluster must not have it already.
    role
        The worker's role: prefill, decode or both.
    shard
        The shard whose pages it maps; needed if the cluster has several.
    threads
        Most cores that one of its steps may take; all if not given.
    config
        The configuration that the cluster was started with, for its [logging] dir.
    log_dir
        The [logging] dir of the cluster to find when no --config is given.
    """
    from memserve.processes import join

    if head:
        raise UserError(join.how_hosts_join(head))
    worker = {"name": name, "role": role, "shard": shard, "threads": threads}
    return join.join(worker, join.log_dir_of(config, set_ or [], log_dir))


@app.command
def key(file: Path, /) -> None:
    """Make the key of a cluster of several hosts, in a new private file; copy it to the other hosts.

    Parameters
    ----------
    file
        The file to write; [cluster] key names it.
    """
    from memserve.commands import show
    from memserve.settings import network
    from memserve.settings.rules import expanded

    network.make_key(expanded(file, "FILE"))
    show.say(f"{file} has a new key: copy it to every host of the cluster, and keep it private")


@app.command
def check(*, config: ConfigPath = "demo", set_: Overrides = None) -> None:
    """Check a configuration; print every setting, and what is derived from it on this machine and why."""
    from memserve.commands import show
    from memserve.config import settings
    from memserve.settings.configfile import load
    from memserve.settings.resolve import resolve

    written = load(config, set_ or [])
    resolved = resolve(written)
    rows = [
        (
            path,
            "(hidden)" if field.metadata["secret"] and value else setting_text(value),
            field.metadata["unit"],
        )
        for path, value, field in settings(written)
    ]
    show.table(("setting", "value", "unit"), rows)
    show.say("")
    show.table(("decided", "value", "because"), [(r.key, r.value, r.why) for r in resolved.reasons])


@app.command
def status(
    cluster: ClusterOptions | None = None, *, json: Annotated[bool, Parameter(negative=())] = False
) -> None:
    """List the actors of a running cluster: name, kind, role, site, pid, state and load.

    Parameters
    ----------
    json
        Print the cluster's answer as JSON, for machines.
    """
    from memserve.commands import show

    members = (cluster or ClusterOptions()).target().members()
    if json:
        print_json({"members": members})
    else:
        show.members(members)


@app.command
def role(
    name: str,
    role: Literal["prefill", "decode", "both", "auto"],
    /,
    cluster: ClusterOptions | None = None,
) -> None:
    """Give a running worker another role; requests in progress finish where they are.

    Parameters
    ----------
    name
        The worker, such as d1.
    role
        The worker's role for new requests: prefill, decode or both. auto restores the configured role,
        which the scheduler may change where [scheduler] roles is auto.
    """
    from memserve.commands import show

    (cluster or ClusterOptions()).target().change(name, {"role": role})
    show.say(f"{name} has the role {role} now" if role != "auto" else f"{name} has its own role again")


@app.command
def drain(name: str, /, cluster: ClusterOptions | None = None) -> None:
    """Let a worker finish the requests that it has and leave the cluster for good; returns when it has left.

    Parameters
    ----------
    name
        The worker, such as p1.
    """
    from memserve.commands import show

    target = (cluster or ClusterOptions()).target()
    target.change(name, {"drain": True})
    show.say(
        f"{name} takes no new request; waiting for those it has (Ctrl-C stops the waiting, not the drain)"
    )
    target.wait_gone(name)
    show.say(f"{name} has left")


@app.command
def logs(
    directory: Path = Path("logs"),
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative=())] = False,
    actor: str = "",
    level: Level = "debug",
    request: str = "",
    timeline: Annotated[bool, Parameter(negative=())] = False,
    summary: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Read a run's logs: all actors' lines in order of time, one request's timeline, or a summary.

    Parameters
    ----------
    directory
        A run's directory, or a [logging] dir, whose latest run is read.
    follow
        Continue with lines that are written from now on, until Ctrl-C.
    actor
        Only lines of this actor: a name such as p0, or the beginning of an id such as p0.9f3a1c22.
    level
        Only lines of this level and more severe ones.
    request
        Only lines about this request, given by its id or the beginning of it.
    timeline
        Show the events of the one --request across the actors.
    summary
        Show requests by outcome, latency percentiles, the cached share and what each worker did.
    json
        Print JSON: one line per record, or one object for --timeline and --summary.
    """
    from memserve import inspect
    from memserve.commands import show

    if timeline and not request:
        raise UserError("--timeline needs the --request whose life it should show")
    if timeline + summary + follow > 1:
        raise UserError("--timeline, --summary and --follow exclude each other: give one of them")
    run_dir, tally = inspect.find_run(directory), inspect.Tally()
    wanted = inspect.Filter(actor=actor, level=level, request=request)
    if actor and not follow:  # with --follow, the actor may start later
        inspect.check_actor(run_dir, actor)
    if timeline:
        life = inspect.timeline(inspect.read_run(run_dir, tally), request)
        print_json(life.to_dict()) if json else show.timeline(life)
    elif summary:
        facts = inspect.summarize(filter(wanted, inspect.read_run(run_dir, tally))).to_dict()
        print_json({"run": run_dir.name, **facts}) if json else show.summary(run_dir.name, facts)
    else:
        print_lines(run_dir, tally, wanted, follow, json)
    show.complain(tally.complaint())


@app.command
def sim(options: SimOptions | None = None) -> int:
    """Simulate a cluster in virtual time: plan capacity on a trace, compare policies, search for faults."""
    from memserve.commands import simulate

    return simulate.command(options or SimOptions(), print_json)


@app.command
def version() -> None:
    """Print the version."""
    print(__version__)


def print_lines(run_dir: Path, tally: Tally, wanted: Filter, follow: bool, json: bool) -> None:
    """Print the wanted records, as JSON or for people."""
    from memserve import inspect
    from memserve.commands import show

    read = inspect.follow if follow else inspect.read_run
    records = filter(wanted, read(run_dir, tally))
    if not json:
        show.records(records)
        return
    for record in records:
        print_json(record)


def print_json(value: Any) -> None:
    """Print one JSON value on one line."""
    from memserve.observe import to_json

    print(to_json(value).decode(), flush=True)


def setting_text(value: Any) -> str:
    """A setting's value as `memserve check` shows it."""
    if value in (None, ""):
        return "(unset)"
    return ", ".join(value) or "(none)" if isinstance(value, tuple) else str(value)
