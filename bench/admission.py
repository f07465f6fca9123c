"""Measure the costs and benefits of holding requests back in the scheduler, in the simulator.

The parts are a flood next to a calm tenant, priorities, deadlines under overload, and latencies by
``scheduler.hold_back_s``. Writes docs/measurements/<date>-admission.md.

Everything is seeded: the same commit gives the same figures on any machine. A full run takes a quarter of an
hour. To measure in pieces, run ``--only PART --json FILE`` for each part, then ``--merge FILE...``.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from memserve.percentiles import percentile
from memserve.sim.audit import Audit
from memserve.sim.clients import Call, Clients
from memserve.sim.layout import Layout, fixed, on_sites
from memserve.sim.run import READY_S, Run
from memserve.sim.workloads import Piece, Session, Turn, generated
from notes import Note, commit, merged, save, table, take_pieces

HOLD_BACKS_S = (0.2, 1.0, 3.0, 3600.0)
CALM_RATE = 2.0
CALM_S = 20.0
FLOOD = 200
ROWS = 64


def layout(kind: str, hold_back_s: float = 1.0, instances: int = 4) -> Layout:
    """A fixed layout of ``instances`` instances."""
    return fixed(kind, instances, pages=12_000, rows=ROWS, hold_back_s=hold_back_s, held_max=100_000)


def play(
    sessions: Iterable[Session], where: Layout, seed: int, noise: Mapping[str, float] | None = None
) -> list[Call]:
    """Run the sessions and return all requests. ``noise``: factor on the step times, by worker."""
    run = Run(layout=where, sessions=tuple(sessions), seed=seed)
    cluster = run.cluster()
    cluster.noise |= noise or {}
    later = [attrs.evolve(one, at_s=one.at_s + READY_S) for one in run.sessions]
    clients = Clients(cluster, later, seed)
    cluster.start()
    Audit(cluster, 0).finish(clients, math.inf)
    return clients.calls


def single(name: str, at_s: float, prompt: int, answer: int, **more: object) -> Session:
    """A session of one request that shares no prefix with any other."""
    return Session(name, at_s, (Turn((Piece(name, prompt),), answer),), **more)  # type: ignore[arg-type]


def flood_and_calm(seed: int, **calm: object) -> list[Session]:
    """``FLOOD`` requests at once, and ``CALM_RATE`` requests a second with the fields in ``calm``."""
    rng = random.Random(f"{seed}/flood")
    flood = [
        single(f"flood/{i}", 1.0, rng.randint(500, 3000), rng.randint(50, 400), scope="flood")
        for i in range(FLOOD)
    ]
    made, at = [], 0.0
    while at < CALM_S:
        at += rng.expovariate(CALM_RATE)
        made.append(single(f"calm/{len(made)}", at, rng.randint(100, 1500), rng.randint(50, 400), **calm))
    return flood + made


# ---- figures -----------------------------------------------------------------------------------------------


def ttft_s(call: Call) -> float:
    return call.first_at - call.asked_at


def shown(values: Sequence[float]) -> str:
    """Median and 99th percentile in seconds, as text."""
    ordered = sorted(values)
    return f"{percentile(ordered, 50):.2f}; {percentile(ordered, 99):.2f}" if values else "none"


def next_to_a_flood(seeds: Sequence[int], **calm: object) -> str:
    """A table of the TTFT of both tenants, and of the time at which the flood has been answered."""
    rows = []
    for kind in ("colocated", "2P2D"):
        for hold_back_s in HOLD_BACKS_S:
            calls = [
                call
                for seed in seeds
                for call in play(flood_and_calm(seed, **calm), layout(kind, hold_back_s), seed)
            ]
            mine = [ttft_s(one) for one in calls if one.id.startswith("calm")]
            flood = [one for one in calls if one.id.startswith("flood")]
            done = max(one.last_at for one in flood) - READY_S
            held = "not held back" if hold_back_s > 1000 else f"{hold_back_s:g} s"
            rows.append([kind, held, shown(mine), shown([ttft_s(one) for one in flood]), f"{done:.1f}"])
    head = [
        "layout",
        "hold_back_s",
        "calm tenant: TTFT P50; P99, s",
        "flood: TTFT P50; P99, s",
        "all done after, s",
    ]
    return table(head, rows)


@attrs.frozen
class Overload:
    """A load that is more than a cluster can answer in time."""

    cluster: str
    """The cluster's description in the table."""
    where: Layout
    rate: float
    """Requests a second."""
    wanted_s: float = 1.0
    workload: str = "alone"
    """``alone`` (requests that share no prefix), or one of the paper's workloads."""
    noise: Mapping[str, float] = attrs.field(factory=dict)

    def shares(self, seeds: Sequence[int], deadline_s: float | None) -> tuple[str, str]:
        """Shares of all requests that were answered in time and answered late.

        ``deadline_s``: the TTFT deadline that requests carry, or None.
        """
        calls = [
            call
            for seed in seeds
            for call in play(self.sessions(seed, deadline_s), self.where, seed, self.noise)
        ]
        waits = [ttft_s(one) for one in calls if one.complete]
        good = sum(one <= self.wanted_s for one in waits)
        return f"{good / len(calls):.0%}", f"{(len(waits) - good) / len(calls):.1%}"

    def sessions(self, seed: int, deadline_s: float | None) -> list[Session]:
        """Ten to fifteen seconds of requests that carry the TTFT deadline ``deadline_s``, or none."""
        if self.workload == "alone":
            return rushed(self.rate, seed, deadline_s)
        made = generated(self.workload, rate=self.rate, requests=int(10 * self.rate), seed=seed)
        return [attrs.evolve(one, ttft_s=deadline_s) for one in made]


UNEVEN = {"w0": 0.6, "w1": 0.8, "w2": 1.2, "w3": 1.6}
COLOCATED = [
    Overload("4 colocated", layout("colocated"), rate, wanted)
    for rate, wanted in ((40.0, 1.0), (80.0, 1.0), (80.0, 3.0), (150.0, 1.0), (150.0, 3.0))
]
OTHERS = [
    Overload("2P2D", layout("2P2D"), 80.0),
    Overload("2P2D", layout("2P2D"), 150.0),
    Overload("1 colocated", layout("colocated", instances=1), 20.0),
    Overload("1 colocated", layout("colocated", instances=1), 40.0),
    Overload("4 colocated, of uneven speed", layout("colocated"), 80.0, noise=UNEVEN),
    Overload("4 colocated on one GPU", on_sites(layout("colocated"), 1), 40.0),
]
SHARING = [
    Overload("4 colocated", layout("colocated"), 250.0, workload="react"),
    Overload("4 colocated", layout("colocated"), 250.0, workload="loogle"),
    Overload("2P2D", layout("2P2D"), 250.0, workload="loogle"),
]


def too_much_load(cases: Sequence[Overload]) -> Callable[[Sequence[int]], str]:
    """A measurement of the shares answered in time and late, with deadlines (and refusals) and without."""

    def measure(seeds: Sequence[int]) -> str:
        rows = [
            [
                one.cluster,
                one.workload,
                f"{one.rate:.0f}",
                f"{one.wanted_s:g}",
                *one.shares(seeds, one.wanted_s),
                *one.shares(seeds, None),
            ]
            for one in cases
        ]
        columns = ["with deadline: in time", "with: late", "without: in time", "without: late"]
        return table(["cluster", "workload", "req/s", "wanted TTFT, s", *columns], rows)

    return measure


def rushed(rate: float, seed: int, deadline_s: float | None) -> list[Session]:
    """Fifteen seconds of requests that share no prefix."""
    rng, at, made = random.Random(f"{seed}/rush"), 0.0, []
    while at < 15.0:
        at += rng.expovariate(rate)
        prompt, answer = rng.randint(200, 2500), rng.randint(50, 300)
        made.append(single(f"r/{len(made)}", at, prompt, answer, ttft_s=deadline_s))
    return made


def latencies(seeds: Sequence[int]) -> str:
    """Mean JCT and P99 TTFT on the paper's workloads, near and beyond the cluster's capacity."""
    rows = []
    for kind, rates in (("sharegpt", (40.0, 150.0)), ("loogle", (40.0, 150.0)), ("react", (40.0, 150.0))):
        for rate in rates:
            for where in ("colocated", "2P2D"):
                cells = [kind, f"{rate:.0f}", where]
                for hold_back_s in HOLD_BACKS_S:
                    calls = [
                        call
                        for seed in seeds
                        for call in play(
                            generated(kind, rate=rate, requests=150, seed=seed),
                            layout(where, hold_back_s),
                            seed,
                        )
                    ]
                    jct = sum(one.last_at - one.asked_at for one in calls) / len(calls)
                    cells.append(f"{jct:.2f}; {percentile(sorted(map(ttft_s, calls)), 99):.2f}")
                rows.append(cells)
    return table(["workload", "req/s", "layout", *(f"{one:g} s" for one in HOLD_BACKS_S)], rows)


PARTS: dict[str, tuple[str, Callable[[Sequence[int]], str]]] = {
    "flood": (
        f"## A flood next to a calm tenant\n\n{FLOOD} requests of one tenant at once, and {CALM_RATE:g} a second of another for"
        f" {CALM_S:g} s, on four instances of {ROWS} rows.",
        next_to_a_flood,
    ),
    "priority": (
        "## The same, all of one tenant\n\nThe calm requests have `priority` -1.",
        lambda seeds: next_to_a_flood(seeds, scope="flood", priority=-1),
    ),
    "deadline": (
        "## Deadlines under too much load\n\nRequests that share nothing, for 15 s. *With deadline*: they carry it, and"
        " those that cannot meet it are refused; *in time* and *late* are shares of all.",
        too_much_load(COLOCATED),
    ),
    "layouts": (
        "### Other clusters\n\n*Uneven*: steps take from 0.6 to 1.6 times what schedulers assume at first. *On one GPU*:"
        " the instances share its time, and a step of one takes longer while others have work.",
        too_much_load(OTHERS),
    ),
    "sharing": (
        "### With prompts that share much\n\nSessions of the paper's kinds for 10 s; one that is refused asks no more.",
        too_much_load(SHARING),
    ),
    "latency": (
        "## What holding back costs\n\nMean JCT; P99 TTFT in seconds, by `hold_back_s`. 3600 s: only full batches hold back.",
        latencies,
    ),
}


@attrs.frozen
class Sample:
    """The measured text of one part."""

    part: str
    text: str
    commit: str


def measured(part: str, seeds: Sequence[int], at: str) -> Sample:
    """Measure one part and print it."""
    words, measure = PARTS[part]
    text = f"{words}\n\n{measure(seeds)}"
    print(text + "\n", flush=True)
    return Sample(part, text, at)


def write_note(samples: Sequence[Sample], command: str) -> None:
    """Write the note from the measured parts, in the order of ``PARTS``, under their common commit."""
    texts = {one.part: one.text for one in samples}
    note = attrs.evolve(Note("admission"), commit=samples[0].commit)
    print(
        note.write(
            "Waiting in the scheduler, in the simulator",
            command,
            *(texts[one] for one in PARTS if one in texts),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    take_pieces(parser)
    given = parser.parse_args()
    if given.merge:
        try:
            samples = merged(given.merge, Sample, ("commit",))
        except ValueError as error:
            sys.exit(f"bench-admission: {error}")
        write_note(samples, "make bench-admission, in pieces")
        return
    at = commit()
    samples = [measured(one, given.seeds, at) for one in given.only]
    if given.json:
        save(samples, given.json)
    elif given.only == list(PARTS):
        write_note(samples, "make bench-admission")


if __name__ == "__main__":
    main()
