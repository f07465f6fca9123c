"""What a prefill and a decode worker have in common, which is nearly all: the core and the engine are the same.

Start-up: find the shard, attach to its arena, map the weights, run a step to warm up, then say that it is ready.
"""

from __future__ import annotations

import importlib
import os
from functools import partial

import trio

from memserve.actions import BatchDone, RunBatch
from memserve.actors.engine_thread import EngineThread
from memserve.actors.loop import Shell
from memserve.bus import Link, open_link
from memserve.config import Resolved, ShardConfig
from memserve.engine.batching import BatchLimits
from memserve.engine.plans import StepEngine
from memserve.engine.worker import WorkerCore, WorkerSettings
from memserve.errors import PeerError, PeerUnreachable
from memserve.gpus import device_index
from memserve.messages import ActorId, Member
from memserve.process import ActorContext, RestartNeeded, ready_model
from memserve.scheduling.joining import JoiningCore
from memserve.scheduling.presence import Presence, Reporting, seed_id

RETIRE = {"off": "none", "1": "prompt", "2": "all", "3": "all"}
"""Which pages each caching mode gives to the index. On a shared shard modes 2 and 3 do the same, moving no byte."""
SHARD_WAIT_S = 60.0
"""How long a starting worker waits for its shard before it asks to be restarted."""
CORES_FILE = "cores.lock"


async def run_worker(context: ActorContext, task_status: trio.TaskStatus[None]) -> None:
    """Be a worker until drained. Raises RestartNeeded when the shard is gone or this incarnation is fenced off."""
    config = next(one for one in context.resolved.config.worker if one.name == context.name)
    async with open_link(context.id, context.place.endpoint(context.id)) as link:
        presence = introduce(context, link, config.role)
        joining = JoiningCore(context.id, config.shard)
        shell = Shell(Reporting(joining, presence), link)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(trio.to_thread.run_sync, import_engine, shard_of(context).on_gpu)
            shard = await shard_found(shell, joining)
            engine = EngineThread(partial(start_engine, context, shard))
            await nursery.start(engine.run)
            core = WorkerCore(presence, shard, settings_of(context.resolved))
            take_charge(shell, core, engine)
            task_status.started()
            await until_drained(shell, core, context.lifeline.drain)
            nursery.cancel_scope.cancel()


def introduce(context: ActorContext, link: Link, role: str = "") -> Presence:
    """This actor's presence, with a way to every scheduler."""
    schedulers = context.resolved.config.scheduler_names
    for name in schedulers:
        link.connect(seed_id(name), context.place.endpoint(name))
    me = Member(context.id, context.kind, link.endpoint, os.getpid(), "starting", role)
    return Presence(me, tuple(seed_id(name) for name in schedulers))


async def shard_found(shell: Shell, joining: JoiningCore) -> ActorId:
    """Wait for the shard. Raises RestartNeeded after SHARD_WAIT_S."""
    with trio.move_on_after(SHARD_WAIT_S):
        while joining.found is None:
            await shell.turned.wait()
    if joining.found is None:
        raise RestartNeeded(f"the shard {joining.shard} did not become ready within {SHARD_WAIT_S:.0f} s")
    return joining.found


def settings_of(resolved: Resolved) -> WorkerSettings:
    """The core's settings out of the configuration."""
    config = resolved.config
    limits = BatchLimits(config.batch.chunk_tokens, config.batch.rows)
    return WorkerSettings(limits, config.pool.page_tokens, resolved.max_context, RETIRE[config.cache.mode])


def import_engine(on_gpu: bool) -> None:
    """Import torch while the shard still fills its arena: each takes seconds."""
    importlib.import_module("memserve.engine.cuda" if on_gpu else "memserve.engine.runner")


def start_engine(context: ActorContext, shard: ActorId) -> StepEngine:
    """Attach to the shard's arena and make the engine ready. Imports torch, and blocks: for a thread."""
    from memserve.engine.cores import Cores, Outsiders
    from memserve.engine.runner import CpuEngine
    from memserve.kernels.arena import attach_arena

    resolved = context.resolved
    if shard_of(context).on_gpu:
        return start_engine_on_gpu(context, shard)
    try:
        arena = attach_arena(context.place.socket_path(f"{shard}.arena"), resolved.page_bytes)
    except (PeerError, PeerUnreachable) as error:
        raise RestartNeeded(str(error)) from error
    model, page_tokens = resolved.config.model, resolved.config.pool.page_tokens
    files = ready_model(
        resolved.model_path, resolved.spec, model.stored, model.dtype, on_gpus=resolved.on_gpus
    )
    slot = [one.name for one in resolved.config.worker].index(context.name)
    threads = resolved.threads[context.name]
    cores = Cores(context.place.path / CORES_FILE, resolved.cores, threads, slot, outsiders=Outsiders())
    pages = arena.header.pages
    engine = CpuEngine(files.spec, files.weights, arena.memory, pages, page_tokens, model.dtype, cores)
    engine.warm_up()
    return engine


def shard_of(context: ActorContext) -> ShardConfig:
    """The configuration of the shard whose pages this worker uses."""
    config = next(one for one in context.resolved.config.worker if one.name == context.name)
    return context.resolved.shard(config.shard)


def start_engine_on_gpu(context: ActorContext, shard: ActorId) -> StepEngine:
    """The same for a shard on a GPU, which holds the weights too."""
    from memserve.engine.cuda import open_engine

    resolved, model = context.resolved, context.resolved.config.model
    files = ready_model(resolved.model_path, resolved.spec, model.stored, model.dtype, on_gpus=True)
    device = device_index(shard_of(context).device)
    assert device is not None, "a worker of a shard that is on no GPU"
    try:
        return open_engine(resolved, files, context.place.socket_path(f"{shard}.arena"), device)
    except (PeerError, PeerUnreachable) as error:
        raise RestartNeeded(str(error)) from error


def take_charge(shell: Shell, core: WorkerCore, engine: EngineThread) -> None:
    """Put the worker's own core in charge: what it plans, the engine runs, and the result comes back to it."""

    def run_batch(action: RunBatch) -> None:
        engine.submit(action.plan, lambda result: shell.tell(BatchDone(result)))

    shell.perform[RunBatch] = run_batch
    core.presence.also = (core.shard,)
    core.presence.become("ready", shard=core.shard)
    shell.core = Reporting(core, core.presence)
    shell.turn()


async def until_drained(shell: Shell, core: WorkerCore, drain: trio.Event) -> None:
    """Wait for the word, then for the last sequence to end or leave."""
    await drain.wait()
    core.presence.become("draining")
    shell.turn()
    while not core.idle:
        await shell.turned.wait()
