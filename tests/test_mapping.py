"""Shared mappings: aligned, kept alive by their views, and in huge pages if the kernel gives them."""

from __future__ import annotations

import gc
import os

import pytest

from memserve.kernels import mapping as under_test
from memserve.kernels.mapping import HUGE_BYTES, map_shared, shared_memory

SIZE = 3 * HUGE_BYTES + 5000
"""Three huge pages and a remainder that does not end on a small page."""


@pytest.fixture
def memfd():
    """A memfd of SIZE bytes."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def mapped(address: int) -> dict[str, int]:
    """What the kernel reports of the mapping at an address, in KB by field; empty if there is none."""
    fields: dict[str, int] = {}
    with open("/proc/self/smaps") as file:
        inside = False
        for line in file:
            word, *rest = line.split()
            if not word.endswith(":"):
                inside = int(word.partition("-")[0], 16) == address
            elif inside and rest[-1] == "kB":
                fields[word[:-1]] = int(rest[0])
    return fields


def reserved() -> int:
    """Bytes of address space that this process has reserved."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_a_huge_page_can_start_where_a_mapping_starts(memfd):
    """Mappings begin at a multiple of the huge page size, without which they get no huge pages."""
    for _ in range(3):
        one = map_shared(memfd, SIZE, writable=True)
        assert one.address % HUGE_BYTES == 0
        assert one.view.nbytes == SIZE
        assert not one.view.readonly


def test_mappings_of_a_file_share_its_bytes(memfd):
    """Mappings of one file share its bytes, and a read-only one cannot be written."""
    mine, theirs = map_shared(memfd, SIZE, writable=True), map_shared(memfd, SIZE, writable=False)
    mine.view[SIZE - 3 :] = b"end"
    assert bytes(theirs.view[SIZE - 3 :]) == b"end"
    with pytest.raises(TypeError, match="read-only"):
        theirs.view[0] = 1


def test_the_last_view_ends_the_mapping(memfd):
    """A mapping lasts as long as its last view."""
    one = map_shared(memfd, SIZE, writable=True)
    address, part = one.address, one.view[10:20]
    del one
    gc.collect()
    part[:] = b"0123456789"
    assert os.pread(memfd, 10, 10) == b"0123456789"
    assert mapped(address)
    del part
    gc.collect()
    assert not mapped(address)


def test_huge_pages_hold_what_was_there(memfd):
    """Changing to huge pages keeps the contents, and the number reported is what the kernel mapped."""
    os.pwrite(memfd, b"before", HUGE_BYTES - 3)
    one = map_shared(memfd, SIZE, writable=True)
    huge = one.make_huge(memfd)
    one.populate()
    assert bytes(one.view[HUGE_BYTES - 3 : HUGE_BYTES + 3]) == b"before"
    assert huge % HUGE_BYTES == 0
    assert mapped(one.address)["ShmemPmdMapped"] * 1024 == huge
    if huge:  # a second process finds them
        other = map_shared(memfd, SIZE, writable=True)
        other.populate()
        assert mapped(other.address)["ShmemPmdMapped"] * 1024 == huge


def test_a_kernel_without_the_advice_serves_in_small_pages(memfd, monkeypatch):
    """On a kernel without these calls the mapping works with small pages."""
    monkeypatch.setattr(under_test, "_MADV_COLLAPSE", 9999)
    monkeypatch.setattr(under_test, "_MADV_POPULATE_WRITE", 9999)
    one = map_shared(memfd, SIZE, writable=True)
    assert one.make_huge(memfd) == 0
    one.populate()
    one.view[SIZE - 1] = 7
    assert os.pread(memfd, 1, SIZE - 1) == b"\x07"


def test_scratch_memory_is_zero():
    """Scratch memory is filled with zeros."""
    assert not any(shared_memory(HUGE_BYTES + 100))


def test_a_file_that_cannot_be_mapped_is_an_error(tmp_path):
    """A file that cannot be mapped is an error, and its address space is given back."""
    fd = os.open(tmp_path, os.O_RDONLY)
    size = 1 << 40  # a terabyte of addresses, which only a leak would show
    try:
        before = reserved()
        with pytest.raises(OSError, match="No such device"):
            map_shared(fd, size, writable=False)
        assert reserved() - before < size
    finally:
        os.close(fd)
