"""A whole cluster in one process and in virtual time: the real cores and shells on the in-memory bus.

Its engine has no model, but real pages: it writes each token into the page that the plan names, and derives
the next token from the contents of the sequence's pages. A page that was freed too early, shared wrongly or
not filled therefore produces a wrong token, as it would with a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from memory_bus import MemoryBus
from memserve.actions import BatchDone, Copy, CopyDone, Kill, MoverOrder, RunBatch
from memserve.actors.frontend import FrontendService
from memserve.actors.loop import Shell
from memserve.api.service import GenerationParams
from memserve.drawing import Sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.steps import AHEAD
from memserve.engine.worker import WorkerCore
from memserve.identity import ActorId
from memserve.journal import FrontendCore
from memserve.mempool.addresses import Home, Tier, slot, tier_of
from memserve.mempool.exchange import Exchange
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.messages import Member
from memserve.presence import Presence, Reporting, seed_id
from memserve.processes.actor import RestartNeeded
from memserve.scheduling.admission import Admission
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.policies import PLAIN
from memserve.scheduling.pricing import Cost, Weights
from memserve.scheduling.scheduler import SchedulerCore
from memserve.tokens import pack, unpack
from memserve.transfer.actions import StopWriting, Write, WriteFailed, Wrote
from memserve.transfer.values import Geometry
from memserve.transfer_messages import Failure, Way

PAGE_TOKENS = 4
PAGE_BYTES = 16
MAX_CONTEXT = 200
PAUSE_S = 12.0
"""Extra seconds of a paused worker's step: enough for it to be declared dead and to lose its leases."""


def next_token(tokens: list[int], seed: int) -> int:
    """The simulated model's next token after ``tokens``: it depends on every one of them."""
    digest = hashlib.sha256(pack(tokens) + bytes([seed])).digest()
    return 2 + int.from_bytes(digest[:4], "little") % 49_000


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
        """Write the rows' tokens into their pages, and draw from the pages' contents."""
        return BatchResult(tuple(self._row(row) for row in plan.rows), 1.0, 1)

    def _row(self, row) -> int | None:
        tokens = self.write(row)
        return None if tokens is None else next_token(tokens, row.sample.seed)

    def write(self, row) -> list[int] | None:
        """Write a row's tokens into its pages; if it draws, the whole sequence as its pages hold it."""
        for offset, token in enumerate(unpack(row.tokens)):
            position = row.start + offset
            self.arena[row.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] = token
        if row.sample is None:
            return None
        return [self.arena[row.pages[i // PAGE_TOKENS]][i % PAGE_TOKENS] for i in range(row.end)]


@attrs.define(eq=False)
class Actor:
    """One running actor: its shell, its core, and the scope that kills it."""

    id: ActorId
    shell: Shell
    scope: trio.CancelScope
    core: object
    paused: bool = False


@attrs.define(eq=False)
class MemoryCluster:
    """The actors, by name. ``kill`` acts like SIGKILL: no message and no cleanup."""

    nursery: trio.Nursery
    pages: int
    chunk_tokens: int = 16
    rows: int = 8
    draft: int = 0
    overlaps: bool = False
    retire: str = "all"
    returns: bool = False
    step_s: float = 0.01
    policy: str = "cost"
    hold_back_s: float = 1.0
    held_max: int = 2_048
    announce_deaths: bool = True
    host_pages: int = 0
    disk_pages: int = 0
    copy_s: float = 0.02
    """Base duration of a copy between tiers, in seconds; some pages copied from disk arrive damaged."""
    fetch_s: float = 5.0
    ahead: bool = True
    move_s: float = 0.01
    """Duration of a transfer between shards, in seconds."""
    move_fails: Callable[[int], bool] = lambda number: False
    """Decides which transfers, by their number in their shard, break off half way."""
    bus: MemoryBus = attrs.field(factory=MemoryBus)
    actors: dict[str, Actor] = attrs.field(factory=dict)
    arenas: dict[str, dict[int, list[int]]] = attrs.field(factory=dict)
    incarnations: int = 0

    def _presence(self, link, kind: str, role: str = "", shard: str = "") -> Presence:
        schedulers = [one for one in self.actors.values() if isinstance(one.core, SchedulerCore)]
        for one in schedulers:
            link.connect(seed_id(one.id.rpartition(".")[0]), one.shell.link.endpoint)
        me = Member(link.actor, kind, link.endpoint, 1, "ready", role, shard, role_configured=role)
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
        """Start a GlobalScheduler; it must be the first actor."""
        link = self._new_link(name)
        me = Member(link.actor, "GlobalScheduler", link.endpoint, 1, "ready")
        policy = Cost(Weights(fetch=True)) if self.policy == "cost" else PLAIN[self.policy]()
        index, admission = IndexFeed(GlobalTree(PAGE_TOKENS)), Admission(self.held_max)
        core = SchedulerCore(me, self.policy, policy, index, admission, self.hold_back_s)
        return await self._start(name, link, core, core)

    async def shard(self, name: str = "s0") -> Actor:
        """Start a MemPoolShard with ``pages`` device pages."""
        link = self._new_link(name)
        sizes = Capacity(self.pages, self.host_pages, self.disk_pages, 0.1, 0.2)
        counts = zip(Tier, (sizes.device, sizes.host, sizes.disk), strict=True)
        slots = [slot(tier, page) for tier, pages in counts for page in range(pages)]
        self.arenas[link.actor] = self.make_arena(slots)
        presence = self._presence(link, "MemPoolShard")
        caching = self.retire != "none"
        pool = Pool(sizes, PAGE_TOKENS, 10.0, caching=caching, home=Home(len(self.arenas), self.incarnations))
        exchange = Exchange(pool, link.actor, Geometry(PAGE_BYTES, 1), "host", 1)
        exchange.open(("mapped",), (Way("mapped", link.actor),))
        core = ShardCore(pool, schedulers=presence.schedulers, exchange=exchange)
        actor = await self._start(name, link, core, Reporting(core, presence, core.needs))
        moving: dict[int, trio.CancelScope] = {}

        def move(action: MoverOrder) -> None:
            match action.order:
                case Write():
                    self.nursery.start_soon(self._move, actor, action.order, moving)
                case StopWriting(number) if number in moving:
                    moving[number].cancel()

        actor.shell.perform[MoverOrder] = move
        actor.shell.perform[Copy] = lambda action: self.nursery.start_soon(self._copy, actor, action)
        return actor

    async def _move(self, shard: Actor, write: Write, moving: dict[int, trio.CancelScope]) -> None:
        """A mover: it writes page by page over ``move_s``; a broken transfer leaves half of them written."""
        transfer, outcome = write.transfer, None
        source, target = self.arenas[shard.id], self.arenas[write.way.address]
        broken = len(transfer.source) // 2 if self.move_fails(transfer.id) else -1
        with trio.CancelScope() as moving[transfer.id]:
            for i, (page, there) in enumerate(zip(transfer.source, transfer.destination, strict=True)):
                await trio.sleep(self.move_s / len(transfer.source))
                if shard.scope.cancel_called:
                    return
                target[there][:] = [-2] * PAGE_TOKENS if i == broken else source[page]
                if i == broken:
                    outcome = WriteFailed(transfer.id, Failure.CUT, "broken off")
                    break
            else:
                outcome = Wrote(transfer.id, len(transfer.source) * PAGE_BYTES)
        if not shard.scope.cancel_called:
            shard.shell.tell(outcome or WriteFailed(transfer.id, Failure.WITHDRAWN, "stopped"))

    async def _copy(self, shard: Actor, copy: Copy) -> None:
        """A copy between tiers: it ends late and only then reads the pages; some from disk are damaged."""
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
        """Start a worker of any role on ``shard``."""
        link = self._new_link(name)
        home = self.actors[shard]
        link.connect(home.id, home.shell.link.endpoint)
        kind = "PrefillWorker" if role == "prefill" else "DecodeWorker"
        presence = self._presence(link, kind, role, home.id)
        presence.also = (home.id,)
        limits = BatchLimits(self.chunk_tokens, self.rows)
        settings = WorkerSettings(
            limits,
            PAGE_TOKENS,
            MAX_CONTEXT,
            self.retire,
            self.fetch_s,
            self.returns,
            self.ahead and self.retire == "all",
            PAGE_BYTES,
            self.draft,
            self.overlaps,
        )
        core = WorkerCore(presence, home.id, settings)
        engine = self.make_engine(self.arenas[home.id])
        actor = await self._start(name, link, core, Reporting(core, presence, core.needs))

        async def step(plan: BatchPlan) -> None:
            with trio.CancelScope() as scope:
                await trio.sleep(self.step_s)
                if actor.paused:
                    await trio.sleep(PAUSE_S)
            if not actor.scope.cancel_called and not scope.cancelled_caught:
                core.check()
                actor.shell.tell(BatchDone(engine.run(plan)))

        give, given = trio.open_memory_channel[BatchPlan](AHEAD)

        async def steps() -> None:
            async for plan in given:
                await step(plan)

        self.nursery.start_soon(steps)
        actor.shell.perform[RunBatch] = lambda action: give.send_nowait(action.plan)
        return actor

    def make_arena(self, slots: list[int]):
        """An arena: empty pages by slot."""
        return {one: [0] * PAGE_TOKENS for one in slots}

    def make_engine(self, arena):
        """The engine that runs steps on the pages of an arena."""
        return PageEngine(arena)

    async def frontend(self, name: str = "frontend-0") -> FrontendService:
        """Start a Frontend without HTTP; the service that HTTP handlers would call."""
        link = self._new_link(name)
        presence = self._presence(link, "Frontend")
        core = FrontendCore(presence, 64)
        actor = await self._start(name, link, core, Reporting(core, presence))
        return FrontendService(core, actor.shell)

    def _fence(self, actor: ActorId) -> None:
        """Kill an actor that is presumed dead, as a shard does."""
        found = next((one for one in self.actors.values() if one.id == actor), None)
        if found is not None:
            self.kill(actor.rpartition(".")[0])

    def pause(self, name: str) -> None:
        """Pause a worker as SIGSTOP does: no messages in or out, and its step ends PAUSE_S late."""
        self.actors[name].paused = True
        self.bus.unbind(self.actors[name].shell.link)
        self.actors[name].shell.link.send = lambda to, message: None

    def kill(self, name: str) -> None:
        """Kill an actor; with ``announce_deaths`` the supervisor reports it to the schedulers at once."""
        actor = self.actors.pop(name)
        actor.scope.cancel()
        self.bus.unbind(actor.shell.link)
        if self.announce_deaths:
            from memserve.actions import Died

            for one in self.actors.values():
                if isinstance(one.core, SchedulerCore):
                    one.shell.tell(Died(actor.id))

    def check(self) -> None:
        """Check the invariants of every core."""
        for actor in self.actors.values():
            actor.core.check()

    def pool(self, name: str = "s0") -> Pool:
        """The pool of a shard."""
        return self.actors[name].core.pool

    async def settled(self, frontend: FrontendService) -> None:
        """Wait until requests can be placed."""
        with trio.fail_after(30):
            while not frontend.health().serves:
                await trio.sleep(0.01)


@asynccontextmanager
async def memory_cluster(
    *workers: tuple[str, str] | tuple[str, str, str], pages: int = 400, kind=MemoryCluster, **settings
) -> AsyncIterator[tuple[MemoryCluster, FrontendService]]:
    """A ready cluster: a scheduler, the given (name, role, shard) workers, their shards and a Frontend.

    A worker without a shard is on s0, which always exists.
    """
    async with trio.open_nursery() as nursery:
        cluster = kind(nursery, pages, **settings)
        await cluster.scheduler()
        homes = [(*one, "s0")[2] for one in workers]
        for shard in dict.fromkeys(["s0", *homes]):
            await cluster.shard(shard)
        for (name, role, *_), shard in zip(workers, homes, strict=True):
            await cluster.worker(name, role, shard)
        frontend = await cluster.frontend()
        await cluster.settled(frontend)
        yield cluster, frontend
        nursery.cancel_scope.cancel()


async def generate(frontend: FrontendService, prompt: list[int], max_tokens: int, seed: int = 0) -> list[int]:
    """All ``max_tokens`` tokens of one request: no token ends it early."""
    return await generate_with(frontend, prompt, Sampling(0.0, seed=seed), max_tokens, ())


async def generate_with(
    frontend: FrontendService, prompt: list[int], how: Sampling, max_tokens: int, ends: tuple[int, ...]
) -> list[int]:
    """The tokens of one request, up to one of ``ends``."""
    params = GenerationParams(how, max_tokens, stop_tokens=ends)
    tokens: list[int] = []
    with trio.fail_after(300):
        async with frontend.open(pack(prompt), params, "") as stream:
            await stream.listen(lambda chunk: tokens.extend(chunk.tokens) or True)
    return tokens


async def baseline(cluster: MemoryCluster) -> None:
    """Wait until no page is leased, then check all cores. Fails after 60 s."""
    pools = [one.core.pool for one in cluster.actors.values() if isinstance(one.core, ShardCore)]
    with trio.fail_after(60):
        while any(pool.leased_pages or len(pool.leases) for pool in pools):
            await trio.sleep(0.05)
    cluster.check()
