"""Shared mappings of files and memfds that the processor can address in huge pages.

A step reads KV from pages all over the arena, and every weight once. In 4 KB pages each of them needs its own
entry in the processor's translation cache, which holds far fewer entries than an arena has pages; 2 MB pages
all fit. Linux gives shared memory small pages unless the machine is configured otherwise (``shmem_enabled``),
but it moves existing memory into huge pages on request (MADV_COLLAPSE, Linux 6.1). A process whose mapping is
aligned to them gets them mapped whole.

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
"""Size of a huge page, on x86-64 and on ARM with pages of 4 KB."""

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25
"""Available from Linux 5.14, 5.14 and 6.1; Python has no names for them before 3.14."""
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_NOT_HERE = (errno.EINVAL, errno.ENOSYS)
"""Errors that mean: the kernel does not know the advice, or never follows it for this kind of memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


@attrs.frozen(eq=False)
class Mapping:
    """``size`` bytes of a file, shared with all processes that map it, and aligned to huge pages.

    Made by :func:`map_shared`. The mapping lives until its last view goes, so a holder of a view can neither
    lose nor leak the memory.
    """

    address: int
    size: int
    writable: bool
    _owner: ctypes.Array[ctypes.c_char]
    """The buffer that all views refer to; when it goes, the memory is unmapped."""

    @property
    def view(self) -> memoryview:
        """The whole mapping as bytes."""
        view = memoryview(self._owner).cast("B")
        return view if self.writable else view.toreadonly()

    def populate(self) -> None:
        """Fill this process's page tables, changing no byte. Before Linux 5.14 the first touch does that.

        Raises OSError when there is not enough memory.
        """
        advice = _MADV_POPULATE_WRITE if self.writable else _MADV_POPULATE_READ
        if (error := self._advise(advice, 0, self.size)) and error not in _NOT_HERE:
            raise OSError(error, os.strerror(error))

    def prefer_huge(self) -> None:
        """Have the file read into huge pages, where its file system supports that.

        Call before :meth:`populate`.
        """
        self._advise(mmap.MADV_HUGEPAGE, 0, self.size)

    def make_huge(self, fd: int) -> int:
        """Allocate the memory of ``fd``, which is mapped here, in huge pages if available; the bytes in them.

        Costs a few milliseconds a MB if the system has to move other processes' pages. Raises OSError when
        there is not enough memory.
        """
        huge = 0
        for start in range(0, self.size - HUGE_BYTES + 1, HUGE_BYTES):
            os.posix_fallocate(fd, start, mmap.PAGESIZE)  # a wholly empty range is not collapsed
            error = self._advise(_MADV_COLLAPSE, start, HUGE_BYTES)
            if error in _NOT_HERE:
                break
            huge += HUGE_BYTES if not error else 0  # on an error, no huge page is free now
        return huge

    def _advise(self, advice: int, start: int, length: int) -> int:
        """Give the kernel an advice for a range; 0 or the errno."""
        return ctypes.get_errno() if _libc.madvise(self.address + start, length, advice) else 0


def map_shared(fd: int, size: int, *, writable: bool) -> Mapping:
    """Map the first ``size`` bytes of ``fd``, which may be closed afterwards. Raises OSError."""
    address = _aligned(size)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        _checked(_libc.mmap(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
    except OSError:
        _libc.munmap(address, size)  # release the reserved addresses
        raise
    owner = (ctypes.c_char * size).from_address(address)
    # Not at the end of the program: threads may still be reading then.
    weakref.finalize(owner, _libc.munmap, address, size).atexit = False
    return Mapping(address, size, writable, owner)


def shared_memory(size: int) -> memoryview:
    """``size`` bytes of zeros, in huge pages if available, freed with the last view. Raises OSError."""
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
