"""memserve compared with its peers: ``make bench-peers``.

Each round starts every server in turn, alone, on the same cores, with the same weights in bfloat16. It warms
the server up and runs the workloads of ``peer_workloads.py`` on it with the load generator, which uses the
same cores. ``make peers`` installs the peers; a missing one is left out, and the note says so. Writes
docs/measurements/<date>-peers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

import asking
from install_peers import default_folder
from loadgen.arrivals import Arrivals
from loadgen.conversation import one_turn
from loadgen.errors import LoadgenError
from loadgen.records import Record
from loadgen.workload import Session, Workload
from notes import Note, number, table
from peer_servers import Absent, NotReady, Server, find_servers, running
from peer_workloads import CASES, Case, Figure, Wrong

PROMPT = "The three states of matter are"
"""A prompt that every server answers, to show that all run the same weights."""
SAME_TOKENS = 24
OURS = "memserve"


@attrs.define
class Measured:
    """One server's results over all rounds."""

    server: Server
    samples: dict[str, list[float]] = attrs.field(factory=dict)
    """All samples of each row, by :func:`row_name`."""
    failed: dict[str, str] = attrs.field(factory=dict)
    """Cases without figures: the reason, by the case's name."""
    answer: str = ""
    """The server's answer to PROMPT."""

    def value(self, case: Case, figure: Figure) -> float | None:
        """The median, or None if the case failed or has no samples."""
        found = self.samples.get(row_name(case, figure))
        return statistics.median(found) if found and case.name not in self.failed else None


def row_name(case: Case, figure: Figure) -> str:
    """Label of a row of the table."""
    return f"{case.name}: {figure.name}, {figure.unit}"


# ---- asking --------------------------------------------------------------------------------------------------


async def play(
    url: str, server: Server, sessions: tuple[Session, ...], clients: int, seed: int = 0
) -> list[Record]:
    """Play sessions against a server; a record for each request."""
    work, arrivals = Workload("peers", sessions), Arrivals("closed", clients=clients)
    return await asking.ask(url, work, arrivals, form="text", body=server.body, model=server.model, seed=seed)


async def play_until(
    ends_at: float, url: str, server: Server, sessions: tuple[Session, ...], clients: int
) -> list[Record]:
    """Like :func:`play`, but raises Wrong once ``time.monotonic()`` reaches ``ends_at``."""
    with trio.move_on_after(max(0.0, ends_at - time.monotonic())):
        return await play(url, server, sessions, clients)
    raise Wrong("not done within --server-s of a round")


def ask(url: str, measured: Measured, case: Case, key: str, ends_at: float) -> dict[str, float]:
    """Run a case once; its figures by row. A case that has failed before is not run again and has none."""
    if case.name in measured.failed:
        return {}
    try:
        records = trio.run(play_until, ends_at, url, measured.server, case.sessions(key), case.clients)
        case.check(records)
        return {row_name(case, figure): figure.read(records) for figure in case.figures}
    except (Wrong, LoadgenError) as error:
        measured.failed[case.name] = str(error)
        return {}


def run_round(measured: Measured, cases: Sequence[Case], turn: int, logs: Path, server_s: float) -> None:
    """Start a server, warm it up, run the cases that fit into ``server_s`` seconds, and stop it."""
    server = measured.server
    with tempfile.TemporaryDirectory() as scratch:
        log = logs / f"{server.name.replace(' ', '-')}-{turn}.log"
        with running(server, log, Path(scratch)) as url:
            [said] = trio.run(play, url, server, (one_turn("same", PROMPT, SAME_TOKENS),), 1)
            measured.answer = said.answer or f"({said.error}: {said.detail})"
            ends_at = time.monotonic() + server_s
            for case in cases[:4]:  # start threads, page code in, compile shapes
                ask(url, measured, case, "warm-up", ends_at)
            for case in cases:
                for repeat in range(case.repeats):
                    key = f"{turn}.{repeat} {case.name}"
                    for row, value in ask(url, measured, case, key, ends_at).items():
                        measured.samples.setdefault(row, []).append(value)


def measure(
    servers: Sequence[Server], cases: Sequence[Case], rounds: int, logs: Path, server_s: float
) -> Iterator[tuple[int, list[Measured]]]:
    """Measure all servers in rounds, each round starting with a different server.

    After each round, yields the number of rounds done and all results so far.
    """
    found = [Measured(one) for one in servers]
    for turn in range(rounds):
        for one in found[turn % len(found) :] + found[: turn % len(found)]:
            print(f"round {turn + 1} of {rounds}: {one.server.name}", flush=True)
            try:
                run_round(one, cases, turn, logs, server_s)
            except NotReady as error:
                one.failed |= {case.name: f"did not start: {error}" for case in cases}
            for name, why in one.failed.items():
                print(f"  failed: {name}: {why}", flush=True)
        yield turn + 1, found


# ---- the note ------------------------------------------------------------------------------------------------


def best_peer(case: Case, figure: Figure, found: Sequence[Measured]) -> float | None:
    """The best value of a row among the servers other than memserve."""
    values = [one.value(case, figure) for one in found if not one.server.name.startswith(OURS)]
    known = [one for one in values if one is not None]
    return (max if figure.higher_is_better else min)(known) if known else None


def ahead(value: float | None, best: float | None, figure: Figure) -> float | None:
    """How many times better ``value`` is than ``best``: more than 1 is ahead, for rates and for times."""
    if value is None or best is None:
        return None
    return value / best if figure.higher_is_better else best / value


def cell(measured: Measured, case: Case, figure: Figure) -> str:
    """A cell of the table: median and range."""
    value = measured.value(case, figure)
    if value is None:
        return "failed" if case.name in measured.failed else "not run"
    samples = measured.samples[row_name(case, figure)]
    return f"{number(value)} ({number(min(samples))} to {number(max(samples))})"


def results(found: Sequence[Measured], cases: Sequence[Case]) -> str:
    """The table: a row per figure, a column per server, and how far memserve is ahead of the best peer."""
    ours = [one for one in found if one.server.name.startswith(OURS)]
    head = ["", *(one.server.name for one in found), *(f"{one.server.name} / best peer" for one in ours)]
    rows = []
    for case in cases:
        for figure in case.figures:
            best = best_peer(case, figure, found)
            ratios = [ahead(one.value(case, figure), best, figure) for one in ours]
            shown = [f"**{one:.2f}**" if one is not None else "" for one in ratios]
            rows.append([row_name(case, figure), *(cell(one, case, figure) for one in found), *shown])
    return table(head, rows)


def remarks(found: Sequence[Measured], absent: Sequence[Absent]) -> str:
    """How each server was run, which servers were left out, what failed, and how each answered PROMPT."""
    lines = [f"- **{one.server.name}**: {one.server.what}." for one in found]
    lines += [f"- {one.name} is left out: {one.why}." for one in absent]
    lines += [
        f"- {one.server.name}, {name}: failed: {' '.join(why.split())[:300]}"
        for one in found
        for name, why in one.failed.items()
    ]
    answers: dict[str, list[str]] = {}
    for one in found:
        answers.setdefault(one.answer, []).append(one.server.name)
    lines += [f"- {', '.join(names)} answered {PROMPT!r} with {text!r}." for text, names in answers.items()]
    return "\n".join(lines)


def draw(found: Sequence[Measured], cases: Sequence[Case], path: Path) -> None:
    """Plot every server's figures relative to the best peer's; further right is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(case, figure) for case in cases for figure in case.figures]
    figure_, axes = pyplot.subplots(figsize=(10, 0.5 * len(rows) + 1.5), layout="constrained")
    for one in found:
        relative = [ahead(one.value(*row), best_peer(*row, found), row[1]) for row in rows]
        shown = [(value, y) for y, value in enumerate(relative) if value is not None]
        mark = "D" if one.server.name.startswith(OURS) else "o"
        axes.plot([x for x, _ in shown], [y for _, y in shown], mark, label=one.server.name, alpha=0.8)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times the best peer: to the right of 1 is better")
    axes.set_yticks(range(len(rows)), [row_name(*row) for row in rows])
    axes.invert_yaxis()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path)
    pyplot.close(figure_)


def write_note(
    found: Sequence[Measured], absent: Sequence[Absent], cases: Sequence[Case], command: str, rounds: int
) -> Path:
    """Write docs/measurements/<date>-peers.md with its plot."""
    note = Note("peers")
    plot = note.plot("ratios")
    draw(found, cases, plot)
    return note.write(
        "memserve compared with its peers",
        command,
        f"One server at a time, the load generator on the same cores, {rounds} interleaved rounds; medians (range). Greedy, "
        "answers of fixed length, the same prompts for all; token counts were checked in every answer. In the last columns "
        "more than 1 is memserve ahead, for rates and for times.",
        results(found, cases),
        remarks(found, absent),
        f"![relative to the best peer]({plot.name})",
    )


# ---- the command ---------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An integer of at least 1. Raises ValueError, which argparse reports."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="where `make peers` installed them"
    )
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument(
        "--server-s",
        type=positive,
        default=900,
        help="seconds for one server in one round; then it has failed",
    )
    parser.add_argument("--servers", default="", help="only these, by comma")
    parser.add_argument("--cases", default="", help="only rows whose name has one of these in it, by comma")
    parser.add_argument("--cores", default="", help="such as 0,1; unset: all that this process may use")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    parser.add_argument("--logs", type=Path, help="keep what the servers print in this folder")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> tuple[list[Server], list[Absent], list[Case]]:
    """Servers to run, peers to leave out, and cases. Ends the program if a server's name is unknown."""
    everyone = find_servers(options.folder, sorted(os.sched_getaffinity(0)))
    names = [one for one in options.servers.split(",") if one]
    if unknown := set(names) - {one.name for one in everyone}:
        sys.exit(f"--servers: {', '.join(unknown)} is not one of {', '.join(one.name for one in everyone)}")
    wanted = [one for one in everyone if not names or one.name in names]
    parts = options.cases.split(",")
    cases = [case for case in CASES if any(part in case.name for part in parts)]
    servers = [one for one in wanted if isinstance(one, Server)]
    return servers, [one for one in wanted if isinstance(one, Absent)], cases


def command_of(options: argparse.Namespace) -> str:
    """The command that repeats this run, without the paths of this machine."""
    usual = options_of([])
    names = [
        one
        for one in ("rounds", "servers", "cases", "cores", "server_s")
        if getattr(options, one) != getattr(usual, one)
    ]
    words = " ".join(f"--{one.replace('_', '-')} '{getattr(options, one)}'" for one in names)
    return f'make bench-peers ARGS="{words}"' if words else "make bench-peers"


def samples_of(found: Sequence[Measured]) -> dict[str, Any]:
    """Everything measured, by server."""
    return {
        one.server.name: {"samples": one.samples, "failed": one.failed, "answer": one.answer} for one in found
    }


def main() -> None:
    """Measure and write the note."""
    # When SIGTERM ends this process, it must still stop the server that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = options_of(sys.argv[1:])
    if options.cores:
        os.sched_setaffinity(0, {int(one) for one in options.cores.split(",")})
    servers, absent, cases = chosen(options)
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        # The note is written after each round, so that an interrupted run keeps its results.
        for done, found in measure(servers, cases, options.rounds, logs, options.server_s):
            path = write_note(found, absent, cases, command_of(options), done)
            if options.json:
                options.json.write_text(json.dumps(samples_of(found), indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
