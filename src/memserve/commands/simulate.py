"""`memserve sim`: turns the command line into simulation runs, and prints their reports."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from memserve.commands import show
from memserve.commands.sim_options import SimOptions
from memserve.config import Config
from memserve.engine.checkpoint import read_spec
from memserve.engine.spec import find_model
from memserve.errors import UserError
from memserve.scheduling.cost_model import CostModel
from memserve.scheduling.pricing import Weights
from memserve.settings.configfile import load
from memserve.settings.sections import ShardConfig
from memserve.sim import faults, fuzz
from memserve.sim.engines import PAPER
from memserve.sim.layout import HOST_CORES, Layout, ShardPlan, WorkerPlan, on_sites
from memserve.sim.report import Report, Spread
from memserve.sim.run import Run, simulate
from memserve.sim.workloads import KINDS, TRACE_BLOCK_TOKENS, Session, generated, read_trace
from memserve.sim.world import Violation

SLO_NAMES = ("ttft", "tpot", "jct")
VIOLATIONS_SHOWN = 10
REQUESTS = 300
"""Number of requests of a generated workload, unless given."""


# ---- the workload and the layouts ----------------------------------------------------------------------------


def sessions_of(asked: SimOptions) -> tuple[Session, ...]:
    """The requests that clients will send, by session. Raises UserError."""
    if (asked.trace is None) == (not asked.workload):
        raise UserError("give either --trace FILE or --workload")
    if asked.trace is not None:
        block_tokens = round(TRACE_BLOCK_TOKENS * asked.scale)
        if block_tokens < 1:
            raise UserError(
                f"--scale must leave a block of {TRACE_BLOCK_TOKENS} at least one token, not {asked.scale}"
            )
        return tuple(
            read_trace(asked.trace, block_tokens=block_tokens, speed=asked.speed, first=asked.requests)
        )
    if asked.workload not in KINDS:
        raise UserError(f"--workload must be one of {', '.join(KINDS)}, not {asked.workload!r}")
    requests = REQUESTS if asked.requests is None else asked.requests
    return tuple(generated(asked.workload, rate=asked.rate, requests=requests, seed=asked.seed))


def check_numbers(asked: SimOptions) -> None:
    """Raise UserError for a number that means nothing; NaN is none either."""
    for name in ("rate", "scale", "speed"):
        if not 0 < getattr(asked, name) < math.inf:
            raise UserError(f"--{name} must be above 0, and finite, not {getattr(asked, name):g}")
    for name in ("requests", "pages", "sites"):
        number = getattr(asked, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} must be at least 1, not {number}")
    if not 0 <= asked.error < 1:
        raise UserError(f"--error must be a share from 0 to below 1, not {asked.error:g}")


def layout_of(name: str, config: Config, pages: int | None) -> Layout:
    """The cluster that a configuration describes, with ``pages`` per shard or as many as its memory holds.

    Raises UserError.
    """
    spec = read_spec(find_model(config.model.path))
    page_bytes = spec.page_bytes(config.pool.page_tokens, config.model.dtype)
    shards = tuple(
        ShardPlan(
            shard.name,
            _pages(shard, pages, page_bytes),
            config.pool.host_bytes // page_bytes,
            config.pool.disk_bytes // page_bytes,
        )
        for shard in config.shard
    )
    return Layout(
        name=name,
        shards=shards,
        workers=tuple(WorkerPlan(one.name, one.role, one.shard or shards[0].name) for one in config.worker),
        frontends=config.frontend.count,
        schedulers=config.scheduler.count,
        policy=config.scheduler.policy,
        roles=config.scheduler.roles,
        weights=Weights(
            config.scheduler.ttft_weight,
            config.scheduler.others_weight,
            config.scheduler.handoff_margin_ms / 1e3,
        ),
        hold_back_s=config.scheduler.hold_back_s,
        held_max=config.scheduler.held_max,
        caching=config.cache.mode,
        page_tokens=config.pool.page_tokens,
        page_bytes=page_bytes,
        path=config.transfer_path,
        fetch_s=config.transfer.deadline_s,
        chunk_tokens=config.batch.chunk_tokens,
        rows=config.batch.rows,
        lease_s=config.pool.lease_s,
        requests_max=config.frontend.max_requests,
        swap_low=config.pool.swap_low,
        swap_high=config.pool.swap_high,
    )


def _pages(shard: ShardConfig, pages: int | None, page_bytes: int) -> int:
    if pages is not None or shard.memory is not None:
        return pages or (shard.memory or 0) // page_bytes
    raise UserError(
        f"the number of pages of shard {shard.name} is decided at its start: give it with --pages"
    )


def costs_of(path: Path | None) -> CostModel:
    """The costs of steps: a TOML table of StepCosts' figures, or those of the paper's machine.

    Raises UserError.
    """
    if path is None:
        return PAPER
    try:
        return CostModel.from_table(tomllib.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--costs {path} is not a table of step costs: {error}") from error


def runs_of(asked: SimOptions) -> list[Run]:
    """One run for each configuration and policy. Raises UserError."""
    check_numbers(asked)
    sessions, costs, kinds = sessions_of(asked), costs_of(asked.costs), faults.parse(asked.faults)
    found = []
    for name in asked.config:
        for policy in asked.policy.split(","):
            words = [*asked.overrides, f"scheduler.policy={policy}"] if policy else list(asked.overrides)
            config = load(name, words)
            layout = layout_of(Path(name).stem, config, asked.pages)
            if asked.sites is not None:
                on_gpus = any(shard.on_gpu for shard in config.shard)
                layout = on_sites(layout, asked.sites, 1.0 if on_gpus else HOST_CORES)
            found.append(
                Run(
                    layout=layout, sessions=sessions, seed=asked.seed, costs=costs, faults=kinds, error=asked.error,
                    checked=asked.checked, serial=asked.serial,
                )
            )  # fmt: skip
    return found


# ---- the command ---------------------------------------------------------------------------------------------


def command(asked: SimOptions, print_json: Callable[[Any], None]) -> int:
    """Run the simulations that the options ask for; the exit status. Raises UserError."""
    if asked.runs is not None:
        if asked.runs < 1:
            raise UserError(f"--runs must be at least 1, not {asked.runs}")
        found = search(asked.seed, asked.runs, asked.faults, asked.jobs)
        if not asked.json:
            show_search(found, asked.faults)
        for outcome in found if asked.json else ():
            print_json(outcome)
        return int(any(outcome.violation for outcome in found))
    slo = parse_slo(asked.slo)
    reports = run(asked)
    if not asked.json:
        show_reports(reports, slo)
    for one in reports if asked.json else ():
        print_json({**one.to_dict(), **({"meets_slo": one.meets(slo)} if slo else {})})
    return 0


# ---- running and showing -------------------------------------------------------------------------------------


def run(asked: SimOptions) -> list[Report]:
    """One report for each layout and policy.

    Raises UserError for a wrong command line, and when an invariant breaks.
    """
    reports = []
    for one in runs_of(asked):
        try:
            reports.append(simulate(one))
        except Violation as broken:
            again = f"--seed {one.seed} --faults {asked.faults}"
            raise UserError(f"{one.layout.name}, {one.layout.policy} ({again}): {broken}") from broken
    return reports


def parse_slo(words: str) -> dict[str, float]:
    """The limits of the P99 in seconds by name, from text like ``ttft=0.5,tpot=0.05``. Raises UserError."""
    found: dict[str, float] = {}
    for word in filter(None, words.split(",")):
        name, _, seconds = word.partition("=")
        try:
            found[name.strip()] = float(seconds)
        except ValueError:
            raise UserError(f"--slo must be like ttft=0.5,tpot=0.05 (seconds), not {word!r}") from None
    if unknown := found.keys() - set(SLO_NAMES):
        raise UserError(f"--slo must use the names {', '.join(SLO_NAMES)}, not {sorted(unknown)[0]!r}")
    return found


def show_reports(reports: Sequence[Report], slo: dict[str, float]) -> None:
    """Print one run in full, or several side by side."""
    if len(reports) == 1 and not slo:
        show_one(reports[0])
        return
    head = (
        "layout",
        "policy",
        "TTFT mean",
        "TTFT p99",
        "TPOT p99",
        "JCT mean",
        "JCT p99",
        "hit",
        "imbalance",
        "errors",
    )
    rows = [
        (
            one.layout, one.policy, ms(one.ttft_s.mean), ms(one.ttft_s.p99), ms(one.tpot_s.p99), ms(one.jct_s.mean),
            ms(one.jct_s.p99), f"{one.hit_share:.1%}", f"{one.imbalance:.2f}", str(errors(one)),
            *([("yes" if one.meets(slo) else "no")] if slo else []),
        )
        for one in reports
    ]  # fmt: skip
    show.table((*head, *(["meets the SLO"] if slo else [])), rows, "milliseconds")


def show_one(one: Report) -> None:
    """Print everything about one run."""
    outcomes = ", ".join(f"{name} {number}" for name, number in one.outcomes.items())
    show.say(
        f"{one.layout}, {one.policy}, seed {one.seed}: {one.virtual_s:.1f} virtual seconds, {one.events} events"
    )
    show.say(f"requests: {one.requests} ({outcomes}), {one.resubmissions} resubmitted")
    show.say(
        f"tokens: {one.prompt_tokens} in, {one.cached_tokens} of them cached ({one.hit_share:.1%}), {one.output_tokens} out"
    )
    show.say(
        f"bytes: {one.handed_over_bytes} handed over in place, {one.moved_bytes} moved between shards, "
        f"{one.swapped_bytes} between tiers; {one.evicted_pages} pages evicted"
    )
    if one.faults:
        show.say(
            "faults: "
            + ", ".join(f"{name} {number}" for name, number in one.faults.items())
            + f"; {one.deaths} deaths"
        )
    rows = [
        (name, *(ms(value) for value in attrs.astuple(spread)))
        for name, spread in (("TTFT", one.ttft_s), ("TPOT", one.tpot_s), ("JCT", one.jct_s))
        if spread != Spread(0.0, 0.0, 0.0, 0.0)
    ]
    show.table(("ms", "mean", "p50", "p90", "p99"), rows)
    workers = [
        (
            each.name,
            each.role,
            f"{each.busy:.1%}",
            str(each.steps),
            str(each.prefill_tokens),
            str(each.decode_tokens),
        )
        for each in one.workers
    ]
    show.table(("worker", "role", "busy", "steps", "prompt tokens", "decode tokens"), workers)
    show.say(f"event log {one.digest}")


def ms(seconds: float) -> str:
    """Seconds as milliseconds, for people."""
    return f"{seconds * 1e3:.1f}"


def errors(one: Report) -> int:
    """How many requests ended without all of their tokens, other than by their clients."""
    return sum(number for name, number in one.outcomes.items() if name not in ("length", "cancelled"))


# ---- many seeds ----------------------------------------------------------------------------------------------


def search(first: int, runs: int, words: str, jobs: int) -> list[fuzz.Outcome]:
    """Outcomes of ``runs`` small clusters with faults, one per seed, in ``jobs`` processes."""
    seeds, one = range(first, first + runs), partial(fuzz.fuzz, kinds=faults.parse(words))
    if jobs <= 1:
        return [one(seed) for seed in seeds]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(one, seeds, chunksize=16))


def show_search(found: Sequence[fuzz.Outcome], words: str) -> None:
    """Print the results of all seeds."""
    bad = [one for one in found if one.violation]
    for one in bad[:VIOLATIONS_SHOWN]:
        show.say(f"memserve sim --faults {words} --runs 1 --seed {one.seed}: {one.violation}")
    outcomes: dict[str, int] = {}
    for one in found:
        for name, number in one.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + number
    totals = (
        f"{sum(one.virtual_s for one in found):.0f} virtual seconds, {sum(one.events for one in found)} events, "
        f"{sum(one.checks for one in found)} checks, {sum(one.deaths for one in found)} deaths, "
        f"{sum(one.resubmissions for one in found)} resubmissions"
    )
    show.say(f"{len(found)} runs, {len(bad)} with a violation: {totals}")
    show.say("requests: " + ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items())))
