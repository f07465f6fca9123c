"""The interface of all movers, and the choice between them.

A mover is the sender's shell for one path: it carries a transfer's pieces from this process's arena into
pages that the receiver has granted, within a deadline. It answers with a result, never with an exception. It
tells the receiver nothing about what the bytes mean: :mod:`memserve.transfer.outgoing` does.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import attrs
import trio

from memserve.transfer.values import (
    Coverage,
    Geometry,
    PageTransfer,
    Piece,
    Result,
    TransferDone,
    TransferFailed,
    pieces,
)
from memserve.transfer_messages import Failure, Way

PATHS = ("cuda", "mapped", "nixl", "tcp")
"""All paths, fastest first; ``auto`` takes the first that both sides have."""


class MoveError(Exception):
    """Raised inside a mover: the transfer failed, and why."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class PieceFeed:
    """The pieces of one transfer that may be moved, in the order in which they became final.

    The feed ends once the whole transfer has been fed. Cancelling ``take`` loses no pieces.
    """

    def __init__(self, pages: int, parts: int) -> None:
        self._coverage = Coverage(pages, parts)
        self._waiting: list[Piece] = []
        self._changed = trio.Event()

    @classmethod
    def whole(cls, transfer: PageTransfer, geometry: Geometry) -> PieceFeed:
        """A feed of a transfer whose pages are all final."""
        feed = cls(len(transfer.source), geometry.parts(transfer.granularity))
        feed.put(pieces(transfer, geometry))
        return feed

    def put(self, some: tuple[Piece, ...]) -> None:
        """Add pieces. Raises ValueError for one that is not part of this transfer.

        The feed is bounded by the transfer: pieces that were fed before are dropped.
        """
        for piece in some:
            if self._coverage.add(piece):
                self._waiting.append(piece)
        self._changed.set()

    async def take(self) -> list[Piece]:
        """Wait for pieces and take all that are available; an empty list at the end."""
        while not self._waiting and not self._coverage.complete:
            self._changed = trio.Event()
            await self._changed.wait()
        taken, self._waiting = self._waiting, []
        return taken


class Mover(Protocol):
    """The sender's end of one path, shared by concurrent transfers."""

    path: str

    async def send(self, transfer: PageTransfer, way: Way, feed: PieceFeed, deadline_s: float) -> Result:
        """Move everything that ``feed`` brings into the receiver's pages.

        Returns within ``deadline_s`` seconds or soon after, and only when no byte is being written any more.
        When cancelled, it also ends only then.
        """

    def forget(self, way: Way) -> None:
        """The receiver behind ``way`` is gone: release what was kept for it."""

    def close(self) -> None:
        """Release everything; no transfer is under way any more."""


async def settle(transfer: PageTransfer, deadline_s: float, move: Callable[[], Awaitable[int]]) -> Result:
    """Run ``move``, which returns the bytes moved; a missed deadline or a MoveError gives TransferFailed."""
    try:
        # The deadline may have passed, and trio refuses negative times.
        with trio.fail_after(max(0.0, deadline_s)):
            return TransferDone(transfer.id, await move())
    except trio.TooSlowError:
        return TransferFailed(transfer.id, Failure.DEADLINE, f"not written within {deadline_s:.3g} s")
    except MoveError as error:
        return TransferFailed(transfer.id, error.failure, str(error))


def check_pages(transfer: PageTransfer, pages: int) -> None:
    """Raise MoveError unless every source page is one of the arena's ``pages``."""
    wrong = [page for page in transfer.source if not 0 <= page < pages]
    if wrong:
        raise MoveError(Failure.REFUSED, f"page {wrong[0]} is not one of this arena's {pages}")


@attrs.frozen
class Memory:
    """A process's own arena, as movers see it."""

    view: memoryview
    """All pages; page ``i`` starts at ``i * geometry.page_bytes``."""
    geometry: Geometry

    @property
    def pages(self) -> int:
        """Number of pages in the arena."""
        return self.view.nbytes // self.geometry.page_bytes


def host_identity() -> str:
    """Host identity: equal for two processes exactly if one can open the other's sockets by path."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/mnt')}"


def chosen_paths(path: str, available: tuple[str, ...]) -> tuple[str, ...]:
    """Those of this process's ``available`` paths that the setting ``path`` allows, fastest first."""
    return tuple(one for one in PATHS if one in available and path in ("auto", one))
