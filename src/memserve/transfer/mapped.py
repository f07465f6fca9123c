"""The mover within one host: map the receiver's arena, copy runs of pages in a thread.

How to map and copy is up to a :class:`Reach`: memfds and memmove here, CUDA IPC and the GPUs' copy engines in
:mod:`memserve.transfer.cuda`.

Ownership: the receiver's pages belong to the transfer until this process says that it has stopped writing. So
a copy is never abandoned: when it is cancelled or late, it stops after at most COPY_BYTES more, and returns
only then.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import attrs
import trio

from memserve.errors import PeerError, PeerUnreachable
from memserve.kernels.arena import attach_arena
from memserve.transfer.mover import Memory, MoveError, PieceFeed, check_pages, settle
from memserve.transfer.values import Extent, Geometry, PageTransfer, Result, extents
from memserve.transfer_messages import Failure, Way

COPY_BYTES = 1 << 20
"""Bytes copied between two checks for cancellation; about 0.1 ms."""
ARENAS_MAX = 64
"""Arenas mapped at a time; one more unmaps the least recently used of those that no copy uses."""


@attrs.define(eq=False)
class Mapped:
    """A receiver's arena, mapped here."""

    address: int
    """Address of its first byte in this process."""
    pages: int
    unmap: Callable[[], None]
    device: int = 0
    """The GPU that holds it, by this process's numbering."""
    users: int = 0
    forgotten: bool = False
    """Its shard is gone: unmap it after the last copy into it, or the dead arena's memory would stay."""

    def release(self) -> None:
        """Unmap it if it is forgotten and no copy uses it."""
        if self.forgotten and not self.users:
            self.unmap()


class Reach(Protocol):
    """Access to this process's arena and to others on its host.

    ``attach`` and ``copy`` block: they run in threads.
    """

    @property
    def geometry(self) -> Geometry:
        """Geometry of the pages on both sides."""

    @property
    def pages(self) -> int:
        """Number of pages in this process's arena."""

    def attach(self, socket: Path) -> Mapped:
        """Map the arena that is served at ``socket``.

        Raises PeerUnreachable when no process serves it, PeerError when its pages have another size, and
        OSError when this process has not enough memory or descriptors.
        """

    def copy(self, there: Mapped, todo: list[Extent]) -> int:
        """Copy ``todo`` into ``there``; returns the number of bytes copied.

        When its task is cancelled, it ends soon and with no copy under way.
        """


@attrs.define(eq=False)
class MappedMover:
    """Copies from this process's arena into arenas served on this host."""

    reach: Reach
    path: str = "mapped"
    _peers: OrderedDict[str, Mapped] = attrs.field(factory=OrderedDict, init=False)
    """Arenas by socket address, which identifies the shard's incarnation; least recently used first."""
    _attaching: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _coming: str = attrs.field(default="", init=False)
    """Address of the arena that is being mapped; empty once its shard is gone."""
    _threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, 2), init=False)
    """Two copies saturate the memory bus; more would only take cores from the engines."""

    async def send(self, transfer: PageTransfer, way: Way, feed: PieceFeed, deadline_s: float) -> Result:
        """See Mover.

        Fails with PEER_GONE when no process serves the arena, REFUSED when its pages have another size.
        """
        return await settle(transfer, deadline_s, partial(self._move, transfer, way, feed))

    def forget(self, way: Way) -> None:
        """Unmap an arena, now or when the last copy into it has ended; one that is being mapped, after that."""
        if way.address == self._coming:
            self._coming = ""
        peer = self._peers.pop(way.address, None)
        if peer is not None:
            peer.forgotten = True
            peer.release()

    async def _move(self, transfer: PageTransfer, way: Way, feed: PieceFeed) -> int:
        check_pages(transfer, self.reach.pages)
        peer = await self._attached(way.address)
        peer.users += 1
        try:
            if any(not 0 <= page < peer.pages for page in transfer.destination):
                text = f"the receiver granted a page that is not one of its {peer.pages}"
                raise MoveError(Failure.REFUSED, text)
            return await self._copy_all(transfer, peer, feed)
        finally:
            peer.users -= 1
            peer.release()

    async def _copy_all(self, transfer: PageTransfer, peer: Mapped, feed: PieceFeed) -> int:
        moved = 0
        while some := await feed.take():
            todo = [one for piece in some for one in extents(piece, transfer, self.reach.geometry)]
            copying = partial(self.reach.copy, peer, todo)
            moved += await trio.to_thread.run_sync(copying, limiter=self._threads)
        return moved

    async def _attached(self, address: str) -> Mapped:
        peer = self._peers.get(address)
        if peer is None:
            async with self._attaching:  # otherwise two transfers could map the same arena twice
                peer = self._peers.get(address) or await self._map(address)
        if not peer.forgotten:
            self._peers.move_to_end(address)
        return peer

    async def _map(self, address: str) -> Mapped:
        self._coming = address
        peer = await self._attach(address)
        peer.forgotten = self._coming != address
        if not peer.forgotten:
            self._drop_unused()
            self._peers[address] = peer
        return peer

    async def _attach(self, address: str) -> Mapped:
        try:
            return await trio.to_thread.run_sync(self.reach.attach, Path(address))
        except PeerUnreachable as error:
            raise MoveError(Failure.PEER_GONE, str(error)) from error
        except PeerError as error:
            raise MoveError(Failure.REFUSED, str(error)) from error
        except OSError as error:  # too little memory, or no descriptor left
            raise MoveError(Failure.REFUSED, f"{address} cannot be mapped: {error.strerror}") from error

    def _drop_unused(self) -> None:
        """Make room for one more arena, and unmap those that are served no more: their shards have ended."""
        for address, peer in list(self._peers.items()):
            if not peer.users and (len(self._peers) >= ARENAS_MAX or not os.path.exists(address)):
                self.forget(Way(self.path, address))

    def close(self) -> None:
        """Unmap everything; no transfer may be under way."""
        for address in list(self._peers):
            self.forget(Way(self.path, address))


@attrs.define(eq=False)
class HostReach:
    """Arenas in host memory."""

    memory: Memory

    @property
    def geometry(self) -> Geometry:
        """See Reach."""
        return self.memory.geometry

    @property
    def pages(self) -> int:
        """See Reach."""
        return self.memory.pages

    def attach(self, socket: Path) -> Mapped:
        """See Reach. Maps every page of the arena: about 0.2 s per GiB, once per peer."""
        arena = attach_arena(socket, self.geometry.page_bytes)
        return Mapped(_address(arena.memory), arena.header.pages, arena.close)

    def copy(self, there: Mapped, todo: list[Extent]) -> int:
        """See Reach. ``memmove`` runs without the interpreter lock."""
        source = _address(self.memory.view)
        moved = unchecked = 0
        for extent in todo:
            for done in range(0, extent.nbytes, COPY_BYTES):
                size = min(COPY_BYTES, extent.nbytes - done)
                ctypes.memmove(there.address + extent.destination + done, source + extent.source + done, size)
                moved += size
                unchecked += size
                if unchecked >= COPY_BYTES:
                    unchecked = 0
                    trio.from_thread.check_cancelled()
        return moved


def _address(view: memoryview) -> int:
    """Address of a writable view's first byte. Valid while something keeps the view's memory mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
