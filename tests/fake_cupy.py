"""The CuPy calls that memserve makes, on host memory.

Asynchronous copies happen when their stream is synchronised. The memory may be in files, so that other
processes can open it by its handle.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class CUDARuntimeError(RuntimeError):
    """Stands for CuPy's exception of this name."""


class Runtime:
    """``cupy.cuda.runtime``."""

    CUDARuntimeError = CUDARuntimeError
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3
    streamNonBlocking = 1

    def __init__(self) -> None:
        self.queued: dict[int, list[tuple[int, int, int]]] = {}
        self.streams = 100
        self.copies: list[tuple[int, int]] = []
        self.opened: list[int] = []
        self.opened_on: dict[int, int | None] = {}
        self.registered: dict[int, int | None] = {}
        """The device on which each address was registered."""
        self.device: int | None = None
        self.devices = 1
        self.peers: set[tuple[int, int]] = set()
        self.peer_copies: list[tuple[int, int, int]] = []
        self.shares = True
        self.pins = True

    def setDevice(self, device: int) -> None:
        if device >= self.devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.device = device

    def deviceGetPCIBusId(self, device: int) -> str:
        return f"0000:{0x40 + device:02X}:00.0"

    def deviceGetByPCIBusId(self, bus_id: str) -> int:
        device = int(bus_id[5:7], 16) - 0x40
        if not 0 <= device < self.devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return device

    def deviceCanAccessPeer(self, device: int, other: int) -> int:
        return 1

    def deviceEnablePeerAccess(self, other: int) -> None:
        assert self.device is not None, "no device was set"
        if (self.device, other) in self.peers:
            raise CUDARuntimeError("cudaErrorPeerAccessAlreadyEnabled: peer access is already enabled")
        self.peers.add((self.device, other))

    def memcpyPeerAsync(self, target: int, to: int, source: int, of: int, size: int, stream: int) -> None:
        self.peer_copies.append((of, to, size))
        self.queued[stream].append((target, source, size))

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        if not self.shares:
            raise CUDARuntimeError("cudaErrorNotSupported: operation not supported")
        return struct.pack("<Q56x", pointer)

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        assert len(handle) == 64
        if not self.shares:
            raise CUDARuntimeError("cudaErrorMapBufferObjectFailed: mapping of buffer object failed")
        pointer: int = struct.unpack_from("<Q", handle)[0]
        self.opened.append(pointer)
        self.opened_on[pointer] = self.device
        return pointer

    def ipcCloseMemHandle(self, pointer: int) -> None:
        assert self.device == self.opened_on[pointer], "closed on another device than it was opened on"
        self.opened.remove(pointer)

    def memcpy(self, target: int, source: int, size: int, kind: int) -> None:
        ctypes.memmove(target, source, size)

    def memcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        assert self.device is not None, "no device was set"
        self.copies.append((kind, size))
        self.queued[stream].append((target, source, size))

    def streamCreateWithFlags(self, flags: int) -> int:
        assert flags == self.streamNonBlocking
        self.streams += 1
        self.queued[self.streams] = []
        return self.streams

    def streamSynchronize(self, stream: int) -> None:
        for copy in self.queued[stream]:
            ctypes.memmove(*copy)
        self.queued[stream].clear()

    def streamDestroy(self, stream: int) -> None:
        assert not self.queued.pop(stream), "a copy was never waited for"

    def deviceSynchronize(self) -> None:
        pass

    def hostRegister(self, pointer: int, size: int, flags: int) -> None:
        if not self.pins:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.registered[pointer] = self.device

    def hostUnregister(self, pointer: int) -> None:
        assert self.device == self.registered.pop(pointer), "another GPU gets a context for this"


class SharedRuntime(Runtime):
    """A runtime whose memory is in files of a folder.

    A handle names a file and opens in any process but its owner.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.owned: dict[int, Path] = {}
        self.mapped: dict[int, Any] = {}

    def allocate(self, size: int) -> Any:
        """Zeroed memory, as fresh pages are; the result has its address."""
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.truncate(size)
            memory = _Mapped(file.fileno(), size)
        self.owned[memory.address] = Path(file.name)
        return memory

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        return str(self.owned[pointer].name).encode().ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        assert len(handle) == 64
        path = self.folder / handle.rstrip(b"\0").decode()
        if path in self.owned.values():
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: a handle opens in another process only")
        with path.open("r+b") as file:
            memory = _Mapped(file.fileno(), path.stat().st_size)
        self.mapped[memory.address] = memory
        self.opened_on[memory.address] = self.device
        self.opened.append(memory.address)
        return memory.address

    def ipcCloseMemHandle(self, pointer: int) -> None:
        super().ipcCloseMemHandle(pointer)
        del self.mapped[pointer]


class _Mapped:
    """A whole file, mapped as long as this object is referenced."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def fake_cupy(room: int = 1 << 30, folder: Path | None = None, devices: int = 1) -> Any:
    """A stand-in for the module ``cupy``, with ``devices`` GPUs of ``room`` bytes in total.

    ``folder``: where the memory's files are if other processes must be able to open it.
    """
    import numpy as np

    left = [room]
    runtime = Runtime() if folder is None else SharedRuntime(folder)
    runtime.devices = devices

    class Memory:
        """``cupy.cuda.Memory``: one allocation."""

        def __init__(self, size: int) -> None:
            assert size % (2 << 20) == 0, "a smaller allocation may share its block"
            self._size = 0
            if size > left[0]:
                raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
            left[0] -= size
            self._size = size
            if isinstance(runtime, SharedRuntime):
                self._memory = runtime.allocate(size)
                self.ptr = self._memory.address
            else:
                self._bytes = np.full(size, 0xFF, np.uint8)
                self.ptr = int(self._bytes.ctypes.data)

        def __del__(self) -> None:
            left[0] += self._size

    def ndarray(shape: tuple[int], dtype: Any, pointer: Any) -> np.ndarray:
        return np.ctypeslib.as_array((ctypes.c_uint8 * shape[0]).from_address(pointer.address))

    cuda = SimpleNamespace(
        runtime=runtime,
        Memory=Memory,
        UnownedMemory=lambda address, nbytes, owner, device: SimpleNamespace(address=address),
        MemoryPointer=lambda memory, offset: SimpleNamespace(address=memory.address + offset),
    )
    return SimpleNamespace(cuda=cuda, uint8=np.uint8, ndarray=ndarray)
