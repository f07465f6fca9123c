"""What the commands print: tables and timelines, coloured on a terminal and plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memserve.inspect import Record, Timeline, bar, data_of, name_of

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 32
PLAIN_COLUMN_GAP = "  "
STYLES = {"warning": "yellow", "error": "bold red", "critical": "bold red", "debug": "dim"}


def console() -> Console | None:
    """A console for the terminal, or None when output goes to a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    from rich.console import Console

    return Console(highlight=False)


def say(text: str) -> None:
    """Print one line on standard output."""
    print(text)


def complain(text: str) -> None:
    """Print one line on standard error, for text that is not part of the answer."""
    if text:
        print(text, file=sys.stderr)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print rows under a head.

    On a terminal, columns that are too wide are folded; in a pipe, nothing is cut.
    """
    if (screen := console()) is None:
        plain_table(head, list(rows), title)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*head, box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for row in rows:
        drawn.add_row(*map(Text, row))
    screen.print(drawn)


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print columns padded with blanks, for pipes."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if title:
        say(title)
    for row in (head, *rows):
        say(
            PLAIN_COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def pairs(data: Mapping[str, Any]) -> str:
    """``key=value`` for each entry that is not None, with shortened figures."""
    return " ".join(f"{key}={figure(value)}" for key, value in data.items() if value is not None)


def figure(value: Any) -> str:
    """A value for people: three decimals at most, text with blanks quoted, exceptions by their message."""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list) and value and isinstance(value[0], dict) and "exc_type" in value[0]:
        return "; ".join(f"{each['exc_type']}: {each.get('exc_value', '')}" for each in value)
    text = str(value)
    return repr(text) if any(c.isspace() or not c.isprintable() for c in text) else text


# ---- logs ----------------------------------------------------------------------------------------------------


def records(lines: Iterable[Record]) -> None:
    """Print log lines as they arrive."""
    screen = console()
    for record in lines:
        text = log_line(record)
        if screen is None:
            print(text, flush=True)
        else:
            screen.print(text, style=STYLES.get(record.get("level", ""), ""), markup=False, soft_wrap=True)


def log_line(record: Record) -> str:
    """One record on one line: local time, level, actor, event, request, data."""
    try:
        moment = f"{datetime.fromisoformat(record['ts']).astimezone():%H:%M:%S.%f}"[:-3]
    except ValueError:
        moment = str(record["ts"])
    request = f" {record['request']}" if record.get("request") else ""
    who = name_of(str(record.get("actor", "")))
    return f"{moment} {record.get('level', ''):7} {who:12} {record['event']}{request} {pairs(data_of(record))}".rstrip()


def timeline(life: Timeline) -> None:
    """Print a request's events, each with a bar for the time until the next one."""
    rows = [
        (
            f"{moment.at_ms:.1f}",
            moment.actor,
            bar(moment.at_ms, moment.until_ms, life.total_ms, BAR_WIDTH),
            moment.event,
            pairs(moment.data),
        )
        for moment in life.moments
    ]
    table(
        ("ms", "actor", "until the next event", "event", "data"),
        rows,
        f"request {life.request}: {life.total_ms:.1f} ms",
    )


def summary(run: str, facts: Record) -> None:
    """Print a run's summary."""
    requests, outcomes = facts["requests"], facts["requests"]["outcomes"]
    say(f"run {run}: {facts['elapsed_s']:.1f} s, {len(facts['actors'])} actors")
    resubmitted = f", {requests['resubmitted']} resubmitted" if requests["resubmitted"] else ""
    say(f"requests: {requests['received']} received, {requests['finished']} finished, "
        f"{requests['unfinished']} unfinished{resubmitted}")  # fmt: skip
    if outcomes:
        say("outcomes: " + ", ".join(f"{name} {count}" for name, count in outcomes.items()))
    share = f"{facts['cached_share']:.1%}"
    say(
        f"tokens: {facts['prompt_tokens']} in, {facts['cached_tokens']} of them cached ({share}), {facts['output_tokens']} out"
    )
    names = (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("total", "total_ms"))
    rows = [(name, *(f"{value:.1f}" for value in facts[key].values())) for name, key in names if facts[key]]
    if rows:
        table(("ms", "p50", "p90", "p99"), rows)
    if facts["workers"]:
        counts = [(name, str(of["prefills"]), str(of["decodes"])) for name, of in facts["workers"].items()]
        table(("worker", "prefills", "decodes"), counts)
    if facts["troubles"]:
        table(
            ("warnings and errors", "lines"),
            [(name, str(count)) for name, count in facts["troubles"].items()],
        )


# ---- the cluster ---------------------------------------------------------------------------------------------

LOAD_SHOWN = ("requests_open", "requests_running", "requests_waiting", "requests_held", "waiting_tokens")
"""Gauges that status shows by name and value."""


def members(found: Sequence[Record]) -> None:
    """Print the actors of a running cluster."""
    several = any(member.get("host") for member in found)
    rows = [
        (
            name_of(member["id"]),
            member["kind"],
            role(member),
            *([member.get("host", "")] if several else []),
            (member.get("site") or {}).get("key", ""),
            str(member["pid"]),
            member["state"] + (", joined" if member.get("joined") else ""),
            load(member.get("load") or {}),
        )
        for member in sorted(found, key=lambda member: (member["kind"], member["id"]))
    ]
    host = ("host",) if several else ()
    table(("name", "kind", "role", *host, "site", "pid", "state", "load"), rows)


def role(member: Record) -> str:
    """A worker's role, who gave it if its configuration did not, and the role that it is about to take."""
    given = {"hand": " by hand", "scheduler": " by the scheduler"}.get(member.get("role_by", ""), "")
    wanted = f", wanted: {member['role_wanted']}" if member.get("role_wanted") else ""
    return f"{member.get('role', '')}{given}{wanted}"


def load(gauges: Mapping[str, float]) -> str:
    """A member's load in a few words."""
    shown = [f"{name.replace('_', ' ')} {gauges[name]:.0f}" for name in LOAD_SHOWN if name in gauges]
    if total := gauges.get("pages_total"):
        used = total - gauges.get("pages_free", 0) - gauges.get("pages_evictable", 0)
        cached = gauges.get("pages_indexed", 0)
        shown.append(
            f"pages {used:.0f} in use, {cached:.0f} cached, {gauges.get('pages_free', 0):.0f} free of {total:.0f}"
        )
    shown += [
        f"{tier} {gauges.get(f'{tier}_pages_indexed', 0):.0f} cached of {total:.0f}"
        for tier in ("host", "disk")
        if (total := gauges.get(f"{tier}_pages_total"))
    ]
    return ", ".join(shown)
