"""A whole cluster in one process and in virtual time: the real cores and shells on the in-memory bus.

Its engine has no model, but it has real pages: it writes each token into the page that the plan names, and draws the
next token from what the pages hold for the whole sequence. A page that was freed too early, shared wrongly, or not
filled therefore shows as a wrong token, as it would with a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

from memserve.actions import BatchDone, Copy, CopyDone, Deliver, Kill, RunBatch
from memserve.actors.frontend import FrontendService
from memserve.actors.loop import Shell
from memserve.api.service import GenerationParams
from memserve.bus import MemoryBus
from memserve.engine.batching import BatchLimits
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.worker import WorkerCore, WorkerSettings
from memserve.journal import FrontendCore
from memserve.mempool.addresses import Tier, slot, tier_of
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.messages import ActorId, Member, Sampling
from memserve.process import RestartNeeded
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.policies import PLAIN
from memserve.scheduling.presence import Presence, Reporting, seed_id
from memserve.scheduling.pricing import Cost
from memserve.scheduling.scheduler import SchedulerCore
from memserve.tokens import pack, unpack

PAGE_TOKENS = 4
MAX_CONTEXT = 200
STOP_TOKEN = 1
PAUSE_S = 12.0
"""A paused worker wakes after it was declared dead and its leases have ended, and finishes its step."""


def next_token(tokens: list[int], seed: int) -> int:
    """What the make-believe model says after ``tokens``: any change of any token changes it."""
    digest = hashlib.sha256(pack(tokens) + bytes([seed])).digest()
    return 2 + int.from_bytes(digest[:4], "little") % 50_000


def reference(prompt: list[int], max_tokens: int, seed: int = 0) -> list[int]:
    """The tokens of an undisturbed run."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


@attrs.define
class PageEngine:
    """A StepEngine on a list of pages that all workers of a shard share."""

    arena: dict[int, list[int]]

    def run(self, plan: BatchPlan) -> BatchResult:
        """Write the rows' tokens into their pages; draw from what the pages hold."""
        return BatchResult(tuple(self._row(row) for row in plan.rows), 1.0, 1)

    def _row(self, row) -> int | None:
        for offset, token in enumerate(unpack(row.tokens)):
            position = row.start + offset
            self.arena[row.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] = token
        if row.sample is None:
            return None
        whole = [self.arena[row.pages[i // PAGE_TOKENS]][i % PAGE_TOKENS] for i in range(row.end)]
        return next_token(whole, row.sample.seed)


@attrs.define(eq=False)
class Actor:
    """One running actor: its shell, and the scope that kills it."""

    id: ActorId
    shell: Shell
    scope: trio.CancelScope
    core: object
    paused: bool = False


@attrs.define(eq=False)
class MemoryCluster:
    """Actors by name. ``kill`` is SIGKILL: no message, no cleaning up."""

    nursery: trio.Nursery
    pages: int
    chunk_tokens: int = 16
    rows: int = 8
    retire: str = "all"
    step_s: float = 0.01
    policy: str = "cost"
    announce_deaths: bool = True
    host_pages: int = 0
    disk_pages: int = 0
    copy_s: float = 0.02
    """How long a copy between tiers takes; now and then a page from disk comes damaged."""
    bus: MemoryBus = attrs.field(factory=MemoryBus)
    actors: dict[str, Actor] = attrs.field(factory=dict)
    arenas: dict[str, dict[int, list[int]]] = attrs.field(factory=dict)
    incarnations: int = 0

    def _presence(self, link, kind: str, role: str = "", shard: str = "") -> Presence:
        schedulers = [one for one in self.actors.values() if isinstance(one.core, SchedulerCore)]
        for one in schedulers:
            link.connect(seed_id(one.id.rpartition(".")[0]), one.shell.link.endpoint)
        me = Member(link.actor, kind, link.endpoint, 1, "ready", role, shard)
        return Presence(me, tuple(seed_id(one.id.rpartition(".")[0]) for one in schedulers))

    def _new_link(self, name: str):
        self.incarnations += 1
        return self.bus.link(ActorId(f"{name}.{self.incarnations:08x}"))

    async def _start(self, name: str, link, core, reporting) -> Actor:
        shell = Shell(reporting, link, clock=trio.current_time)
        shell.perform[Kill] = lambda action: self._fence(action.actor)
        actor = self.actors[name] = Actor(link.actor, shell, trio.CancelScope(), core)

        async def live(task_status: trio.TaskStatus[None]) -> None:
            with actor.scope:
                try:
                    await shell.run(task_status=task_status)
                except* RestartNeeded:
                    self.bus.unbind(link)

        await self.nursery.start(live)
        return actor

    async def scheduler(self, name: str = "scheduler-0") -> Actor:
        """A GlobalScheduler; start it first."""
        link = self._new_link(name)
        me = Member(link.actor, "GlobalScheduler", link.endpoint, 1, "ready")
        policy = Cost() if self.policy == "cost" else PLAIN[self.policy]()
        core = SchedulerCore(me, self.policy, policy, IndexFeed(GlobalTree(PAGE_TOKENS)))
        return await self._start(name, link, core, core)

    async def shard(self, name: str = "s0") -> Actor:
        """A MemPoolShard with ``pages`` pages."""
        link = self._new_link(name)
        sizes = Capacity(self.pages, self.host_pages, self.disk_pages, 0.1, 0.2)
        counts = zip(Tier, (sizes.device, sizes.host, sizes.disk), strict=True)
        slots = [slot(tier, page) for tier, pages in counts for page in range(pages)]
        self.arenas[link.actor] = {one: [0] * PAGE_TOKENS for one in slots}
        presence = self._presence(link, "MemPoolShard")
        caching = self.retire != "none"
        core = ShardCore(Pool(sizes, PAGE_TOKENS, 10.0, caching=caching), schedulers=presence.schedulers)
        actor = await self._start(name, link, core, Reporting(core, presence))
        actor.shell.perform[Copy] = lambda action: self.nursery.start_soon(self._copy, actor, action)
        return actor

    async def _copy(self, shard: Actor, copy: Copy) -> None:
        """Copies end late, and some of what was on disk is damaged; the pages are read when the copy ends."""
        await trio.sleep(self.copy_s * (1 + copy.id % 3))
        arena, bad = self.arenas[shard.id], []
        for source, target, pages in copy.runs:
            for i in range(pages):
                damaged = tier_of(source) == Tier.DISK and (source + i) % 13 == 0
                bad += [source + i] if damaged else []
                arena[target + i][:] = [-1] * PAGE_TOKENS if damaged else arena[source + i]
        shard.core.check()
        shard.shell.tell(CopyDone(copy.id, tuple(bad)))

    async def worker(self, name: str, role: str, shard: str = "s0") -> Actor:
        """A worker of any role on ``shard``."""
        link = self._new_link(name)
        home = self.actors[shard]
        link.connect(home.id, home.shell.link.endpoint)
        kind = "PrefillWorker" if role == "prefill" else "DecodeWorker"
        presence = self._presence(link, kind, role, home.id)
        presence.also = (home.id,)
        limits = BatchLimits(self.chunk_tokens, self.rows)
        core = WorkerCore(presence, home.id, WorkerSettings(limits, PAGE_TOKENS, MAX_CONTEXT, self.retire))
        engine = PageEngine(self.arenas[home.id])
        actor = await self._start(name, link, core, Reporting(core, presence))

        async def step(plan: BatchPlan) -> None:
            with trio.CancelScope() as scope:
                await trio.sleep(self.step_s)
                if actor.paused:
                    await trio.sleep(PAUSE_S)
            if not actor.scope.cancel_called and not scope.cancelled_caught:
                core.check()
                actor.shell.tell(BatchDone(engine.run(plan)))

        actor.shell.perform[RunBatch] = lambda action: self.nursery.start_soon(step, action.plan)
        return actor

    async def frontend(self, name: str = "frontend-0") -> FrontendService:
        """A Frontend without HTTP: the service that HTTP handlers call."""
        link = self._new_link(name)
        presence = self._presence(link, "Frontend")
        core = FrontendCore(presence, 64)
        actor = await self._start(name, link, core, Reporting(core, presence))
        service = FrontendService(core, actor.shell)
        actor.shell.perform[Deliver] = service.deliver
        return service

    def _fence(self, actor: ActorId) -> None:
        """What a shard does to a worker that is held for dead."""
        found = next((one for one in self.actors.values() if one.id == actor), None)
        if found is not None:
            self.kill(actor.rpartition(".")[0])

    def pause(self, name: str) -> None:
        """SIGSTOP: it hears and says nothing, and its step stays unfinished; wakes only to be found dead."""
        self.actors[name].paused = True
        self.bus.unbind(self.actors[name].shell.link)
        self.actors[name].shell.link.send = lambda to, message: None

    def kill(self, name: str) -> None:
        """The process is gone; the supervisor notices at once."""
        actor = self.actors.pop(name)
        actor.scope.cancel()
        self.bus.unbind(actor.shell.link)
        if self.announce_deaths:
            from memserve.actions import Died

            for one in self.actors.values():
                if isinstance(one.core, SchedulerCore):
                    one.shell.tell(Died(actor.id))

    def check(self) -> None:
        """Every core's invariants."""
        for actor in self.actors.values():
            actor.core.check()

    def pool(self, name: str = "s0") -> Pool:
        """The pool of a shard."""
        return self.actors[name].core.pool

    async def settled(self, frontend: FrontendService) -> None:
        """Wait until requests can be placed."""
        with trio.fail_after(30):
            while not frontend.healthy():
                await trio.sleep(0.01)


@asynccontextmanager
async def memory_cluster(
    *workers: tuple[str, str], pages: int = 400, **settings
) -> AsyncIterator[tuple[MemoryCluster, FrontendService]]:
    """One scheduler, one shard, the given (name, role) workers, one Frontend; ready."""
    async with trio.open_nursery() as nursery:
        cluster = MemoryCluster(nursery, pages, **settings)
        await cluster.scheduler()
        await cluster.shard()
        for name, role in workers:
            await cluster.worker(name, role)
        frontend = await cluster.frontend()
        await cluster.settled(frontend)
        yield cluster, frontend
        nursery.cancel_scope.cancel()


async def generate(frontend: FrontendService, prompt: list[int], max_tokens: int, seed: int = 0) -> list[int]:
    """All tokens of one request."""
    params = GenerationParams(Sampling(0.0, seed=seed), max_tokens, (STOP_TOKEN,))
    tokens: list[int] = []
    with trio.fail_after(300):
        async with frontend.open(pack(prompt), params, "") as stream:
            async for chunk in stream:
                tokens += chunk.tokens
    return tokens


async def baseline(cluster: MemoryCluster) -> None:
    """Wait until nothing is leased any more; fails when that does not come."""
    with trio.fail_after(60):
        while cluster.pool().leased_pages or len(cluster.pool().leases):
            await trio.sleep(0.05)
    cluster.check()
