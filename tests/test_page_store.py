"""The bytes of pages: what is copied arrives, and what was damaged on disk is never served."""

import errno
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.errors import UserError
from memserve.kernels.page_store import DiskFile, PageStore
from memserve.mempool.addresses import Tier, slot

PAGE = 4096
PAGES = 6


@pytest.fixture
def store(tmp_path):
    """Six pages in each tier; each byte of device page i is i + 1."""
    device = bytearray(b"".join(bytes([i + 1]) * PAGE for i in range(PAGES)))
    disk = DiskFile.create(tmp_path, PAGES, PAGE)
    memory = {Tier.DEVICE: memoryview(device), Tier.HOST: memoryview(bytearray(PAGES * PAGE))}
    yield PageStore(PAGE, memory, disk)
    disk.close()


def page(store: PageStore, tier: Tier, number: int) -> bytes:
    """The bytes of a page."""
    return bytes(store.memory[tier][number * PAGE : (number + 1) * PAGE])


DEVICE, HOST, DISK = (lambda n, tier=tier: slot(tier, n) for tier in Tier)


def test_pages_travel_through_all_tiers(store):
    """Runs of pages are copied between all tiers with the right bytes."""
    assert store.copy([(DEVICE(0), HOST(3), 2), (DEVICE(4), HOST(0), 1)]) == ()
    assert store.copy([(HOST(3), DISK(1), 2), (HOST(0), DISK(5), 1)]) == ()
    assert store.copy([(DISK(1), DEVICE(2), 2), (DISK(5), HOST(5), 1)]) == ()
    assert [page(store, Tier.DEVICE, i)[:1] for i in range(PAGES)] == [
        b"\1",
        b"\2",
        b"\1",
        b"\2",
        b"\5",
        b"\6",
    ]
    assert page(store, Tier.HOST, 5) == b"\5" * PAGE


@pytest.mark.parametrize("at", [0, 1, PAGE - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_found(store, at, bit):
    """A flipped bit on disk is reported for its page."""
    store.copy([(DEVICE(0), DISK(0), 4)])
    byte = os.pread(store.disk.fd, 1, 2 * PAGE + at)[0]
    os.pwrite(store.disk.fd, bytes([byte ^ 1 << bit]), 2 * PAGE + at)

    assert store.copy([(DISK(0), HOST(0), 4)]) == (DISK(2),)
    assert page(store, Tier.HOST, 3) == page(store, Tier.DEVICE, 3)


def test_a_torn_page_is_found(store):
    """A page on disk that is half old and half new is reported."""
    store.copy([(DEVICE(0), DISK(0), 1)])
    old = os.pread(store.disk.fd, PAGE // 2, 0)
    store.copy([(DEVICE(1), DISK(0), 1)])
    os.pwrite(store.disk.fd, old, 0)

    assert store.copy([(DISK(0), HOST(0), 1)]) == (DISK(0),)


def test_a_page_that_was_never_written_is_bad(store):
    """A page on disk that was never written is reported."""
    assert store.copy([(DISK(4), HOST(0), 2)]) == (DISK(4), DISK(5))


def test_a_truncated_file_is_bad_and_not_the_end(store):
    """The missing pages of a truncated file are reported, without an exception."""
    store.copy([(DEVICE(0), DISK(0), 6)])
    os.ftruncate(store.disk.fd, 2 * PAGE + 100)

    assert store.copy([(DISK(0), HOST(0), 6)]) == tuple(DISK(i) for i in range(2, 6))


def test_a_write_that_fails_is_reported_and_what_was_there_is_not_served(store, monkeypatch):
    """A failed write is reported, and the page that was there before counts as damaged."""
    store.copy([(DEVICE(0), DISK(0), 2)])

    def fail(fd, data, offset):
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        assert store.copy([(DEVICE(2), DISK(0), 2)]) == (DEVICE(2), DEVICE(3))
    assert store.copy([(DISK(0), HOST(0), 2)]) == (DISK(0), DISK(1))


def test_the_file_has_no_name_and_its_room_is_taken_at_start(store, tmp_path):
    """The file has no name, so that nothing is left behind, and its space is allocated at the start."""
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(store.disk.fd).st_blocks * 512 >= PAGES * PAGE


def test_too_little_room_is_said_at_start(tmp_path):
    """Too little space, or a wrong directory, is a user error at the start."""
    with pytest.raises(UserError, match="no room for"):
        DiskFile.create(tmp_path, 1 << 40, 1 << 20)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="disk_path"):
        DiskFile.create(tmp_path / "file", 1, PAGE)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 17), st.integers(0, 17)), max_size=30))
def test_any_order_of_copies_is_that_of_a_dictionary(tmp_path_factory, copies):
    """Any sequence of copies gives the contents that a dictionary of pages has."""
    device = bytearray(os.urandom(PAGES * PAGE))
    disk = DiskFile.create(tmp_path_factory.mktemp("disk"), PAGES, PAGE)
    store = PageStore(
        PAGE, {Tier.DEVICE: memoryview(device), Tier.HOST: memoryview(bytearray(PAGES * PAGE))}, disk
    )
    slots = [slot(tier, i) for tier in Tier for i in range(PAGES)]
    model = {one: page(store, Tier.DEVICE, one) for one in slots[:PAGES]}
    for source, target in copies:
        if source // PAGES == target // PAGES or slots[source] not in model:
            continue
        assert store.copy([(slots[source], slots[target], 1)]) == ()
        model[slots[target]] = model[slots[source]]
    for number, one in enumerate(slots[: 2 * PAGES]):
        assert model.get(one, bytes(PAGE)) == page(store, Tier(number // PAGES), number % PAGES)
    disk.close()
