"""The shell of the two transfer cores: runs movers, lets transfers in, reports how each ended.

The owner of the cores (a shard) passes every Write, Feed, StopWriting, Forget, Expect, StopReceiving and Probe
to :attr:`TransferShell.perform`. It gets Wrote, WriteFailed, Received, ReceiveFailed and Gone back through
``tell``, always from a separate task and never from within ``perform``, so that a core's turn is never re-entered.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.errors import UserError
from memserve.kernels.arena import Arena
from memserve.kernels.gpu_memory import GpuArena
from memserve.messages import Gone
from memserve.transfer import nixl
from memserve.transfer.actions import (
    Expect,
    Feed,
    Forget,
    Probe,
    Received,
    ReceiveFailed,
    StopReceiving,
    StopWriting,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.cuda import GpuReach
from memserve.transfer.mapped import HostReach, MappedMover
from memserve.transfer.mover import Memory, Mover, PieceFeed, chosen_paths
from memserve.transfer.settings import TransferSettings
from memserve.transfer.tcp import TcpMover, TcpReceiver
from memserve.transfer.values import Geometry, Result, TransferDone
from memserve.transfer_messages import Failure, Way

Told = Wrote | WriteFailed | Received | ReceiveFailed | Gone


@attrs.define(eq=False)
class _Writing:
    feed: PieceFeed
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


@attrs.define(eq=False)
class TransferShell:
    """One shard's movers and its receiver. :func:`open_transfers` makes one."""

    geometry: Geometry
    movers: dict[str, Mover]
    """Movers by path, fastest first."""
    ways: tuple[Way, ...]
    """Ways to this shard's arena, fastest first; :class:`~memserve.transfer.incoming.Incoming` grants
    them."""
    receiver: TcpReceiver | None
    tell: Callable[[Told], None]
    nursery: trio.Nursery
    _writing: dict[int, _Writing] = attrs.field(factory=dict, init=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that :class:`~memserve.transfer.outgoing.Outgoing` offers."""
        return tuple(self.movers)

    @property
    def perform(self) -> dict[type[Any], Callable[[Any], None]]:
        """The handler of each action type."""
        return {
            Write: self._write,
            Feed: self._feed,
            StopWriting: self._stop_writing,
            Forget: self._forget,
            Expect: self._expect,
            StopReceiving: self._stop_receiving,
            Probe: self._probe,
        }

    # ---- sending ---------------------------------------------------------------------------------------------

    def _write(self, write: Write) -> None:
        transfer, geometry = write.transfer, self.geometry
        if write.fed:
            feed = PieceFeed(len(transfer.source), geometry.parts(transfer.granularity))
        else:
            feed = PieceFeed.whole(transfer, geometry)
        one = self._writing[transfer.id] = _Writing(feed)
        self.nursery.start_soon(self._move, write, one)

    def _feed(self, feed: Feed) -> None:
        one = self._writing.get(feed.id)
        if one is not None:  # otherwise it has failed, and the core is about to hear of it
            one.feed.put(feed.pieces)

    def _stop_writing(self, stop: StopWriting) -> None:
        one = self._writing.get(stop.id)
        if one is not None:
            one.scope.cancel()

    def _forget(self, forget: Forget) -> None:
        mover = self.movers.get(forget.way.path)
        if mover is not None:
            mover.forget(forget.way)

    async def _move(self, write: Write, one: _Writing) -> None:
        number = write.transfer.id
        told: Told = WriteFailed(number, Failure.WITHDRAWN, "stopped")
        with one.scope:
            told = await self._moved(write, one)
        del self._writing[number]
        self.tell(told)

    async def _moved(self, write: Write, one: _Writing) -> Told:
        mover = self.movers.get(write.way.path)
        if mover is None:
            text = f"no {write.way.path} path here; see path in its TransferSettings"
            return WriteFailed(write.transfer.id, Failure.REFUSED, text)
        return _told(await mover.send(write.transfer, write.way, one.feed, write.deadline - time.monotonic()))

    # ---- receiving -------------------------------------------------------------------------------------------

    def _expect(self, expect: Expect) -> None:
        assert self.receiver is not None, "expected over tcp without a listener"
        self.receiver.expect(expect, self.tell)

    def _stop_receiving(self, stop: StopReceiving) -> None:
        assert self.receiver is not None, "stopped over tcp without a listener"
        if not self.receiver.stop((stop.sender, stop.id)):
            told = ReceiveFailed(stop.sender, stop.id, Failure.WITHDRAWN, "nothing had come in")
            self.nursery.start_soon(self._tell_soon, told)

    def _probe(self, probe: Probe) -> None:
        if has_ended(probe.pid):
            self.nursery.start_soon(self._tell_soon, Gone((probe.sender,)))

    async def _tell_soon(self, told: Told) -> None:
        self.tell(told)


def has_ended(pid: int) -> bool:
    """Whether no process with this ID runs any more."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        return bool(waiting.poll(0))  # it has ended, and its parent has not noticed yet
    finally:
        os.close(process)


def _told(result: Result) -> Told:
    if isinstance(result, TransferDone):
        return Wrote(result.id, result.nbytes)
    return WriteFailed(result.id, result.failure, result.message)


@asynccontextmanager
async def open_transfers(
    settings: TransferSettings,
    arena: Arena | GpuArena,
    geometry: Geometry,
    socket_path: Path,
    tell: Callable[[Told], None],
) -> AsyncIterator[TransferShell]:
    """Open movers and ways for one shard, according to ``settings``.

    ``socket_path`` is where the arena is served.
    On exit, transfers under way are stopped without a report: the cores that own them end too. Raises
    UserError when ``settings.path`` is ``nixl`` and the package is missing, or when ``settings.host`` cannot
    be listened on.
    """
    movers: dict[str, Mover] = {}
    try:
        async with trio.open_nursery() as nursery:
            shell = TransferShell(geometry, movers, (), None, tell, nursery)
            for path in chosen_paths(settings.path, _available(settings, arena)):
                await _OPEN[path](shell, settings, arena, socket_path)
            yield shell
            nursery.cancel_scope.cancel()
    finally:
        for mover in movers.values():
            mover.close()


def _available(settings: TransferSettings, arena: Arena | GpuArena) -> tuple[str, ...]:
    """Paths to this kind of memory on this machine.

    NIXL without RDMA is slower than plain TCP: it must be asked for.
    """
    if isinstance(arena, GpuArena):
        return ("cuda",)
    installed = nixl.available()
    if settings.path == "nixl" and not installed:
        raise UserError(
            'transfer path is "nixl", but the package is not installed: pip install "memserve[multihost]"'
        )
    if installed and (settings.path == "nixl" or nixl.has_rdma()):
        return ("mapped", "nixl", "tcp")
    return ("mapped", "tcp")


async def _open_cuda(shell: TransferShell, _: TransferSettings, arena: GpuArena, socket_path: Path) -> None:
    shell.movers["cuda"] = MappedMover(GpuReach(arena, shell.geometry), "cuda")
    shell.ways += (Way("cuda", str(socket_path)),)


async def _open_mapped(shell: TransferShell, _: TransferSettings, arena: Arena, socket_path: Path) -> None:
    shell.movers["mapped"] = MappedMover(HostReach(Memory(arena.memory, shell.geometry)))
    shell.ways += (Way("mapped", str(socket_path)),)


async def _open_tcp(shell: TransferShell, settings: TransferSettings, arena: Arena, __: Path) -> None:
    memory = Memory(arena.memory, shell.geometry)
    shell.receiver = TcpReceiver(memory, settings.host)
    try:
        way = await shell.nursery.start(shell.receiver.serve)
    except OSError as error:
        raise UserError(
            f"transfer host {settings.host!r} cannot be listened on: {error}. "
            "It must be an address of this machine, at which the other shards reach it."
        ) from error
    shell.movers["tcp"] = TcpMover(memory)
    shell.ways += (way,)


async def _open_nixl(shell: TransferShell, _: TransferSettings, arena: Arena, __: Path) -> None:
    make = partial(nixl.NixlAgent, arena.header.shard, Memory(arena.memory, shell.geometry))
    agent = await trio.to_thread.run_sync(make)
    shell.movers["nixl"] = nixl.NixlMover(agent)
    shell.ways += (agent.way,)


_OPEN: dict[str, Callable[[TransferShell, TransferSettings, Any, Path], Awaitable[None]]] = {
    "cuda": _open_cuda,
    "mapped": _open_mapped,
    "tcp": _open_tcp,
    "nixl": _open_nixl,
}
