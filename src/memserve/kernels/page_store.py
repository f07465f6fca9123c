"""The bytes of a shard's pages in all tiers, and the copies between tiers. All of it blocks: use threads.

The disk tier is one file, allocated whole at start and without a name: the kernel frees it with its last
descriptor, however the process ends, so no page of an earlier run can ever be read. Every page's checksum
stays in memory from the moment the page is written; a page that reads back different (torn, flipped, lost,
another page's bytes) is reported and never served.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from memserve.errors import UserError
from memserve.mempool.addresses import Tier, page_of, tier_of

Run = tuple[int, int, int]
"""Consecutive pages to copy: (first source slot, first target slot, pages)."""


@attrs.define(eq=False)
class DiskFile:
    """A file of ``pages`` pages of ``page_bytes`` bytes.

    Any thread may use it, but each page only one at a time.
    """

    fd: int
    page_bytes: int
    _checksums: list[int]
    """CRC-32 of each page; -1 for an empty page."""

    @classmethod
    def create(cls, folder: Path, pages: int, page_bytes: int) -> DiskFile:
        """Allocate the file in ``folder``, creating the folder if necessary.

        Raises UserError when it cannot be written or there is not enough room.
        """
        size = pages * page_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = _nameless(folder)
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            raise UserError(
                f"[pool] disk_path {folder} has no room for {size >> 20} MiB of pages: {error.strerror}. Set a smaller "
                "disk_bytes, or another disk_path."
            ) from error
        return cls(fd, page_bytes, [-1] * pages)

    def write(self, first: int, data: memoryview) -> None:
        """Write whole pages from ``first`` on. Raises OSError; the pages' previous content is lost then."""
        for page in range(first, first + len(data) // self.page_bytes):
            self._checksums[page] = -1
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], first * self.page_bytes + done)
        for page, part in self._parts(first, data):
            self._checksums[page] = zlib.crc32(part)

    def read(self, first: int, into: memoryview) -> list[int]:
        """Read whole pages from ``first`` on; the pages whose bytes differ from what was written."""
        done = 0
        try:
            while done < len(into):
                n = os.preadv(self.fd, [into[done:]], first * self.page_bytes + done)
                if not n:
                    break
                done += n
        except OSError:
            pass  # pages that were not read fail their checksum
        return [page for page, part in self._parts(first, into) if zlib.crc32(part) != self._checksums[page]]

    def close(self) -> None:
        """Close the file, which frees its room."""
        os.close(self.fd)

    def _parts(self, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        for at in range(0, len(data), self.page_bytes):
            yield first + at // self.page_bytes, data[at : at + self.page_bytes]


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    path = folder / f"memserve-pages-{os.getpid()}"  # a file system without O_TMPFILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd


@attrs.define(eq=False)
class PageStore:
    """All tiers of one shard. ``memory``: the arenas of the tiers in memory, by tier."""

    page_bytes: int
    memory: dict[Tier, memoryview]
    disk: DiskFile | None = None

    def copy(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """Copy runs of pages, in order; the source slots whose bytes did not arrive.

        Releases the interpreter lock.
        """
        return tuple(slot for run in runs for slot in self._copy_run(*run))

    def _copy_run(self, source: int, target: int, pages: int) -> list[int]:
        tiers = tier_of(source), tier_of(target)
        if Tier.DISK not in tiers:
            np.copyto(self._array(target, pages), self._array(source, pages))
            return []
        assert self.disk is not None, "a copy to or from a disk that is not there"
        if tiers[1] == Tier.DISK:
            try:
                self.disk.write(page_of(target), self._span(source, pages))
            except OSError:
                return list(range(source, source + pages))
            return []
        first = page_of(source)
        return [source + page - first for page in self.disk.read(first, self._span(target, pages))]

    def _span(self, slot: int, pages: int) -> memoryview:
        start = page_of(slot) * self.page_bytes
        return self.memory[Tier(tier_of(slot))][start : start + pages * self.page_bytes]

    def _array(self, slot: int, pages: int) -> np.ndarray:
        return np.frombuffer(self._span(slot, pages), np.uint8)
