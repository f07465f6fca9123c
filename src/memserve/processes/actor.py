"""One actor as a process: what it gets at start, how it runs, and how it ends.

This is the child's side of the supervisor. A lifeline ties it to its supervisor, see
:mod:`memserve.processes.lifeline`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs
import structlog
import trio

from memserve import observe
from memserve.config import Resolved
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.kernels.memory import shortage
from memserve.processes.lifecycle import (
    STATUS_CRASHED,
    STATUS_DRAINED,
    STATUS_RESTART,
    STATUS_USER_ERROR,
    WORKER_KINDS,
    ActorSpec,
    roster,
)
from memserve.processes.lifeline import EventSocket, Lifeline
from memserve.processes.place import Place, PlaceGone
from memserve.settings.network import KeyPair

if TYPE_CHECKING:
    from memserve.engine.spec import ModelSpec
    from memserve.engine.weights import ModelFiles

log = structlog.get_logger()

GONE_GRACE_S = 0.5
"""Time from the supervisor's death to ``os._exit``, whatever the actor's threads are doing."""
GROUP_SIGNAL_S = 0.5
"""If the supervisor got the same signal, it has recorded within this time that it drains the cluster."""

MODULES = {
    "Frontend": "memserve.actors.frontend",
    "GlobalScheduler": "memserve.actors.global_scheduler",
    "MemPoolShard": "memserve.actors.mempool_shard",
    "PrefillWorker": "memserve.actors.prefill_worker",
    "DecodeWorker": "memserve.actors.decode_worker",
}
"""The module with the ``main`` of each kind of actor."""
ENGINE_MODULES = ("memserve.engine.runner", "memserve.engine.calibration", "memserve.kernels.arena")
"""What the engine of a worker needs, beyond what its actor imports."""


def modules_of(actors: Iterable[ActorSpec], resolved: Resolved) -> list[str]:
    """What the processes of ``actors`` import, for a zygote to import before it forks them."""
    from memserve.kernels.native_build import why_not

    kinds = dict.fromkeys(actor.kind for actor in actors)
    modules = [MODULES[kind] for kind in kinds]
    if not kinds.keys().isdisjoint(WORKER_KINDS):
        modules += ENGINE_MODULES
        if resolved.on_gpus or why_not(resolved.spec, resolved.config.model.dtype):
            modules.append("torch")
    return modules


class RestartNeeded(Exception):
    """Raised by an actor that lost its shard or was fenced off.

    It ends with status 3, and a successor is started.
    """


# ---- the process ---------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class ActorContext:
    """Everything that an actor's ``main`` gets."""

    name: str
    kind: str
    id: ActorId
    incarnation: str
    resolved: Resolved
    place: Place
    lifeline: Lifeline

    @property
    def inbox(self) -> str:
        """The endpoint to bind its inbox to."""
        network = self.resolved.network
        return network.inbox if network else self.place.endpoint(self.id)

    @property
    def keys(self) -> KeyPair | None:
        """The keys that open connections to other actors; None where these are Unix sockets."""
        return self.resolved.network.keys if self.resolved.network else None

    def scheduler(self, name: str) -> str:
        """The well-known endpoint of a scheduler."""
        network = self.resolved.network
        return network.head if network else self.place.endpoint(name)

    def model_files(self, on_gpus: bool | None = None) -> ModelFiles:
        """The model's files, in the form for GPUs, or if not given, in that of all shards together.

        Blocks for as long as it takes to make missing ones. Raises UserError.
        """
        resolved, model = self.resolved, self.resolved.config.model
        form = resolved.on_gpus if on_gpus is None else on_gpus
        return ready_model(resolved.model_path, resolved.spec, model.stored, model.dtype, on_gpus=form)

    def host_serves(self) -> bool:
        """Whether this host's cluster has been ready: then this actor follows one that died, or has joined."""
        return bool(self.place.read_info()["state"] == "ready")

    def host_drains(self) -> bool:
        """Whether all actors of this host are asked to end. Then requests can come from other hosts only."""
        with contextlib.suppress(PlaceGone):
            return bool(self.place.read_info()["state"] == "draining")
        return True


class ActorMain(Protocol):
    """An actor's main, which returns when drained. ``task_status.started()`` means ``lifeline.ready()``."""

    async def __call__(self, context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None: ...


def run_actor(name: str, runtime_dir: str, lifeline_fd: int) -> int:
    """Run the actor ``name`` until it is drained or its supervisor is gone; a ``STATUS_*`` exit status."""
    raise_descriptor_limit()
    try:
        place = Place.join(Path(runtime_dir))
        resolved = Resolved.from_json(json.dumps(place.read_info()["resolved"]).encode())
    except PlaceGone:
        return STATUS_CRASHED
    context = _context(name, resolved, place, EventSocket(socket.socket(fileno=lifeline_fd)))
    leave = _once(partial(place.leave, context.id))
    threading.Thread(target=_exit_when_alone, args=[lifeline_fd, leave], daemon=True).start()
    try:
        return _live(context, leave)
    finally:
        leave()


def raise_descriptor_limit() -> None:
    """Let this process open as many files and connections as its system allows.

    Most systems set a limit of 1,024 that any process may raise: fewer than a Frontend's clients, or a large
    cluster's members.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _context(name: str, resolved: Resolved, place: Place, events: EventSocket) -> ActorContext:
    """Draw the incarnation, send hello, and open the log."""
    kind = {spec.name: spec.kind for spec in roster(resolved)}[name]
    incarnation = secrets.token_hex(4)
    actor = ActorId(f"{name}.{incarnation}")
    lifeline = Lifeline(actor, events, _freeze_start_up)
    lifeline.hello()
    path = Path(resolved.run_dir) / f"{name}.jsonl"
    # Later: the supervisor could write here when the cluster began, and a disk may have become read-only since.
    observe.configure(
        path, resolved.config.logging.level, actor=actor, kind=kind, pid=os.getpid(), later=True
    )
    return ActorContext(name, kind, actor, incarnation, resolved, place, lifeline)


def _live(context: ActorContext, leave: Callable[[], None]) -> int:
    """Import and run the actor; the exit status."""
    try:
        main: ActorMain = importlib.import_module(MODULES[context.kind]).main
        trio.run(_run, context, main)
    except Exception as error:  # the process ends here: every failure becomes a status and a text
        return _explain(error)
    if context.lifeline.gone.is_set():
        log.warning("supervisor gone")
        leave()
        os._exit(STATUS_CRASHED)  # interpreter shutdown could wait for an engine thread
    log.info("actor drained" if context.lifeline.drain.is_set() else "actor ended")
    return STATUS_DRAINED


async def _run(context: ActorContext, main: ActorMain) -> None:
    """Run the actor next to tasks that may end it: SIGTERM drains it, its supervisor's death cancels it."""
    lifeline = context.lifeline
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_alone, lifeline, nursery.cancel_scope)
            nursery.start_soon(_drain_on, signals, context)
            nursery.start_soon(lifeline.beat)
            await main(context, task_status=_Started(lifeline))
            nursery.cancel_scope.cancel()


async def _stop_when_alone(lifeline: Lifeline, everything: trio.CancelScope) -> None:
    """Cancel the actor when its supervisor is gone."""
    await lifeline.listen()
    everything.cancel()


def _exit_when_alone(lifeline_fd: int, leave: Callable[[], None]) -> None:
    """As a thread, end the process GONE_GRACE_S after its supervisor's death, whatever other threads do.

    Cancelling does not reach a step in a native thread, a blocked event loop, or a long import.
    """
    poll = select.poll()
    poll.register(lifeline_fd, select.POLLRDHUP)
    poll.poll()
    time.sleep(GONE_GRACE_S)
    leave()
    os._exit(STATUS_CRASHED)


async def _drain_on(signals: AsyncIterator[int], context: ActorContext) -> None:
    """Drain on a SIGTERM to this actor alone; one to its group (systemd, timeout) is the supervisor's.

    A shard that drained at once would end while streams that the supervisor lets finish still use it.
    """
    async for _ in signals:
        await trio.sleep(GROUP_SIGNAL_S)
        if not context.host_drains():
            context.lifeline.drain.set()


@attrs.frozen
class _Started:
    """The ``task_status`` of an actor's main."""

    _lifeline: Lifeline

    def started(self, _value: object = None) -> None:
        self._lifeline.ready()


def _freeze_start_up() -> None:
    """Exclude the objects made at start-up, which live as long as the process, from garbage collection.

    Measured with torch imported (180,000 objects): a full collection takes 90 ms before this and 0.01 ms
    after. With the Frontend's libraries (44,000 objects) it takes 10 ms before. Each collection would stall
    every running stream.
    """
    gc.collect()
    gc.freeze()


def _once(leave: Callable[[], None]) -> Callable[[], None]:
    """``leave`` for several threads: the first call runs it, and no call returns before it is done."""
    lock = threading.Lock()

    def leave_once() -> None:
        with lock:
            leave()

    return leave_once


def _explain(error: BaseException) -> int:
    """Write why the actor failed to stderr, for the supervisor, and to its log; the exit status."""
    causes = list(leaves(error))
    if wants := [want for cause in causes if (want := shortage(cause))]:
        log.critical("too little memory", exc_info=error)
        print(wants[0], file=sys.stderr)
        return STATUS_USER_ERROR
    text = "\n".join(dict.fromkeys(map(str, causes)))
    if all(isinstance(cause, UserError) for cause in causes):
        log.error("actor cannot run", reason=text)
        print(text, file=sys.stderr)
        return STATUS_USER_ERROR
    if all(isinstance(cause, RestartNeeded) for cause in causes):
        log.warning("actor asks to be restarted", reason=text)
        print(text, file=sys.stderr)
        return STATUS_RESTART
    # A nursery wraps even a single exception in a group, which would only hide the line that matters.
    error = causes[0] if len(causes) == 1 else error
    log.critical("actor crashed", exc_info=error)
    traceback.print_exception(error)
    return STATUS_CRASHED


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions within nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


# ---- the weights ---------------------------------------------------------------------------------------------


def prepare_weights(path: str, stored: str, dtype: str, on_gpus: str = "") -> int:
    """Convert the weights and compile the native step unless the cache has them; the exit status.

    ``stored``: the type of the stored matrices. ``dtype``: the type in which the model runs. ``on_gpus``: not
    empty where all shards are on GPUs, which do not use the native step.

    This runs in a process of its own, because of the memory it takes. Its lifeline is its standard input: at
    the end of file its supervisor is gone, and it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
    from memserve.engine.checkpoint import read_spec
    from memserve.engine.weights import default_cache_dir

    compiling = threading.Thread(target=_compile_native, args=[default_cache_dir()])
    if dtype == "bfloat16" and not on_gpus:
        compiling.start()  # concurrently with the conversion: each takes seconds on one core
    try:
        ready_model(path, read_spec(path), stored, dtype, on_gpus=bool(on_gpus))
    except Exception as error:
        if not (text := shortage(error) or (isinstance(error, UserError) and str(error))):
            raise
        print(text, file=sys.stderr)
        return STATUS_USER_ERROR
    return 0


def ready_model(path: str, spec: ModelSpec, stored: str, dtype: str, *, on_gpus: bool) -> ModelFiles:
    """The model's files for every process of this host: matrices as ``stored``, for a run in ``dtype``.

    The matrices are in tiles where the native step can run the model and a shard is on the host. Raises
    UserError, as ``prepare`` does.
    """
    from memserve.engine.weights import prepare
    from memserve.kernels.native_build import why_not

    return prepare(path, stored, tiled=not on_gpus and why_not(spec, dtype) is None)


def _compile_native(cache_dir: Path) -> None:
    from memserve.kernels.native_build import NativeUnavailable, built_library

    with contextlib.suppress(NativeUnavailable):  # the workers report it, and serve with torch
        built_library(cache_dir)


def _exit_at_end_of_input() -> None:
    os.read(0, 1)
    os._exit(STATUS_CRASHED)
