"""The summary of a run: latencies, cache reuse, bytes moved, and what each worker did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from memserve.mempool.pool import Pool
from memserve.percentiles import percentile
from memserve.sim.clients import Call, Clients
from memserve.sim.cluster import SimCluster
from memserve.tokens import count

PERCENTS = (50, 90, 99)


@attrs.frozen
class Spread:
    """Mean and percentiles of some durations, in seconds; all 0 if there are none."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of ``seconds``; percentiles by nearest rank."""
        if not seconds:
            return cls(0.0, 0.0, 0.0, 0.0)
        ordered = sorted(seconds)
        return cls(sum(ordered) / len(ordered), *(percentile(ordered, percent) for percent in PERCENTS))


@attrs.frozen
class WorkerReport:
    """One worker, over all of its incarnations."""

    name: str
    role: str
    steps: int
    busy: float
    """Share of the time from the first request to the end of the last answer in which a step ran."""
    prefill_tokens: int
    decode_tokens: int


@attrs.frozen(kw_only=True)
class Report:
    """The summary of one run. Equal seeds and inputs give equal reports, byte for byte."""

    layout: str
    policy: str
    seed: int
    requests: int
    outcomes: dict[str, int]
    ttft_s: Spread
    tpot_s: Spread
    jct_s: Spread
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    resubmissions: int
    handed_over_bytes: int
    """KV bytes of requests that changed their worker within a shard, which moves nothing."""
    moved_bytes: int
    """KV bytes copied between shards."""
    swapped_bytes: int
    """KV bytes copied between tiers."""
    evicted_pages: int
    workers: tuple[WorkerReport, ...]
    imbalance: float
    """The busiest worker's time in steps over the mean of its role's workers; the highest of all roles."""
    faults: dict[str, int]
    deaths: int
    virtual_s: float
    events: int
    messages: dict[str, int]
    digest: str
    """Digest of the event log."""

    @property
    def hit_share(self) -> float:
        """Share of prompt tokens that were found in a cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def meets(self, slo: dict[str, float]) -> bool:
        """Whether every P99 that ``slo`` names (ttft, tpot, jct) is within its seconds.

        Every request must also have been answered, or cancelled by its client.
        """
        found = {"ttft": self.ttft_s, "tpot": self.tpot_s, "jct": self.jct_s}
        answered = set(self.outcomes) <= {"length", "cancelled"}
        return answered and all(found[name].p99 <= most for name, most in slo.items())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**attrs.asdict(self), "hit_share": self.hit_share}


def report(cluster: SimCluster, clients: Clients, seed: int, faults: dict[str, int], warm: int = 0) -> Report:
    """Summarize a run, without its first ``warm`` requests."""
    calls = clients.calls[warm:]
    done = [call for call in calls if call.complete]
    world, pools = cluster.world, list(cluster.pools().values())
    workers = _workers(cluster, _loaded_s(clients.calls))
    outcomes: dict[str, int] = {}
    for call in calls:
        outcomes[call.outcome] = outcomes.get(call.outcome, 0) + 1
    return Report(
        layout=cluster.layout.name,
        policy=cluster.layout.policy,
        seed=seed,
        requests=len(calls),
        outcomes=dict(sorted(outcomes.items())),
        ttft_s=Spread.of([call.first_at - call.asked_at for call in done]),
        tpot_s=Spread.of([tpot_s(call) for call in done if count(call.answer) > 1]),
        jct_s=Spread.of([call.last_at - call.asked_at for call in done]),
        prompt_tokens=sum(count(call.prompt) for call in done),
        cached_tokens=sum(call.cached_tokens for call in done),
        output_tokens=sum(count(call.answer) for call in done),
        resubmissions=sum(call.attempts - 1 for call in calls),
        handed_over_bytes=_pages(pools, "handed_over_pages") * cluster.layout.page_bytes,
        moved_bytes=cluster.movers.moved_bytes,
        swapped_bytes=sum(pool.room.swaps.in_pages + pool.room.swaps.out_pages for pool in pools)
        * cluster.layout.page_bytes,
        evicted_pages=sum(pool.room.evicted_pages for pool in pools),
        workers=workers,
        imbalance=_imbalance(workers),
        faults=dict(sorted(faults.items())),
        deaths=cluster.deaths,
        virtual_s=world.now,
        events=world.events,
        messages=dict(sorted(world.messages.items())),
        digest=world.digest,
    )


def tpot_s(call: Call) -> float:
    """Mean seconds from one token to the next."""
    return (call.last_at - call.first_at) / (count(call.answer) - 1)


def _pages(pools: Sequence[Pool], name: str) -> int:
    return sum(int(getattr(pool.counters, name)) for pool in pools)


def _loaded_s(calls: Sequence[Call]) -> float:
    """Seconds from the first request to the end of the last answer: the cluster's start and end are not load."""
    ended = max((max(call.asked_at, call.last_at) for call in calls), default=0.0)
    return max(ended - min((call.asked_at for call in calls), default=0.0), 1e-9)


def _workers(cluster: SimCluster, loaded_s: float) -> tuple[WorkerReport, ...]:
    return tuple(
        WorkerReport(
            plan.name,
            plan.role,
            one.steps,
            min(1.0, one.busy_s / loaded_s),
            one.prefill_tokens,
            one.decode_tokens,
        )
        for plan in cluster.layout.workers
        if (one := cluster.busy.get(plan.name)) is not None
    )


def _imbalance(workers: Sequence[WorkerReport]) -> float:
    worst = 1.0
    for role in {one.role for one in workers}:
        busy = [one.busy for one in workers if one.role == role]
        mean = sum(busy) / len(busy)
        worst = max(worst, max(busy) / mean if mean else 1.0)
    return worst
