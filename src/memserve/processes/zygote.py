"""A zygote: a process that has imported what actors need, and forks into each of them.

Imports take half a second of a core in each actor. An actor that is forked from a process that has done them
begins in some milliseconds, and shares the memory of what was imported.

The zygote waits at a socket for orders: the name of an actor, with its lifeline and the pipe for its output.
For each it forks twice, and the process in the middle ends at once. So the kernel makes the actor a child of
its supervisor, which has declared itself the reaper of such orphans (PR_SET_CHILD_SUBREAPER). The supervisor
waits for it as for any child, and nothing is lost with a zygote: if it dies, the next order starts another.
An actor's own children become the supervisor's too if they outlive it, and are ended: see
:mod:`memserve.processes.orphans`.

A process can be forked safely while it has a single thread, and before it has a ZeroMQ context, an event loop
or a GPU. A zygote imports modules and does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn, Self

import attrs
import structlog
import trio
from setproctitle import setproctitle

from memserve.engine.cpu_budget import engine_environment
from memserve.processes.lifecycle import process_title
from memserve.processes.orphans import BEGUN_BY, Orphans
from memserve.processes.place import Place
from memserve.settings.gpus import gpu_environment

log = structlog.get_logger()

FORK_S = 120.0
"""Longest wait for a fork; the first one waits for the imports, which a cold disk can make long."""
END_S = 1.0
"""Longest wait for a zygote's end."""
MESSAGE_BYTES_MAX = 4096
PR_SET_CHILD_SUBREAPER = 36


# ---- the supervisor's side -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Forked:
    """A process that a zygote forked; it has the interface of :class:`trio.Process`, as far as it is used."""

    pid: int
    stdout: trio.lowlevel.FdStream
    """Its stdout and stderr."""
    returncode: int | None = None
    """Its exit status, or minus the signal that killed it; None while nobody has seen it end."""
    _pidfd: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Until it is waited for, a process that has ended keeps its pid.
        self._pidfd = os.pidfd_open(self.pid)

    async def wait(self) -> int:
        """Wait until it has ended; the ``returncode``. One task at a time may wait."""
        if self.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            _, status = os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._pidfd)
        return self.returncode

    def kill(self) -> None:
        """Kill it with SIGKILL, if it has not ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def zygote_argv(runtime_dir: Path, modules: Sequence[str], orders_fd: int) -> list[str]:
    """The command line of a zygote."""
    command = [sys.executable, "-m", "memserve", "zygote", *modules]
    return [*command, "--runtime-dir", str(runtime_dir), "--orders", str(orders_fd)]


@attrs.define(eq=False)
class Zygote:
    """Forks the actors of one place, inside ``async with``. A process that is lost is replaced when needed."""

    place: Place
    modules: Sequence[str] = ()
    """What its process imports before it forks."""
    argv: Callable[[Path, Sequence[str], int], Sequence[str]] = zygote_argv
    _process: trio.Process | None = attrs.field(init=False, default=None)
    _orders: trio.socket.SocketType | None = attrs.field(init=False, default=None)
    _turn: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _forked: set[Forked] = attrs.field(init=False, factory=set)
    """The processes that it forked and that may not have been waited for."""
    _orphans: Orphans = attrs.field(init=False)

    @_orphans.default
    def _orphans_of_the_place(self) -> Orphans:
        return Orphans(self.place.path)

    async def __aenter__(self) -> Self:
        """Start its process, which imports while the caller does something else. Raises OSError."""
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End its process, but none of those that it forked."""
        await self._end()
        await self.end_orphans()

    async def fork(self, name: str, lifeline: socket.socket) -> Forked:
        """Fork an actor, which gets ``lifeline``. Raises OSError."""
        reading, writing = os.pipe()
        output = trio.lowlevel.FdStream(reading)
        try:
            # Once it is ordered, an actor must become known.
            with trio.CancelScope(shield=True):
                async with self._turn:
                    pid = await self._ordered(name, lifeline.fileno(), writing)
                    process = Forked(pid, output)
                    self._forked.add(process)
            return process
        except OSError:
            await trio.aclose_forcefully(output)
            raise
        finally:
            os.close(writing)

    async def end_orphans(self) -> None:
        """End what an actor left behind, to be called when one has ended or could not be started."""
        # A process that is being forked is not known yet, and so would be taken for an orphan.
        with trio.CancelScope(shield=True):
            async with self._turn:
                self._forked = {process for process in self._forked if process.returncode is None}
                known = {process.pid for process in self._forked}
                await self._orphans.end(known | ({self._process.pid} if self._process else set()))

    async def _start(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders = trio.socket.from_stdlib_socket(ours)
        with theirs:
            # The place stays claimed while the zygote or an actor lives: they inherit the claim's descriptor.
            self._process = await trio.lowlevel.open_process(
                list(self.argv(self.place.path, self.modules, theirs.fileno())),
                env={**os.environ, **zygote_environment(), BEGUN_BY: str(self.place.path)},
                pass_fds=(theirs.fileno(), self.place.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    async def _end(self) -> None:
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        if (process := self._process) is not None:
            self._process = None
            with trio.CancelScope(shield=True):
                with trio.move_on_after(END_S):
                    await process.wait()
                process.kill()
                await process.wait()

    async def _ordered(self, name: str, *descriptors: int) -> int:
        """Order an actor, from a new process if the present one has ended; the actor's pid. Raises OSError.

        An order that is not answered is not repeated: it may have been followed, and two actors would have one
        lifeline. The supervisor closes that lifeline, which ends the actor, and tries again with another.
        """
        if self._process is not None and self._process.returncode is not None:
            log.warning("zygote lost", child=name)
            await self._end()
        if self._process is None:
            await self._start()
        answer = await self._answer(name, descriptors)
        if answer is None:
            log.warning("zygote lost", child=name)
            await self._end()
            raise OSError("no process could be forked: the zygote does not answer")
        if "error" in answer:
            raise OSError(answer["error"])
        return int(answer["pid"])

    async def _answer(self, name: str, descriptors: Sequence[int]) -> dict[str, str] | None:
        """The answer to an order; None if the process is gone or hangs."""
        assert self._orders is not None
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))
        with contextlib.suppress(OSError), trio.move_on_after(FORK_S):
            await self._orders.sendmsg([name.encode()], [rights])
            answer = await self._orders.recv(MESSAGE_BYTES_MAX)
            return json.loads(answer) if answer else None
        return None


def zygote_environment() -> dict[str, str]:
    """What libraries read when they are loaded: in the zygote, or later in an actor."""
    # numpy's OpenBLAS would start threads when it is loaded, which a fork does not copy.
    return {**gpu_environment(), **engine_environment(), "OPENBLAS_NUM_THREADS": "1"}


# ---- the zygote's side ---------------------------------------------------------------------------------------


def serve(runtime_dir: str, modules: Iterable[str], orders_fd: int) -> tuple[str, int]:
    """Be a zygote: import ``modules``, then fork an actor at each order.

    Returns in each actor's process, with the actor's name and the descriptor of its lifeline. The zygote
    itself ends in here, when its supervisor is gone.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # They reach every process of the group, and the supervisor decides what they mean.
        signal.signal(number, signal.SIG_IGN)
    setproctitle(process_title("zygote", runtime_dir))
    for module in modules:
        with contextlib.suppress(Exception):  # it will fail again in the actor, which reports it
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would write to the memory that actors share, and so copy it
    with socket.socket(fileno=orders_fd) as orders:
        name, lifeline, output = _forked(orders)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    setproctitle(process_title(name, runtime_dir))
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    return name, lifeline


def end(status: int) -> NoReturn:
    """End an actor's process.

    An interpreter that ends as usual visits all its objects, and so copies the memory that it shares with the
    zygote: 48 ms in place of one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _forked(orders: socket.socket) -> tuple[str, int, int]:
    """Fork at each order. Returns only in an actor's process, with its order."""
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, MESSAGE_BYTES_MAX, 2)
        if not order:
            os._exit(0)
        lifeline, output = descriptors
        try:
            answer = {"pid": str(_fork_orphan())}
        except OSError as error:
            answer = {"error": str(error)}
        if answer == {"pid": "0"}:
            return order.decode(), lifeline, output
        os.close(lifeline)
        os.close(output)
        with contextlib.suppress(OSError):  # a supervisor that is gone is noticed above
            orders.send(json.dumps(answer).encode())


def _fork_orphan() -> int:
    """Fork a process whose parent has ended: its pid, and 0 in the process itself. Raises OSError."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as pids:
        try:
            middle = os.fork()
            if middle == 0 and _survive_parent(writing):
                return 0
        finally:
            os.close(writing)
        os.waitpid(middle, 0)
        if not (pid := pids.read()):
            raise OSError("fork: out of processes or memory")
    return int(pid)


def _survive_parent(writing: int) -> bool:
    """Fork; report the child's pid through a pipe, and end. Only the child returns."""
    try:
        if pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
    except OSError:
        os._exit(1)
    return True
