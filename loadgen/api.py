"""The load generator for programs: ``run(RunOptions(...))`` plays a workload; returns records and summary."""

from __future__ import annotations

import platform
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import trio

from loadgen import build, measures, rundir
from loadgen.arrivals import Arrivals
from loadgen.client import Client, Connect
from loadgen.errors import LoadgenError
from loadgen.measures import Rules, Window
from loadgen.options import RunOptions
from loadgen.records import Record
from loadgen.rundir import Run
from loadgen.runner import Manner, Outcome, Player, Progress
from loadgen.workload import Workload
from memserve import __version__

Watch = Callable[[Progress], Awaitable[None]]
"""Runs concurrently with the load and is cancelled at its end; a terminal, for example."""


def run(options: RunOptions, out: Path | None = None, watch: Watch | None = None) -> Run:
    """Play once, in a trio event loop of its own; see ``play``."""
    return trio.run(play, options, out, watch)


async def play(
    options: RunOptions,
    out: Path | None = None,
    watch: Watch | None = None,
    *,
    connect: Connect | None = None,
    signals: bool = False,
) -> Run:
    """Play a workload against a server; the records and the summary, also written to ``out`` if given.

    ``connect`` replaces dialing, for tests. With ``signals``, Ctrl-C and SIGTERM end the run early, and what
    was measured until then is kept. Raises LoadgenError for wrong options, and if no model is named and the
    server cannot list one.
    """
    work = build.workload(options.kind, options.workload)
    plan = build.arrivals(options.arrivals, work, options.workload.seed)
    rules = Rules(
        build.objectives(options.measures.slo), options.measures.stall_s, options.measures.lag_limit_ms
    )
    reference = rundir.read(options.measures.reference).records if options.measures.reference else None
    directory = rundir.fresh(out) if out else None
    client = Client(options.server.url, connect=connect)
    try:
        keys = [options.server.api_key, *build.keys(options.workload).values()]
        model = options.server.model or await served(client, next(filter(None, keys), ""))
        manner = _manner(options, model)
        started = datetime.now(UTC)
        outcome, records = await _played(options, work, plan, manner, client, directory, watch, signals)
    except BaseExceptionGroup as group:
        ours, others = group.split(LoadgenError)
        if ours is None or others is not None:
            raise
        raise _first(ours) from None
    finally:
        await client.aclose()
    summary = summarize(options, work, plan, manner, outcome, records, rules)
    summary["started"] = started.isoformat(timespec="seconds")
    if reference is not None:
        summary["reference"] = {
            "run": str(options.measures.reference),
            **measures.against(records, reference),
        }
    finished = Run(summary, records, directory)
    if directory:
        rundir.write_json(directory / rundir.SUMMARY, summary)
    return finished


def _first(group: BaseExceptionGroup[LoadgenError]) -> LoadgenError:
    """The first error in nested exception groups."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def served(client: Client, key: str) -> str:
    """The first model that a server lists. Raises LoadgenError if it lists none."""
    headers = [("Authorization", f"Bearer {key}")] if key else []
    listed = await client.get_json("/v1/models", headers)
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise LoadgenError("--model: the server lists no model; name one") from None


def _manner(options: RunOptions, model: str) -> Manner:
    given = options.server
    body: dict[str, Any] = {"temperature": given.temperature}
    if given.ignore_eos:
        body["ignore_eos"] = True
    # Prompts of token ids continue with the answer's ids.
    if given.token_ids or (options.workload.answers == "own" and options.workload.prompts == "ids"):
        body["return_token_ids"] = True
    return Manner(
        model=model,
        style=build.style(options),
        body=body | build.extra_body(given.body),
        api_key=given.api_key,
        tenant_keys=build.keys(options.workload),
        timeout_s=given.timeout_s,
        duration_s=options.arrivals.duration_s,
        drain_s=options.arrivals.drain_s,
        in_flight_max=options.arrivals.in_flight_max,
        keep_answers=options.measures.keep_answers,
    )


async def _played(
    options: RunOptions,
    work: Workload,
    plan: Arrivals,
    manner: Manner,
    client: Client,
    directory: Path | None,
    watch: Watch | None,
    signals: bool,
) -> tuple[Outcome, list[Record]]:
    records: list[Record] = []

    async def load(sink: Callable[[Record], None]) -> Outcome:
        filler = build.filler(options.workload)
        player = Player(work, plan, manner, client, filler, sink)
        async with trio.open_nursery() as nursery:
            if watch:
                nursery.start_soon(watch, player.progress)
            if signals:
                await nursery.start(_stopping, player)
            outcome = await player.play()
            nursery.cancel_scope.cancel()
        return outcome

    if directory is None:
        return await load(records.append), records
    with rundir.journal(directory) as file:

        def sink(record: Record) -> None:
            records.append(record)
            file.write(record.to_json() + b"\n")

        return await load(sink), records


async def _stopping(player: Player, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        task_status.started()
        async for _ in received:
            player.stop()


def window_of(options: RunOptions, outcome: Outcome) -> Window:
    """The measured window: from the end of the warm-up to that of the duration, or of the run if earlier."""
    ended = outcome.ended_s
    if options.arrivals.duration_s is not None:
        ended = min(ended, options.arrivals.duration_s)
    return Window(options.arrivals.warmup_s, max(ended, options.arrivals.warmup_s))


def identity(options: RunOptions, work: Workload, plan: Arrivals, manner: Manner) -> dict[str, Any]:
    """Everything that must be equal in two runs that are compared; the server is not part of it."""
    given = options.workload
    return {
        "workload": work.fingerprint(),
        "content": f"seed {given.seed}, salt {given.salt!r}, vocabulary {given.vocabulary}, {f'corpus {given.corpus.name}' if given.corpus else 'random words'}",
        "prompts": f"{manner.style.endpoint}, generated content as {manner.style.form}",
        "answers": manner.style.answers,
        "body": {name: value for name, value in manner.body.items() if name != "return_token_ids"},
        "arrivals": f"{plan.describe()}, seed {plan.seed}",
        "window": f"warm-up {options.arrivals.warmup_s:g} s, duration {options.arrivals.duration_s or 'whole'}",
    }


def summarize(
    options: RunOptions,
    work: Workload,
    plan: Arrivals,
    manner: Manner,
    outcome: Outcome,
    records: list[Record],
    rules: Rules,
) -> dict[str, Any]:
    """The summary as plain values."""
    window = window_of(options, outcome)
    lag = measures.send_lag(records, window, outcome.ticks_ms, rules)
    summary: dict[str, Any] = {
        "format": 1,
        "label": options.measures.label,
        "loadgen": __version__,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "server": {"url": options.server.url, "model": manner.model},
        "workload": {
            "kind": options.kind,
            "name": work.name,
            "sessions": len(work.sessions),
            "requests": work.requests,
            "options": work.options,
        },
        "identity": identity(options, work, plan, manner),
        "arrivals": {"text": plan.describe(), **attrs.asdict(plan)},
        "window": {"start_s": window.start_s, "end_s": window.end_s},
        "outcome": attrs.asdict(outcome, filter=attrs.filters.exclude("ticks_ms")),
        "lag": lag,
        "figures": measures.figures(records, window, rules),
        "tenants": measures.by_tenant(records, window, rules),
    }
    summary["warnings"] = warnings(options, summary)
    return summary


def warnings(options: RunOptions, summary: dict[str, Any]) -> list[str]:
    """Warnings that a reader must know before believing the figures."""
    lag, outcome, figures = summary["lag"], summary["outcome"], summary["figures"]
    found = []
    if lag["fell_behind"]:
        sent = lag["send_ms"]["p99"] if lag["send_ms"] else 0.0
        ticks = lag["tick_ms"]["p99"] if lag["tick_ms"] else 0.0
        found.append(
            f"The generator fell behind: the 99th percentile of its send lag is {sent:.0f} ms, of its clock's ticks "
            f"{ticks:.0f} ms, and the limit is {lag['limit_ms']:g} ms. Its latencies are not the server's."
        )
    if outcome["interrupted"]:
        found.append(f"The run was stopped after {outcome['ended_s']:.0f} s.")
    if outcome["overflowed"]:
        found.append(
            f"{outcome['overflowed']} sessions were not played: {options.arrivals.in_flight_max} were under way."
        )
    if outcome["abandoned"]:
        found.append(f"{outcome['abandoned']} requests were not sent: their session failed, or time ran out.")
    duration_s = options.arrivals.duration_s
    if duration_s is not None and outcome["last_due_s"] < 0.8 * duration_s and not outcome["interrupted"]:
        found.append(
            f"The workload ran out: its last request was due after {outcome['last_due_s']:.0f} s of {duration_s:g} s."
        )
    failed = figures["requests"] - figures["ok"]
    if failed:
        found.append(
            f"{failed} of {figures['requests']} measured requests failed; latencies are of the others."
        )
    if figures["uncounted_answers"] and not options.server.token_ids:
        found.append(
            f"{figures['uncounted_answers']} answers came without a count of their tokens: each of their events "
            "counts as one token."
        )
    if figures["short_answers"] and options.server.ignore_eos:
        found.append(
            f"{figures['short_answers']} answers were shorter than asked for, in spite of ignore_eos."
        )
    if not figures["requests"]:
        found.append("No request was due in the measured window.")
    return found
