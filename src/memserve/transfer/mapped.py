"""The mover for one host: map the receiver's arena, copy runs of pages in a thread.

Who owns what: the receiver's pages are the transfer's until this process says that it has stopped writing, so a copy
is never abandoned: when it is cancelled or late, it ends at the next COPY_BYTES, and only then there is a result.
"""

from __future__ import annotations

import ctypes
import errno
from collections import OrderedDict
from functools import partial
from pathlib import Path

import attrs
import trio

from memserve.errors import PeerError, PeerUnreachable
from memserve.kernels.arena import Arena, attach_arena
from memserve.transfer.mover import Memory, MoveError, PieceFeed, check_pages, settle
from memserve.transfer.values import Extent, Failure, Result, Transfer, Way, extents

COPY_BYTES = 1 << 20
"""Copied between two looks at whether to go on; about 0.1 ms."""
ARENAS_MAX = 64
"""Mapped at a time. One more drops the longest unused."""


@attrs.define(eq=False)
class _Peer:
    """A receiver's arena, mapped here."""

    arena: Arena
    address: int
    """Of its first byte, in this process."""
    users: int = 0
    forgotten: bool = False
    """Its shard is gone: the mapping ends with the last copy into it, or the dead arena's memory would stay."""

    def release(self) -> None:
        """Unmap it, if that is due."""
        if self.forgotten and not self.users:
            self.arena.close()


@attrs.define(eq=False)
class MappedMover:
    """Copies from ``memory`` into arenas served on this host."""

    memory: Memory
    path: str = attrs.field(default="mapped", init=False)
    _peers: OrderedDict[str, _Peer] = attrs.field(factory=OrderedDict, init=False)
    """By the socket's address, which names the shard's incarnation; the longest unused first."""
    _attaching: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, 2), init=False)
    """Two copies use the memory bus up; more would only take cores from the engines."""

    async def send(self, transfer: Transfer, way: Way, feed: PieceFeed, deadline_s: float) -> Result:
        """See Mover. Fails with PEER_GONE when nobody serves the arena, REFUSED when its pages are others."""
        return await settle(transfer, deadline_s, partial(self._move, transfer, way, feed))

    def forget(self, way: Way) -> None:
        """Unmap an arena: now, or when the last copy into it has ended."""
        peer = self._peers.pop(way.address, None)
        if peer is not None:
            peer.forgotten = True
            peer.release()

    async def _move(self, transfer: Transfer, way: Way, feed: PieceFeed) -> int:
        check_pages(transfer, self.memory.pages)
        peer = await self._attached(way.address)
        pages = peer.arena.header.pages
        if any(not 0 <= page < pages for page in transfer.destination):
            raise MoveError(Failure.REFUSED, f"the receiver granted a page that is not one of its {pages}")
        peer.users += 1
        try:
            return await self._copy_all(transfer, peer, feed)
        finally:
            peer.users -= 1
            peer.release()

    async def _copy_all(self, transfer: Transfer, peer: _Peer, feed: PieceFeed) -> int:
        moved = 0
        source = _address(self.memory.view)
        while some := await feed.take():
            todo = [one for piece in some for one in extents(piece, transfer, self.memory.geometry)]
            copying = partial(_copy, peer.address, source, todo)
            moved += await trio.to_thread.run_sync(copying, limiter=self._threads)
        return moved

    async def _attached(self, address: str) -> _Peer:
        async with self._attaching:  # or two transfers would map the same arena twice
            peer = self._peers.get(address)
            if peer is None:
                peer = self._peers[address] = await self._attach(address)
                self._drop_unused()
            self._peers.move_to_end(address)
            return peer

    async def _attach(self, address: str) -> _Peer:
        page_bytes = self.memory.geometry.page_bytes
        try:
            # Maps every page of the arena: about 0.2 s a GiB, once a peer.
            arena = await trio.to_thread.run_sync(attach_arena, Path(address), page_bytes)
        except PeerUnreachable as error:
            raise MoveError(Failure.PEER_GONE, str(error)) from error
        except PeerError as error:
            raise MoveError(Failure.REFUSED, str(error)) from error
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MoveError(Failure.REFUSED, f"{address} cannot be mapped: {error.strerror}") from error
        return _Peer(arena, _address(arena.memory))

    def _drop_unused(self) -> None:
        for address, peer in list(self._peers.items()):
            if len(self._peers) <= ARENAS_MAX:
                return
            if not peer.users:
                self.forget(Way("mapped", address))

    def close(self) -> None:
        """Unmap everything; no transfer may be under way."""
        for address in list(self._peers):
            self.forget(Way("mapped", address))


def _address(view: memoryview) -> int:
    """Of a writable view's first byte. Valid while something keeps the view's memory mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _copy(destination: int, source: int, todo: list[Extent]) -> int:
    """Copy and count bytes, in a thread of trio's. ``memmove`` runs without the interpreter lock."""
    moved = unchecked = 0
    for extent in todo:
        for done in range(0, extent.nbytes, COPY_BYTES):
            size = min(COPY_BYTES, extent.nbytes - done)
            ctypes.memmove(destination + extent.destination + done, source + extent.source + done, size)
            moved += size
            unchecked += size
            if unchecked >= COPY_BYTES:
                unchecked = 0
                trio.from_thread.check_cancelled()
    return moved
