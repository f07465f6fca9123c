"""Shared mappings of files and memfds that the processor can address in huge pages.

A step reads KV from pages all over the arena and every weight once. In pages of 4 KB each of them is an entry of its own
in the processor's translation cache, which holds far fewer than an arena has; in pages of 2 MB it holds them all. Linux
gives shared memory small pages unless the machine is set up otherwise (``shmem_enabled``), but puts what is already there
into huge ones on request (MADV_COLLAPSE, Linux 6.1), and a process whose mapping is aligned to them gets them mapped whole.

Where the kernel or the memory has no huge pages to give, everything works in small ones.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref

import attrs

HUGE_BYTES = 2 << 20
"""Of a huge page, on x86-64 and on ARM with pages of 4 KB."""

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25
"""Linux 5.14, 5.14 and 6.1; Python has no names for them before 3.14."""
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_NOT_HERE = (errno.EINVAL, errno.ENOSYS)
"""The kernel does not know the advice, or never follows it for memory of this kind."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


@attrs.frozen(eq=False)
class Mapping:
    """``size`` bytes of a file, shared with all who map it, from an address that a huge page can start at.

    Made by :func:`map_shared`. It ends with its last view: whoever holds one can neither lose nor leak the memory.
    """

    address: int
    size: int
    writable: bool
    _owner: ctypes.Array[ctypes.c_char]
    """All views refer to it; when it goes, the mapping is undone."""

    @property
    def view(self) -> memoryview:
        """All of it, as bytes."""
        view = memoryview(self._owner).cast("B")
        return view if self.writable else view.toreadonly()

    def populate(self) -> None:
        """Fill this process's page tables, changing no byte. A kernel before 5.14 leaves that to the first touch.

        Raises OSError when there is no memory for it.
        """
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ
        if (error := self._advise(advice, 0, self.size)) and error not in _NOT_HERE:
            raise OSError(error, os.strerror(error))

    def prefer_huge(self) -> None:
        """Have what is not yet in memory read into huge pages, where the file system has them. Before :meth:`populate`."""
        self._advise(mmap.MADV_HUGEPAGE, 0, self.size)

    def make_huge(self, fd: int) -> int:
        """Give a memfd's memory in huge pages, as far as there are; bytes of it. ``fd``: what is mapped here.

        Takes the memory, and a few milliseconds a MB when the system has to move others' pages. Raises OSError when there
        is no memory.
        """
        huge = 0
        for start in range(0, self.size - HUGE_BYTES + 1, HUGE_BYTES):
            os.posix_fallocate(fd, start, mmap.PAGESIZE)  # what is wholly empty is not collapsed
            error = self._advise(_MADV_COLLAPSE, start, HUGE_BYTES)
            if error in _NOT_HERE:
                break
            huge += HUGE_BYTES if not error else 0  # else: no such page is free just now
        return huge

    def _advise(self, advice: int, start: int, length: int) -> int:
        """0 or the error's number."""
        return ctypes.get_errno() if _libc.madvise(self.address + start, length, advice) else 0


def map_shared(fd: int, size: int, *, writable: bool) -> Mapping:
    """Map the first ``size`` bytes of ``fd``, which may be closed afterwards. Raises OSError."""
    address = _aligned(size)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        _checked(_libc.mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
    except OSError:
        _libc.munmap(address, size)  # the reserved addresses
        raise
    owner = (ctypes.c_char * size).from_address(address)
    # Not at the end of the program: threads may still be reading then.
    weakref.finalize(owner, _libc.munmap, address, size).atexit = False
    return Mapping(address, size, writable, owner)


def shared_memory(size: int) -> memoryview:
    """``size`` bytes of zeros, in huge pages where there are, gone with the last view. Raises OSError."""
    fd = os.memfd_create("memserve-scratch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        mapping = map_shared(fd, size, writable=True)
        mapping.make_huge(fd)
        mapping.populate()
    finally:
        os.close(fd)
    return mapping.view


def _aligned(size: int) -> int:
    """Reserve addresses for ``size`` bytes from a multiple of HUGE_BYTES."""
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    start = _checked(_libc.mmap(None, pages + HUGE_BYTES, _PROT_NONE, flags, -1, 0))
    address = -(-start // HUGE_BYTES) * HUGE_BYTES
    for unused, length in (
        (start, address - start),
        (address + pages, start + HUGE_BYTES - address),
    ):
        if length:
            _libc.munmap(unused, length)
    return address


def _checked(address: int | None) -> int:
    if address is None or address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return address
