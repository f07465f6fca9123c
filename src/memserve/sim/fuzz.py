"""Small clusters in which everything goes wrong: each seed is one run with a layout, sessions and faults."""

from __future__ import annotations

import random

import attrs

from memserve.costs import StepCosts
from memserve.scheduling.cost_model import LINKS, CostModel, LinkModel
from memserve.sim.audit import Audit
from memserve.sim.clients import Clients
from memserve.sim.cluster import SimCluster
from memserve.sim.faults import KINDS, Faults
from memserve.sim.layout import FAST, Layout, ShardPlan, WorkerPlan, on_sites
from memserve.sim.network import LinkCosts, Network
from memserve.sim.workloads import Piece, Session, Turn
from memserve.sim.world import Violation, World

PAGE_TOKENS, TOKEN_BYTES = 4, 250
SLOW = {"mapped": LinkModel(0.005, 1e-5), "tcp": LinkModel(0.02, 4e-5), "nixl": LinkModel(0.002, 2e-5)}
"""Links that are slow enough for something to go wrong while a page is on its way."""
COSTS = CostModel(
    StepCosts(
        dense=((1, 0.031), (30, 0.031), (1030, 1.031)), row_s=1e-4, read_s=1e-6, token_bytes=TOKEN_BYTES
    ),
    links={**LINKS, **SLOW},
)
FAULTS_S = 12.0
"""How long things go wrong, from the start of the run."""
ENDS_S = 240.0
"""When everything that began must have ended."""

ROLES: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("p0", "prefill", "s0"), ("d0", "decode", "s0")),
    (("p0", "prefill", "s0"), ("p1", "prefill", "s0"), ("d0", "decode", "s0"), ("d1", "decode", "s0")),
    (("w0", "both", "s0"), ("w1", "both", "s0")),
    (("w0", "both", "s0"), ("w1", "both", "s1"), ("p0", "prefill", "s1"), ("d0", "decode", "s1")),
)
"""Workers (name, role, shard) of clusters with one shard, or with two whose workers need no other."""
ACROSS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("p0", "prefill", "s0"), ("d0", "decode", "s1")),
    (("w0", "both", "s0"), ("w1", "both", "s1")),
    (("p0", "prefill", "s0"), ("p1", "prefill", "s1"), ("p2", "prefill", "s2"), ("d0", "decode", "s3")),
    (("p0", "prefill", "s0"), ("w0", "both", "s1"), ("d0", "decode", "s1"), ("d1", "decode", "s2")),
)
"""Workers (name, role, shard) of clusters in which pages have to move between shards."""


@attrs.frozen
class Outcome:
    """The outcome of one seed."""

    seed: int
    violation: str = ""
    """What was violated, and when; empty if nothing was."""
    events: int = 0
    virtual_s: float = 0.0
    checks: int = 0
    deaths: int = 0
    resubmissions: int = 0
    outcomes: dict[str, int] = attrs.field(factory=dict)
    faults: dict[str, int] = attrs.field(factory=dict)
    digest: str = ""


def small_layout(seed: int, across: bool | None = None) -> Layout:
    """A cluster of two to four workers, with pools that are sometimes too small.

    ``across``: whether pages have to move between shards; None: as drawn.
    """
    layout, rng = near_layout(random.Random(f"{seed}/layout")), random.Random(f"{seed}/across")
    if not (rng.random() < 0.6 if across is None else across):
        return layout
    workers, (first, *_) = tuple(WorkerPlan(*one) for one in rng.choice(ACROSS)), layout.shards
    return attrs.evolve(
        layout,
        shards=tuple(attrs.evolve(first, name=name) for name in sorted({one.shard for one in workers})),
        workers=workers,
        policy=rng.choice(("cost", "cost", "cost", "longest_prefix", "session", "round_robin")),
        caching=rng.choice(("3", "3", "2", "1", "off")),
        path=rng.choice(("mapped", "mapped", "tcp", "nixl")),
        fetch_s=rng.choice((0.3, 2.0, 5.0)),
    )


def near_layout(rng: random.Random) -> Layout:
    """A layout in which every prefill worker has a decode worker on its shard."""
    workers = tuple(WorkerPlan(*one) for one in rng.choice(ROLES))
    tiers = (rng.choice((0, 0, 20)), rng.choice((0, 0, 40)))
    pages = rng.choice((40, 60, 300))
    return Layout(
        shards=tuple(ShardPlan(name, pages, *tiers) for name in sorted({one.shard for one in workers})),
        workers=workers,
        frontends=rng.choice((1, 1, 2)),
        schedulers=rng.choice((1, 1, 2)),
        policy=rng.choice(("cost", "cost", "longest_prefix", "session", "least_load", "round_robin")),
        caching=rng.choice(("3", "3", "1", "off")),
        page_tokens=PAGE_TOKENS,
        page_bytes=PAGE_TOKENS * TOKEN_BYTES,
        chunk_tokens=rng.choice((3, 16, 64)),
        rows=rng.choice((3, 8)),
        max_context=150,
    )


def small_sessions(rng: random.Random) -> list[Session]:
    """Some chats that share prefixes."""
    made = []
    for i in range(rng.randint(3, 10)):
        turns = [
            Turn(
                (
                    Piece(f"trunk/{rng.randrange(3)}", rng.randint(1, 24)),
                    Piece(f"{i}/{turn}", rng.randint(1, 12)),
                ),
                rng.randint(1, 24),
                wait_s=rng.random(),
            )
            for turn in range(rng.randint(1, 2))
        ]
        made.append(
            Session(f"r{i}", rng.random() * 6.0 + 0.2, tuple(turns), scope=rng.choice(("", "", "other")))
        )
    return made


def pressed(layout: Layout, sessions: list[Session], rng: random.Random) -> tuple[Layout, list[Session]]:
    """The layout, sometimes with tight admission limits; the sessions, with priorities and deadlines."""
    layout = attrs.evolve(
        layout, hold_back_s=rng.choice((2.0, 0.3, 0.02)), held_max=rng.choice((2_048, 2_048, 4))
    )
    wishes = ((0, None), (0, None), (-5, None), (5, None), (0, 0.3), (5, 2.0))
    return layout, [
        attrs.evolve(one, priority=priority, ttft_s=ttft_s)
        for one, (priority, ttft_s) in ((one, rng.choice(wishes)) for one in sessions)
    ]


@attrs.define(eq=False)
class Trial:
    """One seed's cluster, before it runs."""

    seed: int
    kinds: tuple[str, ...] = KINDS
    every: int = 8
    across: bool | None = None
    """Whether pages have to move between shards; None: in more than half of the seeds."""
    cluster: SimCluster = attrs.field(init=False)
    clients: Clients = attrs.field(init=False)
    faults: Faults = attrs.field(init=False)
    audit: Audit = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        network = Network(random.Random(f"{self.seed}/network"), LinkCosts(), through_codec=True)
        rng = random.Random(f"{self.seed}/layout")
        near_layout(rng)
        layout, sessions = small_layout(self.seed, self.across), small_sessions(rng)
        layout = on_sites(layout, random.Random(f"{self.seed}/sites").choice((0, 0, 0, 1, 2)))
        layout, sessions = pressed(layout, sessions, random.Random(f"{self.seed}/admission"))
        if self.across is None:
            chosen = random.Random(f"{self.seed}/roles").choice(("fixed", "auto"))
            layout = attrs.evolve(layout, roles=chosen)
        self.cluster = SimCluster(World(network), layout, COSTS, FAST)
        self.clients = Clients(self.cluster, sessions, self.seed)
        self.faults = Faults(self.cluster, random.Random(f"{self.seed}/faults"), self.kinds, FAULTS_S)
        self.clients.patience = self.faults.patience
        self.audit = Audit(self.cluster, self.every)

    def run(self) -> Outcome:
        """Run the cluster to its end."""
        world, violation = self.cluster.world, ""
        try:
            self.cluster.start()
            self.faults.arrange()
            self.audit.finish(self.clients, ENDS_S)
        except Exception as broken:  # whatever a core raises: the seed must be named
            violation = f"at {world.now:.3f} s: {type(broken).__name__}: {broken}"
        outcomes: dict[str, int] = {}
        for call in self.clients.calls:
            outcomes[call.outcome or "open"] = outcomes.get(call.outcome or "open", 0) + 1
        resubmitted = sum(call.attempts - 1 for call in self.clients.calls)
        return Outcome(
            self.seed, violation, world.events, world.now, self.audit.checks, self.cluster.deaths, resubmitted,
            outcomes, self.faults.happened, world.digest,
        )  # fmt: skip


def fuzz(seed: int, kinds: tuple[str, ...] = KINDS, every: int = 8, across: bool | None = None) -> Outcome:
    """Run one seed. A Violation, or any error of a core, is in the outcome."""
    return Trial(seed, kinds, every, across).run()


__all__ = ["Outcome", "Trial", "Violation", "fuzz"]
