"""The MemPoolShard owns the KV pages of one memory domain.

It tracks who holds each page, copies pages between tiers, and hands the memory of its arenas to workers and
clients.

:func:`open_shard` runs a shard by itself, for a program that uses a pool and nothing else of memserve.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import structlog
import trio

from memserve.actions import Copy, CopyDone, Kill, MoverOrder
from memserve.actors.loop import Shell
from memserve.actors.membership import introduce, pass_on_deaths
from memserve.bus import open_link
from memserve.errors import UserError, unwrapped
from memserve.identity import ActorId, actor_name
from memserve.kernels.arena import Arena, serve_arena, serve_packet
from memserve.kernels.gpu_memory import GpuArena
from memserve.kernels.gpu_store import GpuPageStore, open_gpu_store
from memserve.kernels.page_store import DiskFile, PageStore
from memserve.mempool.addresses import Home, Tier, tier_of
from memserve.mempool.exchange import Exchange
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.presence import Reporting
from memserve.processes.actor import ActorContext
from memserve.processes.lifecycle import process_title
from memserve.settings.gpus import device_index
from memserve.transfer.mover import host_identity
from memserve.transfer.settings import TransferSettings
from memserve.transfer.shell import open_transfers
from memserve.transfer.values import Geometry
from memserve.transfer_messages import Granularity

log = structlog.get_logger()

GRANULARITY = {
    "by_request_agg": Granularity.AGGREGATED,
    "by_request": Granularity.BY_REQUEST,
    "by_layer": Granularity.BY_LAYER,
}
KILL_S = 1.0
"""Longest wait for a killed process to be gone; it takes microseconds unless the kernel is in trouble."""


@attrs.frozen(kw_only=True)
class ShardSettings:
    """Settings that a shard gets at start."""

    capacity: Capacity
    """Number of pages in each tier."""
    page_tokens: int
    page_bytes: int
    lease_s: float = 10.0
    """A client that is silent for longer loses its leases."""
    caching: bool = True
    number: int = 0
    """The shard's number in addresses: unique among the shards that a client uses."""
    disk_dir: Path = Path(".")
    """The directory of the disk tier's file."""
    layers: int = 1
    """Number of layers that a page divides into, in the model's order."""
    transfer: TransferSettings = attrs.field(factory=TransferSettings)
    granularity: Granularity = Granularity.AGGREGATED
    """The portions in which pages are sent to other shards."""
    gpu: int | None = None
    """Index of the GPU that holds the pages; None: host memory."""
    weights: Callable[[], Path] | None = None
    """Finds the file of the weights that a GPU's shard holds for its workers. Blocks."""


# ---- the actor -----------------------------------------------------------------------------------------------


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve pool calls until drained; by then the supervisor has drained the workers."""
    settings = settings_of(context)
    disk = await trio.to_thread.run_sync(open_disk, settings, context.host_serves())
    if disk is None:
        settings = attrs.evolve(settings, capacity=attrs.evolve(settings.capacity, disk=0))
    async with open_link(context.id, context.inbox, context.keys) as link:
        presence = introduce(context, link)
        sockets = arena_sockets(context.id, settings, context.place.socket_path)
        core = make_core(context.id, settings, sockets, presence.schedulers)
        shell = Shell(Reporting(core, presence, core.needs), link)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(pass_on_deaths, context, shell)
            huge_bytes = await nursery.start(keep_pages, shell, core.exchange, settings, sockets, disk)
            sizes = settings.capacity
            log.info(
                "arena ready",
                pages=sizes.device,
                bytes=sizes.device * settings.page_bytes,
                huge_bytes=huge_bytes,
                host_pages=sizes.host,
                disk_pages=sizes.disk,
            )
            presence.become("ready")
            shell.turn()
            task_status.started()
            await context.lifeline.drain.wait()
            presence.become("draining")  # so that other hosts do not report it as missing
            shell.turn()
            nursery.cancel_scope.cancel()
        core.check()


def settings_of(context: ActorContext) -> ShardSettings:
    """The shard's settings, derived from the configuration."""
    resolved = context.resolved
    pool, transfer = resolved.config.pool, resolved.config.transfer
    device = resolved.shard_pages[context.name]
    return ShardSettings(
        capacity=Capacity(device, resolved.host_pages, resolved.disk_pages, pool.swap_low, pool.swap_high),
        page_tokens=pool.page_tokens,
        page_bytes=resolved.page_bytes,
        lease_s=pool.lease_s,
        caching=resolved.config.cache.mode != "off",
        number=[shard.name for shard in resolved.config.shard].index(context.name),
        disk_dir=Path(resolved.disk_dir),
        layers=resolved.spec.layers,
        transfer=TransferSettings(path=transfer.path, host=resolved.transfer_host),
        granularity=GRANULARITY[transfer.granularity],
        gpu=device_index(resolved.shard(context.name).device),
        weights=lambda: context.model_files(on_gpus=True).weights,
    )


@asynccontextmanager
async def open_shard(name: str, folder: Path, settings: ShardSettings) -> AsyncIterator[str]:
    """Run a shard in this program for a ``with`` block; gives its endpoint.

    ``folder``, for the sockets, must have mode 0700. Raises UserError when there is too little memory or disk
    space.
    """
    actor = ActorId(f"{name}.{secrets.token_hex(4)}")
    endpoint = f"ipc://{folder / actor}.sock"
    sockets = arena_sockets(actor, settings, lambda file: folder / file)
    with unwrapped():
        async with open_link(actor, endpoint) as link, trio.open_nursery() as nursery:
            core = make_core(actor, settings, sockets, ())
            shell = Shell(core, link)
            await nursery.start(shell.run)
            disk = await trio.to_thread.run_sync(open_disk, settings)
            await nursery.start(keep_pages, shell, core.exchange, settings, sockets, disk)
            yield endpoint
            nursery.cancel_scope.cancel()


# ---- its parts -----------------------------------------------------------------------------------------------


def arena_sockets(actor: ActorId, settings: ShardSettings, place: Callable[[str], Path]) -> dict[Tier, Path]:
    """The socket path at which each memory tier's arena is handed out."""
    sockets = {Tier.DEVICE: place(f"{actor}.arena")}
    if settings.capacity.host:
        sockets[Tier.HOST] = place(f"{actor}.host.arena")
    return sockets


def make_core(
    actor: ActorId, settings: ShardSettings, sockets: dict[Tier, Path], schedulers: tuple[ActorId, ...]
) -> ShardCore:
    """The core of one incarnation of a shard."""
    home = Home(settings.number, int(actor.rpartition(".")[2], 16))
    pool = Pool(
        settings.capacity, settings.page_tokens, settings.lease_s, caching=settings.caching, home=home
    )
    mappable = sockets if settings.gpu is None else {**sockets, Tier.DEVICE: ""}
    arenas = tuple(str(mappable.get(tier, "")) for tier in Tier)
    geometry = Geometry(settings.page_bytes, settings.layers)
    exchange = Exchange(pool, actor, geometry, host_identity(), os.getpid(), settings.granularity)
    return ShardCore(
        pool,
        schedulers=schedulers,
        page_bytes=settings.page_bytes,
        arenas=arenas,
        exchange=exchange,
    )


async def keep_pages(
    shell: Shell,
    exchange: Exchange,
    settings: ShardSettings,
    sockets: dict[Tier, Path],
    disk: DiskFile | None,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hold the memory of all tiers, hand out the arenas, and make the copies that the core orders.

    Runs until cancelled, and closes ``disk`` then. Once ready, reports through ``task_status`` how many bytes
    of host memory are in huge pages. Raises UserError when there is too little memory.
    """
    copiers = Copiers(shell, trio.Event())
    shell.perform[Kill] = fence
    with contextlib.ExitStack() as held:  # closed when the tasks that use it have ended, threads included
        if disk is not None:
            held.callback(disk.close)
        async with trio.open_nursery() as nursery:
            shell.perform[Copy] = lambda copy: nursery.start_soon(copiers.copy, copy)
            device, arenas = await open_memory(held, copiers, exchange.me, settings, disk)
            if isinstance(device, GpuArena):
                await nursery.start(serve_packet, device.header.encode(), (), sockets[Tier.DEVICE])
            for tier, arena in arenas.items():
                await nursery.start(serve_arena, arena, sockets[tier])
            await nursery.start(move_pages, shell, exchange, settings, device, sockets[Tier.DEVICE])
            copiers.ready.set()
            task_status.started(sum(arena.huge_bytes for arena in arenas.values()))
            await trio.sleep_forever()


async def open_memory(
    held: contextlib.ExitStack,
    copiers: Copiers,
    actor: ActorId,
    settings: ShardSettings,
    disk: DiskFile | None,
) -> tuple[Arena | GpuArena, dict[Tier, Arena]]:
    """Allocate the memory of all tiers and give ``copiers`` a store over it.

    Returns the device tier and all arenas in host memory. ``held`` closes the memory. Raises UserError.
    """
    # Prefaulting takes a second for each GiB, so it runs in a thread, and heartbeats keep going out.
    arenas = await trio.to_thread.run_sync(allocate, actor, settings)
    for arena in arenas.values():
        held.callback(arena.close)
    memory = {tier: arena.memory for tier, arena in arenas.items()}
    held.callback(memory.clear)
    held.callback(copiers.drop)
    if settings.gpu is None:
        copiers.store = PageStore(settings.page_bytes, memory, disk)
        return arenas[Tier.DEVICE], arenas
    gpu = await trio.to_thread.run_sync(allocate_on_gpu, actor, settings)
    held.callback(gpu.close)
    copiers.store = store = await trio.to_thread.run_sync(open_gpu_store, gpu, memory.get(Tier.HOST), disk)
    held.callback(store.close)
    return gpu, arenas


async def move_pages(
    shell: Shell,
    exchange: Exchange,
    settings: ShardSettings,
    arena: Arena | GpuArena,
    socket: Path,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Move pages to and from other shards as the core orders, until cancelled."""
    async with open_transfers(settings.transfer, arena, exchange.geometry, socket, shell.tell) as transfers:
        perform = transfers.perform
        shell.perform[MoverOrder] = lambda move: perform[type(move.order)](move.order)
        exchange.open(transfers.paths, transfers.ways)
        task_status.started()
        await trio.sleep_forever()


def open_disk(settings: ShardSettings, may_lack: bool = False) -> DiskFile | None:
    """The file for the pages of the disk tier; None if the shard has no such tier.

    Also None if the file cannot be made and the shard ``may_lack`` it; if it may not, raises UserError. Blocks.
    """
    if not settings.capacity.disk:
        return None
    try:
        return DiskFile.create(settings.disk_dir, settings.capacity.disk, settings.page_bytes)
    except UserError as error:
        if not may_lack:
            raise
        log.error("disk tier lost", reason=str(error))
        return None


def allocate(actor: ActorId, settings: ShardSettings) -> dict[Tier, Arena]:
    """The memory for the pages of all tiers in the host's memory.

    Blocks. Raises UserError when the machine has too little.
    """
    sizes, page_bytes = settings.capacity, settings.page_bytes
    pages = {Tier.DEVICE: sizes.device if settings.gpu is None else 0, Tier.HOST: sizes.host}
    return {tier: Arena.create(actor, n, page_bytes) for tier, n in pages.items() if n}


def allocate_on_gpu(actor: ActorId, settings: ShardSettings) -> GpuArena:
    """The memory for a GPU shard's pages and weights.

    Blocks. Raises UserError when there is no room or no sharing.
    """
    assert settings.gpu is not None and settings.weights is not None, "a shard without a GPU"
    return GpuArena.create(
        actor, settings.gpu, settings.capacity.device, settings.page_bytes, settings.weights()
    )


@attrs.define(eq=False)
class Copiers:
    """Copies pages in two threads: one for copies that requests wait for, one for copies that make room.

    So neither kind waits for the other.
    """

    shell: Shell
    ready: trio.Event
    store: PageStore | GpuPageStore | None = None
    _in: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False)
    _out: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), init=False)

    def drop(self) -> None:
        """Drop the reference to the store, which keeps the memory of its tiers mapped."""
        self.store = None

    async def copy(self, copy: Copy) -> None:
        """Make one copy, and report the result to the core."""
        await self.ready.wait()
        assert self.store is not None, "pages are copied after the store was closed"
        source, target, _ = copy.runs[0]
        limiter = self._in if tier_of(target) < tier_of(source) else self._out
        bad = await trio.to_thread.run_sync(self.store.copy, copy.runs, limiter=limiter)
        self.shell.tell(CopyDone(copy.id, bad))


def fence(kill: Kill) -> None:
    """Kill a worker that is presumed dead, if it still exists, and wait until it is gone.

    SIGKILL ends a stopped process too.
    """
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(kill.pid)
        try:
            title = Path(f"/proc/{kill.pid}/cmdline").read_bytes()
            if title.startswith(os.fsencode(process_title(actor_name(kill.actor), ""))):  # no reused pid
                signal.pidfd_send_signal(process, signal.SIGKILL)
                ended = select.poll()  # not select(): the shard may have more than 1,024 descriptors
                ended.register(process, select.POLLIN)
                ended.poll(KILL_S * 1e3)
                log.warning("worker fenced off", worker=kill.actor, worker_pid=kill.pid)
        except FileNotFoundError:
            pass  # it ended between the two look-ups
        finally:
            os.close(process)
