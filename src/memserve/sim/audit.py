"""The invariants that must hold in every run, at every step and at its end."""

from __future__ import annotations

from typing import Any

import attrs

from memserve.engine.worker import WorkerCore
from memserve.identity import ActorId
from memserve.journal import FrontendCore
from memserve.mempool.shard import ShardCore
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.scheduler import SchedulerCore
from memserve.sim.clients import Clients
from memserve.sim.cluster import SimCluster
from memserve.sim.world import Actor, Violation
from memserve.tokens import count

SETTLE_S = 45.0
"""How long after the last request pools may take to be idle and schedulers to know the index. By then leases
of dead actors have ended, and so has the quarantine of pages that a dead sender's card may still write to."""
UNDER_WAY = (
    "waiting_acquires",
    "loading_acquires",
    "copies_under_way",
    "fetches_under_way",
    "transfers_out_under_way",
    "transfers_in_under_way",
)
"""Gauges of a shard that are 0 when it is at rest."""


@attrs.define(eq=False)
class Audit:
    """Checks each core after its turns: after all of them, or a shard after every ``every``-th shard turn.

    A shard's check walks its whole pool. If ``every`` is 0, cores are checked only at the end.
    """

    cluster: SimCluster
    every: int = 1
    checks: int = 0
    _turns: int = 0

    def __attrs_post_init__(self) -> None:
        if self.every:
            self.cluster.world.after_turn = self._after_turn

    def _after_turn(self, actor: Actor) -> None:
        core: Any = self.cluster.cores.get(actor.name)
        if not hasattr(core, "check"):
            return
        if isinstance(core, ShardCore):
            self._turns += 1
            if self._turns % self.every:
                return
        self._check(actor, core)

    def _check(self, actor: Actor, core: Any) -> None:
        self.checks += 1
        try:
            core.check()
        except AssertionError as broken:
            raise Violation(f"{actor.id}: {broken}") from broken
        if isinstance(core, ShardCore):
            self.cluster.arenas.check_index(actor.id, core.pool)

    def settled(self) -> str:
        """What is not yet at rest although no request is open; empty when everything is."""
        for name in self.cluster.names:
            actor, core = self.cluster.world.actors.get(name), self.cluster.cores.get(name)
            if actor is None or core is None:
                return f"{name} does not live"
            trouble = _trouble(core, self.cluster.world.now)
            if trouble:
                return f"{name} {trouble}"
        return self._feed()

    def _feed(self) -> str:
        """Which scheduler does not yet know all that the shards have said about their indexes, if any."""
        for name, scheduler in self.cluster.cores.items():
            if not isinstance(scheduler, SchedulerCore):
                continue
            for shard, core in self.cluster.cores.items():
                if not isinstance(core, ShardCore) or not core.pool.tree.pages_total:
                    continue
                id = self.cluster.world.actors[shard].id
                index = scheduler.index
                if not isinstance(index, IndexFeed) or not index.is_whole(id) or wrong(index.tree, id, core):
                    return f"{name} does not know the index of {id}"
        return ""

    def finish(self, clients: Clients, until: float) -> None:
        """Let a run continue until all has ended and come to rest.

        Raises Violation when requests are open at ``until``, or when not all is at rest SETTLE_S later.
        """
        world = self.cluster.world
        world.run(until, lambda: clients.done)
        if not clients.done:
            raise Violation(f"at {world.now:.1f} s not ended: {_open(self.cluster, clients)}")
        rest = world.now + SETTLE_S
        while world.now < rest and self.settled():
            at = world.now
            world.run(min(at + 0.5, rest))
            world.now = min(at + 0.5, rest)
        if trouble := self.settled():
            raise Violation(f"{SETTLE_S:g} s after the last request {trouble}")
        for name, core in self.cluster.cores.items():
            if hasattr(core, "check"):
                self._check(world.actors[name], core)


def wrong(tree: GlobalTree, id: ActorId, shard: ShardCore) -> bool:
    """Whether a scheduler's tree differs from a shard's index: in a prompt, or in the number of pages."""
    truth = shard.pool.tree
    for scope, root in truth.roots.items():
        for node in root.walk():
            if not node.children and node is not root:
                tokens = b"".join(reversed([one.key for one in node.path()]))
                if tree.match(scope, tokens).held(id).tokens != count(tokens):
                    return True
    return tree.pages.get(id, 0) != truth.pages_total


def _trouble(core: object, now: float) -> str:
    match core:
        case ShardCore(pool=pool):
            if len(pool.leases):
                return f"still has {len(pool.leases)} leases"
            if pool.leased_pages:
                return f"still has {pool.leased_pages} leased pages"
            gauges = core.gauges()
            busy = [f"{name} {gauges[name]:.0f}" for name in UNDER_WAY if gauges.get(name)]
            return f"still has {', '.join(busy)}" if busy else ""
        case WorkerCore():
            return "" if core.idle else "still holds requests"
        case FrontendCore():
            health = core.health(now)
            return health.reason if core.idle else "still has requests open"
        case SchedulerCore():
            return (
                f"still holds {core.gauges()['requests_held']:.0f} requests"
                if core.gauges()["requests_held"]
                else ""
            )
    return "is not ready"


def _open(cluster: SimCluster, clients: Clients) -> str:
    """The first request that has not ended, and the workers that hold it."""
    for call in clients.open_calls.values():
        holders = [
            f"{name}: {one.phase.value} attempt {one.request.attempt} computed {one.computed} of {one.length}"
            for name, core in cluster.cores.items()
            if isinstance(core, WorkerCore)
            for one in core._live.values()
            if one.request.id == call.id
        ]
        return f"{call.id} ({len(clients.open_calls)} in all), held by {holders or 'no worker'}"
    return f"{clients.waiting} turns that were never asked"
