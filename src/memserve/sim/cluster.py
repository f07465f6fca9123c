"""A cluster of real cores in a virtual world: starts and restarts its actors, does what their shells do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import attrs

from memserve.actions import BatchDone, Copy, CopyDone, Deliver, Died, Kill, MoverOrder, RunBatch
from memserve.costs import Site
from memserve.engine.batching import RETIRE, BatchLimits, WorkerSettings
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.worker import WorkerCore
from memserve.identity import ActorId
from memserve.journal import FrontendCore
from memserve.mempool.addresses import Home, Tier, tier_of
from memserve.mempool.exchange import Exchange
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.messages import Member
from memserve.presence import Presence, Reporting, seed_id
from memserve.processes.lifecycle import RestartPolicy
from memserve.scheduling.admission import Admission
from memserve.scheduling.cost_model import CostModel
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.joining import SHARD_WAIT_S, JoiningCore
from memserve.scheduling.pricing import POLICIES, Cost
from memserve.scheduling.roles import Prices, Roles
from memserve.scheduling.scheduler import SchedulerCore
from memserve.sim.engines import DrawEngine, Engine, PageEngine, shape
from memserve.sim.layout import Layout, ShardPlan, Times, WorkerPlan
from memserve.sim.movers import Movers
from memserve.sim.pages import Arenas
from memserve.sim.sites import Sites
from memserve.sim.world import Actor, Violation, World
from memserve.tokens import TOKEN_BYTES
from memserve.transfer.values import Geometry
from memserve.transfer_messages import Way

RESTART_S_MAX = 10.0


@attrs.define
class Busy:
    """What one worker did, over all of its incarnations."""

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0


@attrs.define(eq=False)
class SimCluster:
    """See the module's docstring. ``deliver`` gets what Frontends pass on to their clients."""

    world: World
    layout: Layout
    costs: CostModel
    times: Times = Times()
    pages_checked: bool = True
    """Keep the pages' content, and check which actor or transfer writes to which page."""
    deliver: Callable[[Actor, Deliver], None] = lambda actor, delivery: None
    lost: Callable[[Actor], None] = lambda actor: None
    """Called with each actor that has ended."""
    damaged: Callable[[int], bool] = lambda slot: False
    """Whether a page reads back damaged from disk."""
    noise: dict[str, float] = attrs.field(factory=dict)
    """Factor on the seconds of each worker's steps, by the worker's name."""
    cores: dict[str, object] = attrs.field(factory=dict)
    """The cores by name, without the wrapper that sends their heartbeats."""
    busy: dict[str, Busy] = attrs.field(factory=dict)
    deaths: int = 0
    fenced: int = 0
    arenas: Arenas = attrs.field(init=False)
    movers: Movers = attrs.field(init=False)
    sites: Sites = attrs.field(init=False)
    _policies: dict[str, RestartPolicy] = attrs.field(factory=dict)
    _ready_at: dict[ActorId, float] = attrs.field(factory=dict)
    _copiers: dict[tuple[ActorId, bool], float] = attrs.field(factory=dict)
    """When each copier is free again, by shard and whether it copies inbound pages."""
    _incarnations: int = 0
    _start: dict[str, Callable[[], None]] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.world.kill = self.kill
        self.arenas = Arenas(self.layout.page_tokens * TOKEN_BYTES, self.pages_checked)
        self.sites = Sites(self.world, self.costs.steps)
        size, token_bytes = self.layout.page_bytes, self.costs.steps.token_bytes
        timed = token_bytes * self.layout.page_tokens or size
        self.movers = Movers(self.world, self.arenas, size, timed, self.costs.links, self.cores.get)
        for name in self.layout.scheduler_names:
            self._start[name] = lambda name=name: self._start_scheduler(name)  # type: ignore[misc]
        for shard in self.layout.shards:
            self._start[shard.name] = lambda shard=shard: self._start_shard(shard)  # type: ignore[misc]
        for worker in self.layout.workers:
            self._start[worker.name] = lambda worker=worker: self._start_worker(worker)  # type: ignore[misc]
        for name in self.layout.frontend_names:
            self._start[name] = lambda name=name: self._start_frontend(name)  # type: ignore[misc]

    # ---- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every actor."""
        for start in self._start.values():
            start()

    @property
    def names(self) -> list[str]:
        """Names of all actors."""
        return list(self._start)

    def kill(self, actor: Actor) -> None:
        """End an actor, by SIGKILL or because it stops by itself.

        The supervisor tells the schedulers after ``times.death_told_s`` and starts a successor later.
        """
        if not actor.alive:
            return
        self.world.remove(actor)
        del self.cores[actor.name]
        self.movers.drop(actor)
        self.arenas.drop(actor.id)
        self.deaths += 1
        self.lost(actor)
        self.world.after(self.times.death_told_s, self._announce, Died(actor.id))
        policy = self._policies.setdefault(actor.name, RestartPolicy(slowest_s=RESTART_S_MAX))
        ready_at = self._ready_at.pop(actor.id, None)
        ready_s = 0.0 if ready_at is None else self.world.now - ready_at
        self.world.after(policy.died(ready_s, self.world.now).delay_s, self._start[actor.name])

    def _announce(self, died: Died) -> None:
        for name in self.layout.scheduler_names:
            scheduler = self.world.actors.get(name)
            if scheduler is not None:
                self.world.tell(scheduler, died)

    def _id(self, name: str) -> ActorId:
        self._incarnations += 1
        return ActorId(f"{name}.{self._incarnations:08x}")

    def _presence(self, id: ActorId, kind: str, role: str = "") -> Presence:
        me = Member(id, kind, f"sim://{id}", self._incarnations, "starting", role, role_configured=role)
        return Presence(me, tuple(seed_id(name) for name in self.layout.scheduler_names))

    def _ready(self, actor: Actor, presence: Presence) -> None:
        if not actor.alive:
            return
        if actor.paused:
            actor.held.append(lambda: self._ready(actor, presence))
            return
        self._ready_at[actor.id] = self.world.now
        presence.become("ready")
        self.world.turn(actor)

    # ---- schedulers, frontends -----------------------------------------------------------------------------

    def _start_scheduler(self, name: str) -> None:
        id = self._id(name)
        me = Member(id, "GlobalScheduler", f"sim://{id}", self._incarnations, "ready")
        kind, index = self.layout.policy, IndexFeed(GlobalTree(self.layout.page_tokens))
        movable = len(self.layout.shards) > 1
        weights = attrs.evolve(self.layout.weights, fetch=movable, path=self.layout.path)
        policy = Cost(weights, self.costs.links) if kind == "cost" else POLICIES[kind]()
        admission = Admission(self.layout.held_max)
        core = self.cores[name] = SchedulerCore(
            me, self.layout.policy, policy, index, admission, self.layout.hold_back_s, self._roles(name)
        )
        self._ready_at[id] = self.world.now
        self.world.start(Actor(id, me.kind, core))

    def _roles(self, name: str) -> Roles:
        auto = self.layout.roles == "auto" and name == self.layout.scheduler_names[0]
        return Roles(auto, Prices(self.layout.weights.ttft))

    def _start_frontend(self, name: str) -> None:
        id = self._id(name)
        presence = self._presence(id, "Frontend")
        core = self.cores[name] = FrontendCore(presence, self.layout.requests_max)
        actor = Actor(id, "Frontend", Reporting(core, presence))
        actor.perform[Deliver] = lambda delivery: self.deliver(actor, delivery)
        self.world.start(actor)
        self.world.after(self.times.frontend_start_s, self._ready, actor, presence)

    # ---- shards --------------------------------------------------------------------------------------------

    def _start_shard(self, plan: ShardPlan) -> None:
        id, layout = self._id(plan.name), self.layout
        presence = self._presence(id, "MemPoolShard")
        sizes = Capacity(plan.pages, plan.host_pages, plan.disk_pages, layout.swap_low, layout.swap_high)
        home = Home([one.name for one in layout.shards].index(plan.name), self._incarnations)
        pool = Pool(sizes, layout.page_tokens, layout.lease_s, caching=layout.caching != "off", home=home)
        exchange = Exchange(pool, id, Geometry(layout.page_bytes, 1), "host", self._incarnations)
        exchange.open((layout.path,), (Way(layout.path, id),))
        core = self.cores[plan.name] = ShardCore(
            pool, schedulers=presence.schedulers, page_bytes=layout.page_bytes, exchange=exchange
        )
        self.arenas.open(id, plan)
        actor = Actor(id, "MemPoolShard", Reporting(core, presence, core.needs))
        actor.perform[MoverOrder] = lambda move: self.movers.perform(actor, move.order)
        actor.perform[Kill] = self._fence
        actor.perform[Copy] = lambda copy: self._copy(actor, copy)
        self.world.start(actor)
        self.world.after(self.times.shard_start_s, self._ready, actor, presence)

    def _fence(self, kill: Kill) -> None:
        found = self.world.find(kill.actor)
        if found is not None:
            self.fenced += 1
            self.kill(found)

    def _copy(self, shard: Actor, copy: Copy) -> None:
        """Queue a copy: a shard has one copier for pages that come in and one for pages that go out."""
        source, target, _ = copy.runs[0]
        inbound = tier_of(target) < tier_of(source)
        on_disk = max(tier_of(source), tier_of(target)) == Tier.DISK
        pages = sum(run[2] for run in copy.runs)
        page_s = self.times.disk_page_s if on_disk else self.times.copy_page_s
        begin = max(self.world.now, self._copiers.get((shard.id, inbound), 0.0))
        end = self._copiers[shard.id, inbound] = begin + self.times.copy_fixed_s + pages * page_s
        self.world.at(end, self._copied, shard, copy)

    def _copied(self, shard: Actor, copy: Copy) -> None:
        if not shard.alive:
            return
        if shard.paused:
            shard.held.append(lambda: self._copied(shard, copy))
            return
        bad = []
        for source, target, pages in copy.runs:
            self.arenas.copy(shard.id, range(source, source + pages), shard.id, range(target, target + pages))
            for i in range(pages):
                if tier_of(source) == Tier.DISK and self.damaged(source + i):
                    bad.append(source + i)
                    self.arenas.spoil(shard.id, (target + i,))
        self.world.tell(shard, CopyDone(copy.id, tuple(bad)))

    # ---- workers -------------------------------------------------------------------------------------------

    def _start_worker(self, plan: WorkerPlan) -> None:
        id = self._id(plan.name)
        presence = self._presence(
            id, "PrefillWorker" if plan.role == "prefill" else "DecodeWorker", plan.role
        )
        joining = JoiningCore(id, plan.shard)
        self.cores[plan.name] = joining
        actor = Actor(id, presence.member.kind, Reporting(joining, presence))
        actor.turned = lambda: self._await_shard(actor, plan, joining, presence)
        self.world.start(actor)
        self.world.after(SHARD_WAIT_S, self._give_up, actor, joining)

    def _give_up(self, actor: Actor, joining: JoiningCore) -> None:
        if actor.alive and joining.found is None:
            self.kill(actor)

    def _await_shard(self, actor: Actor, plan: WorkerPlan, joining: JoiningCore, presence: Presence) -> None:
        if joining.found is not None:
            actor.turned = lambda: None
            begin = partial(self._take_charge, actor, plan, joining.found, presence)
            self.world.after(self.times.worker_start_s, begin)

    def _take_charge(self, actor: Actor, plan: WorkerPlan, shard: ActorId, presence: Presence) -> None:
        """The engine is ready: the worker's own core takes over, on the arena that it has attached to."""
        if not actor.alive:
            return
        if actor.paused:
            actor.held.append(lambda: self._take_charge(actor, plan, shard, presence))
            return
        if self.world.find(shard) is None:
            self.kill(actor)  # the shard's arena cannot be attached to
            return
        layout = self.layout
        limits = BatchLimits(layout.chunk_tokens, layout.rows)
        settings = WorkerSettings(
            limits, layout.page_tokens, layout.max_context, RETIRE[layout.caching], layout.fetch_s,
            returns=layout.caching == "3",
        )  # fmt: skip
        core = self.cores[actor.name] = WorkerCore(presence, shard, settings)
        presence.also = (shard,)
        steps = attrs.evolve(self.costs.steps, chunk_tokens=layout.chunk_tokens)
        if plan.overrated != 1.0:
            steps = attrs.evolve(steps.scaled(plan.overrated), rough=True)
        presence.member = attrs.evolve(presence.member, costs=steps, site=plan.site)
        presence.become("ready", shard=shard)
        actor.core = Reporting(core, presence, core.needs)
        engine = self._engine(shard)
        actor.perform[RunBatch] = lambda action: self._step(actor, plan.site, shard, engine, action.plan)
        self._ready_at[actor.id] = self.world.now
        self.world.turn(actor)

    def _engine(self, shard: ActorId) -> Engine:
        if not self.pages_checked:
            return DrawEngine()
        return PageEngine(self.arenas.page_bytes, self.arenas.of[shard])

    def _step(self, actor: Actor, site: Site | None, shard: ActorId, engine: Engine, plan: BatchPlan) -> None:
        rows = shape(plan)
        seconds = self.costs.step_s(rows) * actor.slowness * self.noise.get(actor.name, 1.0)
        prompts = sum(tokens for tokens, _ in rows if tokens > 1)
        self.arenas.claim(shard, self._written(plan) if self.pages_checked else (), actor.id)

        def done(took_s: float, neighbours: float, waited_s: float) -> None:
            busy = self.busy.setdefault(actor.name, Busy())
            busy.steps += 1
            busy.busy_s += took_s
            busy.prefill_tokens += prompts
            busy.decode_tokens += sum(tokens == 1 for tokens, _ in rows)
            result = partial(
                BatchResult, step_ms=took_s * 1e3, threads=1, neighbours=neighbours, waited_s=waited_s
            )
            self._stepped(actor, shard, engine, plan, result)

        self.sites.begin(site, actor.name, seconds, prompts > 0, done)

    def _stepped(
        self,
        actor: Actor,
        shard: ActorId,
        engine: Engine,
        plan: BatchPlan,
        result: Callable[[tuple[int | None, ...]], BatchResult],
    ) -> None:
        """The step has ended. Its pages are written only now, as late as possible."""
        if not actor.alive:
            return
        if actor.paused:
            actor.held.append(lambda: self._stepped(actor, shard, engine, plan, result))
            return
        if self.pages_checked:
            self._check_owner(actor, shard, plan)
        self.world.tell(actor, BatchDone(result(engine.draw(plan))))

    # ---- one page has one writer ---------------------------------------------------------------------------

    def _written(self, plan: BatchPlan) -> list[int]:
        size = self.layout.page_tokens
        return [
            page for row in plan.rows for page in row.pages[row.start // size : (row.end - 1) // size + 1]
        ]

    def _check_owner(self, actor: Actor, shard: ActorId, plan: BatchPlan) -> None:
        """Check that the pages a step writes to are private to leases of its worker.

        Raises Violation. Nothing is checked once their shard is dead.
        """
        written = self._written(plan)
        self.arenas.let_go(actor.id)
        home = self.world.find(shard)
        if home is None:
            return
        core = self.cores[home.name]
        assert isinstance(core, ShardCore), f"{home.name} is not a shard"
        pool = core.pool
        own = {
            page
            for lease in pool.leases
            if lease.owner == actor.id
            for page in lease.private(pool.page_tokens)
        }
        if not own.issuperset(written):
            wrong = sorted(set(written) - own)
            raise Violation(f"{actor.id} writes to pages {wrong} of {shard}, which no lease of its own holds")

    def pools(self) -> dict[str, Pool]:
        """The pools of the living shards, by name."""
        return {name: core.pool for name, core in self.cores.items() if isinstance(core, ShardCore)}
