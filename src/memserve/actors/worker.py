"""What prefill and decode workers share, which is nearly everything: the core and the engine are the same.

Start-up: find the shard, attach to its arena, map the weights, run a warm-up step, measure the costs of
steps, then report ready.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from memserve.actions import BatchDone, RunBatch
from memserve.actors.engine_thread import EngineThread
from memserve.actors.loop import Shell
from memserve.actors.membership import introduce, pass_on_deaths
from memserve.bus import open_link
from memserve.config import Resolved
from memserve.costs import Site, StepCosts
from memserve.engine.batching import RETIRE, BatchLimits, WorkerSettings
from memserve.engine.guide import Guide
from memserve.engine.plans import StepEngine
from memserve.engine.worker import WorkerCore
from memserve.errors import PeerError, PeerUnreachable
from memserve.identity import ActorId
from memserve.presence import Reporting
from memserve.processes.actor import ActorContext, RestartNeeded
from memserve.processes.lifeline import Lifeline
from memserve.scheduling.joining import SHARD_WAIT_S, JoiningCore
from memserve.settings.gpus import device_index
from memserve.settings.sections import ShardConfig

if TYPE_CHECKING:
    from memserve.engine.calibration import TimeStep
    from memserve.engine.cuda import CudaEngine
    from memserve.engine.grammars import Grammars
    from memserve.engine.runner import CpuEngine

PLANNED_S = 0.3
"""Shortest stay of a draining worker: requests that were placed before the scheduler knew still arrive."""
CORES_FILE = "cores.lock"
GPU_FILE = "gpu-{}.lock"
"""The lock file of one GPU, by its index. It shows which of the GPU's workers have work."""
CALIBRATED = {False: (32, 1024), True: (256, 8192)}
"""Largest measured number of streams and context tokens, by whether the shard is on a GPU (CPU first).

Beyond these, costs are extrapolated linearly.
"""


@attrs.define
class Found:
    """Properties of the engine, found by the thread that starts it, for the worker's heartbeats."""

    costs: StepCosts | None = None
    site: Site | None = None
    drafts: bool = False
    """Whether the engine runs draft tokens."""
    overlaps: bool = False
    """Whether the engine takes a step while one is running."""


async def run_worker(context: ActorContext, task_status: trio.TaskStatus[None]) -> None:
    """Be a worker until drained.

    Raises RestartNeeded when the shard is gone or this incarnation is fenced off.
    """
    config = context.resolved.worker(context.name)
    async with open_link(context.id, context.inbox, context.keys) as link:
        presence = introduce(context, link, config.role)
        joining = JoiningCore(context.id, config.shard)
        shell = Shell(Reporting(joining, presence), link)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(pass_on_deaths, context, shell)
            nursery.start_soon(trio.to_thread.run_sync, import_engine, shard_of(context).on_gpu)
            shard = await shard_found(shell, joining)
            found = Found()
            at_work = partial(getattr, joining, "at_work")
            make = partial(start_engine, context, shard, found, at_work)
            engine = EngineThread(make, Guide(partial(read_grammars, context)))
            await nursery.start(engine.run)
            presence.member = attrs.evolve(presence.member, costs=found.costs, site=found.site)
            core = WorkerCore(presence, shard, settings_of(context.resolved, found))
            take_charge(shell, core, engine)
            task_status.started()
            await until_drained(shell, core, context)
            nursery.cancel_scope.cancel()


async def shard_found(shell: Shell, joining: JoiningCore) -> ActorId:
    """Wait for the shard to be ready; its id. Raises RestartNeeded after SHARD_WAIT_S."""
    with trio.move_on_after(SHARD_WAIT_S):
        while joining.found is None:
            await shell.turned.wait()
    if joining.found is None:
        raise RestartNeeded(f"the shard {joining.shard} did not become ready within {SHARD_WAIT_S:.0f} s")
    return joining.found


def settings_of(resolved: Resolved, found: Found) -> WorkerSettings:
    """The core's settings, from the configuration and from what the engine can do."""
    config = resolved.config
    limits = BatchLimits(config.batch.chunk_tokens, config.batch.rows)
    return WorkerSettings(
        limits,
        config.pool.page_tokens,
        resolved.max_context,
        RETIRE[config.cache.mode],
        fetch_s=config.transfer.deadline_s,
        returns=config.cache.mode == "3",
        ahead=config.transfer.ahead and RETIRE[config.cache.mode] == "all",
        page_bytes=resolved.page_bytes,
        draft=config.batch.draft if found.drafts else 0,
        overlaps=found.overlaps,
    )


def import_engine(on_gpu: bool) -> None:
    """Import the engine while the shard is still filling its arena; a GPU's takes seconds."""
    importlib.import_module("memserve.engine.cuda" if on_gpu else "memserve.engine.runner")


def start_engine(
    context: ActorContext,
    shard: ActorId,
    found: Found,
    at_work: Callable[[], StepCosts | None],
) -> StepEngine:
    """Attach to the shard's arena, prepare the engine and measure it.

    Blocks for a second or more, so it runs in a thread.
    """
    from memserve.engine.cpu_budget import Cores, Outsiders
    from memserve.engine.runner import CpuEngine
    from memserve.kernels.arena import attach_arena

    resolved = context.resolved
    if shard_of(context).on_gpu:
        return start_engine_on_gpu(context, shard, found, at_work)
    try:
        arena = attach_arena(context.place.socket_path(f"{shard}.arena"), resolved.page_bytes)
    except (PeerError, PeerUnreachable) as error:
        raise RestartNeeded(str(error)) from error
    model, page_tokens = resolved.config.model, resolved.config.pool.page_tokens
    files = context.model_files()
    threads = resolved.threads[context.name]
    cores = Cores(context.place.path / CORES_FILE, resolved.cores, threads, outsiders=Outsiders())
    pages = arena.header.pages
    engine = CpuEngine(
        files.spec, files.weights, arena.memory, pages, page_tokens, model.dtype, cores,
        max_context=resolved.max_context,
    )  # fmt: skip
    engine.warm_up()
    found.site = Site(cores.key, resolved.cores, threads)
    found.drafts = engine.native  # torch's sums for a chunk differ from those for a single token
    kind = "native" if engine.native else "torch"
    found.costs = calibrate(engine, resolved, threads, kind, at_work, sliced=engine.timer)
    return engine


def read_grammars(context: ActorContext) -> Grammars:
    """The grammar matcher over the model's tokens.

    Takes half a second and memory, so only a worker that needs it makes it.
    """
    from memserve.engine.grammars import Grammars
    from memserve.engine.tokenizer import Tokenizer

    files = context.model_files()
    return Grammars(Tokenizer.load(files.tokenizer), files.spec.vocab, files.spec.eos)


def calibrate(
    engine: CpuEngine | CudaEngine,
    resolved: Resolved,
    threads: int,
    kind: str,
    at_work: Callable[[], StepCosts | None],
    sliced: Callable[[int, int, int], TimeStep] | None = None,
) -> StepCosts:
    """The engine's step costs: remembered, taken from a busy worker of the shard, or measured now.

    One process measures at a time. ``kind``: the kind of engine, and the device it uses in addition to the
    host. ``sliced``: makes a timer of steps on fewer threads.
    """
    from memserve.engine.calibration import SLICED, calibrated, crowding, measure, patient
    from memserve.engine.weights import default_cache_dir

    config, spec = resolved.config, resolved.spec
    token_bytes = spec.kv_values_per_token * (4 if config.model.dtype == "float32" else 2)
    most_rows, most_context = CALIBRATED[resolved.on_gpus]
    chunk, rows = config.batch.chunk_tokens, min(config.batch.rows, most_rows)
    context = min(resolved.max_context, most_context)
    name: dict[str, object] = {
        "model": attrs.asdict(spec),
        "dtype": config.model.dtype,
        "weights": config.model.stored,
        "page_tokens": config.pool.page_tokens,
        "engine": kind,
        "batch": [chunk, rows, context],
    }

    def measuring() -> tuple[StepCosts, int]:
        whole = patient(engine.timer(rows, context), threads)
        costs, fewest = measure(whole, chunk, rows, context, token_bytes)
        if sliced is None or threads < SLICED:
            return costs, fewest  # a GPU or a single core is shared in time
        crowded = crowding(costs, whole, sliced(rows, context, threads // SLICED), context)
        return (crowded, fewest) if crowded is not None else (costs, 0)

    engine.rest()  # while this worker waits for its turn to measure, others may use its cores
    costs = calibrated(default_cache_dir(), name, measuring, threads, at_work)
    engine.rest()
    return costs


def shard_of(context: ActorContext) -> ShardConfig:
    """The configuration of the shard whose pages this worker uses."""
    return context.resolved.shard(context.resolved.worker(context.name).shard)


def start_engine_on_gpu(
    context: ActorContext,
    shard: ActorId,
    found: Found,
    at_work: Callable[[], StepCosts | None],
) -> StepEngine:
    """Like :func:`start_engine`, for a shard on a GPU, which holds the weights too."""
    from memserve.engine.cpu_budget import Cores
    from memserve.engine.cuda import open_engine

    resolved, files = context.resolved, context.model_files(on_gpus=True)
    device = device_index(shard_of(context).device)
    assert device is not None, "a worker of a shard that is on no GPU"
    try:
        shared = Cores(context.place.path / GPU_FILE.format(device), 1, 1)
        engine = open_engine(resolved, files, context.place.socket_path(f"{shard}.arena"), device, shared)
    except (PeerError, PeerUnreachable) as error:
        raise RestartNeeded(str(error)) from error
    found.site, found.overlaps = Site(shared.key), True
    found.costs = calibrate(engine, resolved, 1, f"flashinfer on {engine.device_name}", at_work)
    return engine


def take_charge(shell: Shell, core: WorkerCore, engine: EngineThread) -> None:
    """Put the worker's own core in charge: the engine runs its plans, and the results go back to it."""

    def run_batch(action: RunBatch) -> None:
        engine.submit(action.plan, lambda result: shell.tell(BatchDone(result)))

    shell.perform[RunBatch] = run_batch
    core.presence.also = (core.shard,)
    core.presence.become("ready", shard=core.shard)
    shell.core = Reporting(core, core.presence, core.needs)
    shell.turn()


async def until_drained(shell: Shell, core: WorkerCore, context: ActorContext) -> None:
    """Wait until the supervisor or an operator drains this worker, then until no sequence is left."""
    lifeline = context.lifeline
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_drain_when_told, shell, core, lifeline)
        while core.presence.member.state != "draining":
            await shell.turned.wait()
        nursery.cancel_scope.cancel()
    if not lifeline.drain.is_set():
        lifeline.leaving()
    if context.resolved.network or not context.host_drains():
        await trio.sleep(PLANNED_S)
    while not core.idle:
        await shell.turned.wait()


async def _drain_when_told(shell: Shell, core: WorkerCore, lifeline: Lifeline) -> None:
    await lifeline.drain.wait()
    core.presence.become("draining")
    shell.turn()
