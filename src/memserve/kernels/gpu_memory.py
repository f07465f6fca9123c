"""A GPU shard's memory: its pages and one copy of the weights, shared with its workers by CUDA IPC.

The only module that imports cupy. The shard allocates both with plain cudaMalloc, each as a block of its own:
an IPC handle covers a whole allocation, so a block carved out of a pool cannot be shared. It hands out the
handles over the socket that hands out a memfd on CPU. A worker opens them once and sees them as tensors.
Handles do not reach other users' processes: only the shard's own user may use the socket.

Lifetime: the blocks live as long as the shard's process. When it dies, its workers are notified and end; a
mapping that is still open stays readable until its process ends, but its contents belong to no actor. A
worker that dies leaves nothing behind but leases, which the shard reclaims. A restarted shard makes new
blocks and a new socket.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import msgspec

from memserve.engine.safetensors import read_header
from memserve.errors import PeerError, UserError
from memserve.identity import ActorId
from memserve.kernels.arena import LAYOUT_VERSION, receive_packet
from memserve.settings.gpu_room import SCRATCH_PAGES

MAGIC = b"MEMSCUDA"
ALIGN = 2 << 20
"""Unit in bytes of allocations: smaller ones may share a block, which a handle would expose whole."""
ROOM_S, ROOM_STEP_S = 15.0, 0.2
"""How long a shard waits for room, and between two attempts.

After a shard's death its memory comes free only when all its workers, which have it mapped, have ended.
"""
_COPY_BYTES = 64 << 20
"""Bytes of the weights' file copied at a time."""


@attrs.frozen(kw_only=True)
class GpuHeader:
    """Facts on which an attaching worker must agree before it opens anything."""

    version: int = LAYOUT_VERSION
    shard: ActorId
    pages: int
    """Pages of the pool; the block holds ``SCRATCH_PAGES`` more."""
    page_bytes: int
    weights: str
    """Digest of the weights' header: names, types, shapes and offsets."""
    weights_bytes: int
    bus_id: str
    """The GPU's PCI address, because processes may number GPUs differently."""
    arena_handle: bytes
    """The cudaIpcMemHandle_t, 64 bytes."""
    weights_handle: bytes

    def encode(self) -> bytes:
        """The header as sent."""
        return MAGIC + msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, packet: bytes) -> GpuHeader:
        """Decode a header. Raises PeerError if ``packet`` is not one, or has another layout version."""
        if not packet.startswith(MAGIC):
            raise PeerError(f"not a GPU's arena: the socket answered {packet[:16]!r}")
        try:
            header = msgspec.msgpack.decode(packet[len(MAGIC) :], type=cls)
        except msgspec.MsgspecError as error:
            raise PeerError(f"the GPU arena's header is damaged: {error}") from error
        if header.version != LAYOUT_VERSION:
            raise PeerError(
                f"the arena has page layout version {header.version}, this process needs {LAYOUT_VERSION}"
            )
        return header


def load_runtime() -> Any:
    """CuPy, for its runtime calls; imported when the first GPU is used."""
    import cupy

    return cupy


@attrs.define(eq=False)
class GpuArena:
    """The shard's or a worker's view of both blocks. Made by :meth:`create` or :func:`attach_gpu_arena`."""

    header: GpuHeader
    device: int
    pages_at: int
    """Device address of page 0, different in every process."""
    weights_at: int
    _cupy: Any
    _release: Callable[[], None]

    @classmethod
    def create(
        cls, shard: ActorId, device: int, pages: int, page_bytes: int, weights: Path, cupy: Any = None
    ) -> GpuArena:
        """Allocate both blocks and load the weights. Takes seconds: call it in a thread.

        Raises UserError if the GPU has not enough memory, or the machine does not let processes share it.
        """
        cupy = cupy or load_runtime()
        runtime = cupy.cuda.runtime
        size = os.path.getsize(weights)
        try:
            runtime.setDevice(device)
            blocks = _allocated(cupy, [(pages + SCRATCH_PAGES) * page_bytes, size])
        except runtime.CUDARuntimeError as error:
            raise UserError(
                f"cuda:{device} has no room for {pages} pages of {page_bytes} bytes beside {size >> 20} MiB of weights: "
                f"{error}. Set a smaller [[shard]] memory, or stop what else uses the GPU."
            ) from error
        handles = [_exported(runtime, block.ptr, device) for block in blocks]
        _load(runtime, weights, blocks[1].ptr)
        header = GpuHeader(
            shard=shard, pages=pages, page_bytes=page_bytes, weights=weights_digest(weights), weights_bytes=size,
            bus_id=runtime.deviceGetPCIBusId(device), arena_handle=handles[0], weights_handle=handles[1],
        )  # fmt: skip

        def release() -> None:
            runtime.setDevice(device)  # per thread, and the first call of a thread makes a context
            blocks.clear()  # CuPy frees a block when its Memory object goes

        return cls(header, device, blocks[0].ptr, blocks[1].ptr, cupy, release)

    @property
    def runtime(self) -> Any:
        """CuPy's CUDA runtime calls."""
        return self._cupy.cuda.runtime

    def bytes_at(self, address: int, nbytes: int) -> Any:
        """``nbytes`` of device memory as a CuPy array, for ``torch.from_dlpack``; valid until ``close``."""
        memory = self._cupy.cuda.UnownedMemory(address, nbytes, self, self.device)
        pointer = self._cupy.cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray((nbytes,), self._cupy.uint8, pointer)

    def close(self) -> None:
        """Release the memory, which nothing may still use: no tensor, no captured graph, no copy."""
        release, self._release = self._release, lambda: None
        release()


def _allocated(cupy: Any, sizes: Sequence[int]) -> list[Any]:
    """A block of at least each size. Waits for up to ``ROOM_S`` if there is no room; then raises CuPy's error."""
    until = time.monotonic() + ROOM_S
    while True:
        blocks = list[Any]()
        try:
            for size in sizes:
                blocks.append(cupy.cuda.Memory(-(-size // ALIGN) * ALIGN))
            return blocks
        except cupy.cuda.runtime.CUDARuntimeError:
            blocks.clear()
            if time.monotonic() >= until:
                raise
        time.sleep(ROOM_STEP_S)


def _exported(runtime: Any, pointer: int, device: int) -> bytes:
    try:
        handle: bytes = runtime.ipcGetMemHandle(pointer)
    except runtime.CUDARuntimeError as error:
        raise UserError(
            f"this machine does not let processes share memory of cuda:{device} (cudaIpcGetMemHandle: {error}); a GPU "
            "shard needs that: not under WSL, nor across MIG instances; containers need one PID namespace for all actors"
        ) from error
    return handle


def _load(runtime: Any, file: Path, target: int) -> None:
    """Copy a file to device memory, through the page cache, which other processes may share."""
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as source,
    ):
        for start in range(0, len(source), _COPY_BYTES):
            part = source[start : start + _COPY_BYTES]
            runtime.memcpy(target + start, _address(part), len(part), runtime.memcpyHostToDevice)
        runtime.deviceSynchronize()


def _address(data: bytes) -> int:
    import numpy as np

    return int(np.frombuffer(data, np.uint8).ctypes.data)


def weights_digest(file: Path) -> str:
    """A digest of a converted file's header, which has the offset of each tensor."""
    import hashlib

    header, base = read_header(file)
    return hashlib.sha256(msgspec.json.encode([header, base])).hexdigest()[:32]


def attach_gpu_arena(
    socket_path: Path,
    device: int,
    page_bytes: int,
    weights: Path,
    *,
    timeout_s: float = 5.0,
    cupy: Any = None,
) -> GpuArena:
    """Open the blocks served at ``socket_path`` in this process's context on ``cuda:device``. Blocks.

    Raises PeerUnreachable if no process serves them, PeerError if they are for another model or layout,
    UserError if this machine does not let processes share them.
    """
    packet, fds = receive_packet(socket_path, timeout_s)
    for fd in fds:
        os.close(fd)
    header = GpuHeader.decode(packet)
    if header.page_bytes != page_bytes or header.weights != weights_digest(weights):
        raise PeerError(
            f"the arena of {header.shard} is of another model or page size: "
            "both must run the same [model] path and dtype and the same [pool] page_tokens"
        )
    cupy = cupy or load_runtime()
    runtime = cupy.cuda.runtime
    opened: list[int] = []

    def release() -> None:
        runtime.setDevice(device)  # per thread; handles are closed where they were opened
        while opened:
            runtime.ipcCloseMemHandle(opened.pop())

    try:
        runtime.setDevice(device)
        _same_gpu(runtime, device, header)
        opened.append(runtime.ipcOpenMemHandle(header.arena_handle))
        opened.append(runtime.ipcOpenMemHandle(header.weights_handle))
    except runtime.CUDARuntimeError as error:
        release()
        raise UserError(
            f"the memory of {header.shard} on cuda:{device} cannot be opened (cudaIpcOpenMemHandle: {error}): shard and "
            "worker must see the same GPU and each other's process ids"
        ) from error
    return GpuArena(header, device, opened[0], opened[1], cupy, release)


def _same_gpu(runtime: Any, device: int, header: GpuHeader) -> None:
    """Raise UserError unless ``device`` is the GPU of ``header``.

    CUDA would open another GPU's memory as well, and send every read over the link between the two.
    """
    if (mine := runtime.deviceGetPCIBusId(device)) != header.bus_id:
        raise UserError(
            f"{header.shard} is on GPU {header.bus_id}, and cuda:{device} is {mine} in this process: start both with the "
            "same CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER"
        )


# ---- pages of other shards -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class PeerPages:
    """Another shard's pages on a GPU of this host, opened in this process."""

    device: int
    """Number of the GPU in this process."""
    address: int
    pages: int
    page_bytes: int
    _runtime: Any

    def close(self) -> None:
        """Close the pages; no copy may be under way."""
        self._runtime.setDevice(self.device)
        self._runtime.ipcCloseMemHandle(self.address)


def open_peer_pages(mine: GpuArena, socket_path: Path, *, timeout_s: float = 5.0) -> PeerPages:
    """Open the pages that another GPU shard serves at ``socket_path``, and let ``mine``'s GPU reach them.

    Blocks. Raises PeerUnreachable if no process serves them, PeerError if they are not a GPU's or cannot be
    reached from this process.
    """
    packet, fds = receive_packet(socket_path, timeout_s)
    for fd in fds:
        os.close(fd)
    header, runtime = GpuHeader.decode(packet), mine.runtime
    try:
        device = runtime.deviceGetByPCIBusId(header.bus_id)
        if device != mine.device:
            _see(runtime, mine.device, device)
        runtime.setDevice(device)
        address = runtime.ipcOpenMemHandle(header.arena_handle)
    except runtime.CUDARuntimeError as error:
        raise PeerError(
            f"the memory of {header.shard} on GPU {header.bus_id} cannot be opened by {mine.header.shard} ({error}): "
            "both must see each other's GPU and process ids"
        ) from error
    return PeerPages(device, address, header.pages, header.page_bytes, runtime)


def _see(runtime: Any, device: int, other: int) -> None:
    """Let ``device`` copy to ``other`` without passing through host memory, if the machine can."""
    runtime.setDevice(device)
    if runtime.deviceCanAccessPeer(device, other):
        try:
            runtime.deviceEnablePeerAccess(other)
        except runtime.CUDARuntimeError as error:
            if "PeerAccessAlreadyEnabled" not in str(error):
                raise


# ---- pages between tiers ---------------------------------------------------------------------------------------


@attrs.define(eq=False)
class PinnedMemory:
    """Host memory registered with CUDA, so that copies to and from it run concurrently with kernels."""

    view: memoryview
    address: int
    _runtime: Any

    @classmethod
    def register(cls, view: memoryview, runtime: Any, device: int) -> PinnedMemory:
        """Pin ``view``, which must be writable and stay mapped until :meth:`close`.

        Raises UserError on failure.
        """
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        try:
            runtime.setDevice(device)
            runtime.hostRegister(address, view.nbytes, 0)
        except runtime.CUDARuntimeError as error:
            raise UserError(
                f"[pool] host_bytes: {view.nbytes >> 20} MiB cannot be pinned ({error}); set a smaller host_bytes, "
                "or raise the limit of locked memory"
            ) from error
        return cls(view, address, runtime)

    def close(self) -> None:
        """Unpin the memory."""
        self._runtime.hostUnregister(self.address)


def coalesced(runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join runs (first source, first target, pages) that continue each other on both sides: fewer copies."""
    found: list[tuple[int, int, int]] = []
    for source, target, pages in runs:
        if found and found[-1][0] + found[-1][2] == source and found[-1][1] + found[-1][2] == target:
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + pages)
        else:
            found.append((source, target, pages))
    return found
