"""A GPU shard's memory without a GPU: handles passed to workers, refusals, and copies between tiers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import trio

from fake_cupy import CUDARuntimeError, fake_cupy
from memserve.engine.cuda import pages_of, weights_of
from memserve.engine.weights import map_weights, random_weights, save_weights
from memserve.errors import PeerError, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.kernels import gpu_memory, gpu_store
from memserve.kernels.arena import Arena, attach_arena, serve_arena, serve_packet
from memserve.kernels.gpu_memory import GpuArena, GpuHeader, attach_gpu_arena, coalesced
from memserve.kernels.gpu_store import open_gpu_store
from memserve.kernels.page_store import DiskFile
from memserve.mempool.addresses import Tier, slot
from memserve.transfer.cuda import GpuReach
from memserve.transfer.values import Geometry
from test_model import tiny_spec

SHARD = ActorId("g0.00000001")
SPEC = tiny_spec(4, 2, 64)
PAGE_BYTES = SPEC.page_bytes(16, "bfloat16")
DEVICE, HOST, DISK = (partial(slot, tier) for tier in Tier)


@pytest.fixture
def weights(tmp_path):
    """Converted weights of a random model."""
    path = tmp_path / "w.safetensors"
    save_weights(random_weights(SPEC, "bfloat16", 1), path)
    return path


@pytest.fixture
def place(tmp_path_factory):
    """A socket path short enough for the kernel."""
    return tmp_path_factory.mktemp("g") / "a.sock"


async def attached(arena: GpuArena, place: Path, *arguments, **more) -> GpuArena:
    """Attach to the arena while it is served, as a worker does."""
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, arena.header.encode(), (), place)
        try:
            return await trio.to_thread.run_sync(partial(attach_gpu_arena, place, *arguments, **more))
        finally:
            nursery.cancel_scope.cancel()


async def test_a_worker_sees_the_pages_and_weights_of_its_shard(weights, place):
    """A worker that attaches sees the shard's pages and weights, and closing gives the handles back."""
    cupy = fake_cupy()
    arena = GpuArena.create(SHARD, 0, 5, PAGE_BYTES, weights, cupy)
    seen = await attached(arena, place, 0, PAGE_BYTES, weights, cupy=cupy)
    pages = pages_of(seen, SPEC, 16, torch.bfloat16)
    assert pages.shape == (6, *SPEC.page_shape(16)) and pages.dtype == torch.bfloat16
    pages[3] = 2.5
    raw = (ctypes.c_uint8 * PAGE_BYTES).from_address(arena.pages_at + 3 * PAGE_BYTES)
    assert bytes(raw) == np.full(PAGE_BYTES // 2, 0x4020, np.uint16).tobytes()

    expected = map_weights(weights)
    found = weights_of(seen, weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].data_ptr() % 16 == 0 for name in found)
    assert len(cupy.cuda.runtime.opened) == 2
    seen.close()
    seen.close()
    assert not cupy.cuda.runtime.opened


async def test_a_worker_of_another_model_or_page_size_is_refused(weights, place, tmp_path):
    """A worker with another model or page size is refused with the reason."""
    cupy = fake_cupy()
    arena = GpuArena.create(SHARD, 0, 2, PAGE_BYTES, weights, cupy)
    other = tmp_path / "other"
    save_weights(random_weights(tiny_spec(4, 2, 128), "bfloat16", 1), other)
    for page_bytes, file in ((PAGE_BYTES * 2, weights), (PAGE_BYTES, other)):
        with pytest.raises(ExceptionGroup) as caught:
            await attached(arena, place, 0, page_bytes, file, cupy=cupy)
        assert isinstance(caught.value.exceptions[0], PeerError)
        assert "is of another model or page size" in str(caught.value.exceptions[0])
    assert not cupy.cuda.runtime.opened


async def test_a_worker_that_counts_gpus_otherwise_is_refused(weights, place):
    """A worker whose numbering of GPUs differs from its shard's is refused: it would use memory of another GPU."""
    cupy = fake_cupy()
    cupy.cuda.runtime.devices = 2
    arena = GpuArena.create(SHARD, 1, 2, PAGE_BYTES, weights, cupy)
    with pytest.raises(ExceptionGroup) as caught:
        await attached(arena, place, 0, PAGE_BYTES, weights, cupy=cupy)
    (error,) = caught.value.exceptions
    assert isinstance(error, UserError)
    assert "on GPU 0000:41:00.0, and cuda:0 is 0000:40:00.0 in this process" in str(error)
    seen = await attached(arena, place, 1, PAGE_BYTES, weights, cupy=cupy)
    cupy.cuda.runtime.setDevice(0)
    seen.close()
    assert not cupy.cuda.runtime.opened


async def test_arenas_of_the_other_kind_are_refused(weights, place):
    """A GPU worker refuses an arena in host memory, and a CPU worker one on a GPU."""
    cupy = fake_cupy()
    memory = Arena.create(SHARD, 1, PAGE_BYTES)
    gpu = GpuArena.create(SHARD, 0, 2, PAGE_BYTES, weights, cupy)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_arena, memory, place)
        attach = partial(attach_gpu_arena, place, 0, PAGE_BYTES, weights, cupy=cupy)
        with pytest.raises(PeerError, match="not a GPU's arena"):
            await trio.to_thread.run_sync(attach)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, gpu.header.encode(), (), place)
        with pytest.raises(PeerError, match="served no arena"):
            await trio.to_thread.run_sync(attach_arena, place, PAGE_BYTES)
        nursery.cancel_scope.cancel()
    with pytest.raises(PeerUnreachable):
        await trio.to_thread.run_sync(attach)
    memory.close()


async def test_pages_of_another_gpu_that_cannot_be_reached_say_why(weights, place, monkeypatch):
    """Pages of another GPU are mapped for transfers, or refused with the reason if they cannot be reached."""

    def refused(other):
        raise CUDARuntimeError("cudaErrorTooManyPeers: peer mapping resources exhausted")

    cupy = fake_cupy()
    cupy.cuda.runtime.devices = 2
    mine, theirs = (GpuArena.create(SHARD, device, 2, PAGE_BYTES, weights, cupy) for device in (0, 1))
    attach = GpuReach(mine, Geometry(PAGE_BYTES, 1)).attach
    other_size = GpuReach(mine, Geometry(2 * PAGE_BYTES, 1)).attach
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_packet, theirs.header.encode(), (), place)
        mapped = await trio.to_thread.run_sync(attach, place)
        assert (mapped.device, mapped.pages) == (1, 2)
        cupy.cuda.runtime.setDevice(0)  # as other threads do meanwhile
        mapped.unmap()
        with pytest.raises(PeerError, match=f"pages of {PAGE_BYTES} bytes, this shard of {2 * PAGE_BYTES}"):
            await trio.to_thread.run_sync(other_size, place)
        cupy.cuda.runtime.peers.clear()
        with monkeypatch.context() as patch, pytest.raises(PeerError, match="cannot be opened"):
            patch.setattr(cupy.cuda.runtime, "deviceEnablePeerAccess", refused)
            await trio.to_thread.run_sync(attach, place)
        assert not cupy.cuda.runtime.opened
        cupy.cuda.runtime.devices = 1
        with pytest.raises(PeerError, match=r"on GPU 0000:41:00\.0 cannot be opened"):
            await trio.to_thread.run_sync(attach, place)
        nursery.cancel_scope.cancel()
    assert not cupy.cuda.runtime.opened


def test_a_damaged_or_foreign_header_is_refused():
    """A header that is damaged or of another version is refused."""
    header = GpuHeader(
        shard=SHARD,
        pages=1,
        page_bytes=2,
        weights="",
        weights_bytes=3,
        bus_id="0000:40:00.0",
        arena_handle=b"",
        weights_handle=b"",
    )
    assert GpuHeader.decode(header.encode()) == header
    with pytest.raises(PeerError, match="damaged"):
        GpuHeader.decode(header.encode()[:-3])
    with pytest.raises(PeerError, match="page layout version 99"):
        GpuHeader.decode(attrs.evolve(header, version=99).encode())


def test_a_shard_waits_for_the_memory_of_the_one_before_it(weights, monkeypatch):
    """If it failed, a shard that is restarted would say that its memory is set too large, again and again."""
    cupy = fake_cupy(room=10 << 20)
    old, waits = [cupy.cuda.Memory(8 << 20)], []

    def ended(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            old.clear()  # the last worker that had it mapped

    monkeypatch.setattr(gpu_memory.time, "sleep", ended)
    arena = GpuArena.create(SHARD, 0, 2, PAGE_BYTES, weights, cupy)
    assert len(waits) == 3
    arena.close()
    assert cupy.cuda.Memory(10 << 20).ptr  # no attempt kept a part


async def test_where_memory_cannot_be_shared_or_had_it_is_said(weights, place, monkeypatch):
    """Where GPU memory cannot be shared or is too small, the user gets a sentence instead of a CUDA error."""
    cupy = fake_cupy()
    arena = GpuArena.create(SHARD, 0, 2, PAGE_BYTES, weights, cupy)
    cupy.cuda.runtime.shares = False
    with pytest.raises(UserError, match=r"does not let processes share memory of cuda:0 .*PID namespace"):
        GpuArena.create(SHARD, 0, 2, PAGE_BYTES, weights, cupy)
    with pytest.raises(ExceptionGroup) as caught:
        await attached(arena, place, 0, PAGE_BYTES, weights, cupy=cupy)
    assert "cudaIpcOpenMemHandle" in str(caught.value.exceptions[0])
    monkeypatch.setattr(gpu_memory, "ROOM_S", 0.3)
    with pytest.raises(UserError, match=r"cuda:0 has no room for 99 pages .*smaller \[\[shard\]\] memory"):
        GpuArena.create(SHARD, 0, 99, PAGE_BYTES, weights, fake_cupy(room=2 << 20))
    with pytest.raises(UserError, match="invalid device ordinal"):
        GpuArena.create(SHARD, 3, 2, PAGE_BYTES, weights, fake_cupy())


# ---- tiers -----------------------------------------------------------------------------------------------------

PAGES = 6


@pytest.fixture
def store(weights, tmp_path, monkeypatch):
    """Six pages in each tier; each byte of device page i is i + 1. The buffer between GPU and disk holds two pages."""
    monkeypatch.setattr(gpu_store, "STAGED_PAGES", 2)
    gpu = GpuArena.create(SHARD, 0, PAGES, PAGE_BYTES, weights, fake_cupy())
    for i in range(PAGES):
        ctypes.memset(gpu.pages_at + i * PAGE_BYTES, i + 1, PAGE_BYTES)
    disk = DiskFile.create(tmp_path, PAGES, PAGE_BYTES)
    made = open_gpu_store(gpu, memoryview(bytearray(PAGES * PAGE_BYTES)), disk)
    yield made
    made.close()
    assert not gpu.runtime.registered
    disk.close()


def on_device(store, number: int) -> bytes:
    """The bytes of a device page."""
    return ctypes.string_at(store.gpu.pages_at + number * PAGE_BYTES, PAGE_BYTES)


def test_pages_travel_through_all_tiers(store):
    """Runs of pages are copied between device, host and disk with the right bytes."""
    assert store.copy([(DEVICE(0), HOST(3), 2), (DEVICE(4), HOST(0), 1)]) == ()
    assert bytes(store.host.view[3 * PAGE_BYTES : 5 * PAGE_BYTES]) == b"\1" * PAGE_BYTES + b"\2" * PAGE_BYTES
    assert store.copy([(HOST(3), DISK(1), 2), (HOST(0), DISK(5), 1)]) == ()
    assert store.copy([(DISK(1), DEVICE(2), 2), (DISK(5), DEVICE(0), 1)]) == ()
    assert [on_device(store, i)[0] for i in range(PAGES)] == [5, 2, 1, 2, 5, 6]
    assert store.copy([(DEVICE(1), DISK(0), 5)]) == ()
    assert store.copy([(DISK(0), HOST(0), 5), (HOST(0), DEVICE(0), 5), (DEVICE(0), HOST(5), 1)]) == ()
    assert [on_device(store, i)[0] for i in range(PAGES)] == [2, 1, 2, 5, 6, 6]
    assert bytes(store.host.view[5 * PAGE_BYTES :]) == b"\2" * PAGE_BYTES
    assert store.copy([(DEVICE(3), DEVICE(5), 1)]) == ()
    assert on_device(store, 5) == b"\5" * PAGE_BYTES


def test_a_page_is_refilled_after_its_contents_left_it(store):
    """Within one call, a page is copied away before new contents are copied to it."""
    for number in (2, 3):
        store.host.view[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = b"\x09" * PAGE_BYTES
    assert store.copy([(DEVICE(0), HOST(0), 1), (HOST(2), DEVICE(0), 1)]) == ()
    assert store.host.view[0] == 1 and on_device(store, 0)[0] == 9
    assert store.copy([(HOST(3), DEVICE(4), 1), (DEVICE(1), HOST(3), 1), (DEVICE(4), HOST(4), 1)]) == ()
    assert (store.host.view[3 * PAGE_BYTES], store.host.view[4 * PAGE_BYTES]) == (2, 9)


def test_pages_that_a_request_waits_for_do_not_wait_for_others(store):
    """If it failed, a swapped-out prefix would come back only after what another thread is swapping out."""
    ctypes.memset(store.host.address, 9, PAGE_BYTES)
    out = store.gpu.runtime.queued[store._streams[False]]
    out.append((store.host.address + PAGE_BYTES, store.gpu.pages_at + PAGE_BYTES, PAGE_BYTES))
    assert store.copy([(HOST(0), DEVICE(0), 1)]) == ()
    assert on_device(store, 0)[0] == 9 and len(out) == 1
    assert store.copy([(DEVICE(2), HOST(2), 1)]) == () and not out


def test_one_copy_moves_a_run(store):
    """Neighbouring pages are copied by one CUDA call."""
    store.copy([(DEVICE(i), HOST(i), 1) for i in range(4)])
    assert store.gpu.runtime.copies == [(2, 4 * PAGE_BYTES)]
    assert coalesced([(0, 5, 1), (1, 6, 2), (3, 9, 1), (4, 8, 1)]) == [(0, 5, 3), (3, 9, 1), (4, 8, 1)]


def test_damaged_and_unwritable_pages_are_reported(store, monkeypatch):
    """Pages that are damaged on disk, or could not be written, are reported."""
    assert store.copy([(DEVICE(0), DISK(0), 5)]) == ()
    store.disk._checksums[3] ^= 1
    assert store.copy([(DISK(0), DEVICE(0), 5)]) == (DISK(3),)

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr(DiskFile, "write", full)
    assert store.copy([(DEVICE(1), DISK(0), 3)]) == (DEVICE(1), DEVICE(2), DEVICE(3))


def test_a_shard_ends_on_the_gpu_that_it_was_on(weights):
    """If it failed, a shard on a second GPU would make a context on the first one at its end, if that has room."""
    cupy = fake_cupy(devices=2)
    gpu = GpuArena.create(SHARD, 1, 2, PAGE_BYTES, weights, cupy)
    store = open_gpu_store(gpu, memoryview(bytearray(2 * PAGE_BYTES)), None)
    for close in (store.close, gpu.close):
        cupy.cuda.runtime.setDevice(0)  # as in a thread that has used no GPU yet
        close()
        assert cupy.cuda.runtime.device == 1


def test_host_memory_that_cannot_be_pinned_is_a_user_error(weights):
    """Host memory that cannot be pinned gives a user error that names the setting."""
    gpu = GpuArena.create(SHARD, 0, 1, PAGE_BYTES, weights, fake_cupy())
    gpu.runtime.pins = False
    with pytest.raises(UserError, match="smaller host_bytes"):
        open_gpu_store(gpu, memoryview(bytearray(PAGE_BYTES)), None)


def test_the_gpu_backend_is_importable_without_its_libraries():
    """The modules of the GPU backend import without cupy and flashinfer."""
    code = "import sys, memserve.engine.cuda, memserve.actors.mempool_shard; sys.exit('cupy' in sys.modules or 'flashinfer' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1] / "src")
