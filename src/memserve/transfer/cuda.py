"""Access to pages on other GPUs of the host: open their CUDA IPC handle, copy from GPU to GPU.

Copies go over NVLink or PCIe where the two GPUs can access each other; otherwise the driver routes them
through host memory. Two shards on one GPU copy within it. Once its stream has completed, a copy is complete
for every process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.errors import PeerError
from memserve.kernels.gpu_memory import GpuArena, open_peer_pages
from memserve.transfer.mapped import Mapped
from memserve.transfer.mover import MoveError
from memserve.transfer.values import Extent, Geometry
from memserve.transfer_messages import Failure

COPY_BYTES = 64 << 20
"""Bytes copied between two checks for cancellation: a few milliseconds over PCIe."""


@attrs.define(eq=False)
class GpuReach:
    """A Reach for MappedMover: from ``gpu``'s pages to those of other shards on GPUs of this host."""

    gpu: GpuArena
    geometry: Geometry

    @property
    def pages(self) -> int:
        """See Reach."""
        return self.gpu.header.pages

    def attach(self, socket: Path) -> Mapped:
        """See Reach. Opens a handle, which takes milliseconds whatever the arena's size."""
        peer = open_peer_pages(self.gpu, socket)
        if peer.page_bytes != self.geometry.page_bytes:
            peer.close()
            raise PeerError(
                f"{socket} has pages of {peer.page_bytes} bytes, this shard of {self.geometry.page_bytes}: "
                "both must run the same [model] path and dtype and the same [pool] page_tokens"
            )
        return Mapped(peer.address, peer.pages, peer.close, peer.device)

    def copy(self, there: Mapped, todo: list[Extent]) -> int:
        """See Reach. Uses a stream of its own, concurrently with workers' steps and other copies."""
        runtime = self.gpu.runtime
        try:
            runtime.setDevice(self.gpu.device)  # the current device is per thread
            stream = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
            try:
                return self._copy(there, todo, stream)
            finally:
                runtime.streamDestroy(stream)
        except runtime.CUDARuntimeError as error:
            raise MoveError(Failure.CUT, f"copying from GPU to GPU failed: {error}") from error

    def _copy(self, there: Mapped, todo: list[Extent], stream: Any) -> int:
        runtime, gpu = self.gpu.runtime, self.gpu
        moved = unchecked = 0
        try:
            for extent in todo:
                target, source = there.address + extent.destination, gpu.pages_at + extent.source
                runtime.memcpyPeerAsync(target, there.device, source, gpu.device, extent.nbytes, stream)
                moved += extent.nbytes
                unchecked += extent.nbytes
                if unchecked >= COPY_BYTES:
                    unchecked = 0
                    runtime.streamSynchronize(stream)
                    trio.from_thread.check_cancelled()
        finally:
            runtime.streamSynchronize(stream)  # also when cancelled: then the receiver may reuse its pages
        return moved
