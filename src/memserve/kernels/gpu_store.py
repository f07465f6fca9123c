"""The tiers of a GPU's shard and the copies between them: device memory, pinned host memory, a file on disk.

Copies run on streams of their own, one per direction, one copy per run of pages, concurrently with the steps
of workers in other processes. Everything here blocks: call it in threads.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import attrs

from memserve.kernels.gpu_memory import GpuArena, PinnedMemory, coalesced
from memserve.kernels.page_store import DiskFile, PageStore, Run
from memserve.mempool.addresses import Tier, page_of, tier_of

STAGED_PAGES = 16
"""Pages that are staged in pinned memory at a time between the GPU and the disk."""


@attrs.define(eq=False)
class GpuPageStore:
    """All tiers of one GPU shard. At most one copy to the device and one from it run at a time."""

    page_bytes: int
    gpu: GpuArena
    host: PinnedMemory | None
    disk: DiskFile | None
    staging: dict[bool, PinnedMemory]
    """Staging memory by whether pages go to the device; empty without a disk."""
    _streams: dict[bool, Any] = attrs.field(init=False)
    _on_host: PageStore = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        runtime = self.gpu.runtime
        runtime.setDevice(self.gpu.device)
        self._streams = {up: runtime.streamCreateWithFlags(runtime.streamNonBlocking) for up in (True, False)}
        memory = {} if self.host is None else {Tier.HOST: self.host.view}
        self._on_host = PageStore(self.page_bytes, memory, self.disk)

    def copy(self, runs: Sequence[Run]) -> tuple[int, ...]:
        """Copy runs of pages, in order; the source slots whose bytes did not arrive.

        Releases the interpreter lock.
        """
        self.gpu.runtime.setDevice(self.gpu.device)  # the device is set per thread
        bad: list[int] = []
        pending: set[bool] = set()  # streams with copies of this call; others' are not waited for
        for source, target, pages in coalesced(runs):
            tiers = tier_of(source), tier_of(target)
            on = {tiers[1] == Tier.DEVICE} if Tier.DEVICE in tiers else set[bool]()
            # Streams are unordered, and a run may read or fill pages that an earlier one filled or emptied.
            self._wait(pending - on)
            pending = on
            bad += self._copy_run(source, target, pages)
        self._wait(pending)
        return tuple(bad)

    def _wait(self, streams: Iterable[bool]) -> None:
        for up in streams:
            self.gpu.runtime.streamSynchronize(self._streams[up])

    def _copy_run(self, source: int, target: int, pages: int) -> Sequence[int]:
        tiers = tier_of(source), tier_of(target)
        if Tier.DEVICE not in tiers:
            return self._on_host.copy([(source, target, pages)])
        if Tier.DISK in tiers:
            return self._through_staging(source, target, pages)
        up = tiers[1] == Tier.DEVICE
        self._move(self._at(target), self._at(source), pages, up, both=tiers == (Tier.DEVICE, Tier.DEVICE))
        return []

    def _through_staging(self, source: int, target: int, pages: int) -> list[int]:
        assert self.disk is not None, "a copy to or from a disk that is not there"
        bad: list[int] = []
        up = tier_of(target) == Tier.DEVICE
        staging = self.staging[up]
        wait = partial(self.gpu.runtime.streamSynchronize, self._streams[up])
        for done in range(0, pages, STAGED_PAGES):
            some = min(STAGED_PAGES, pages - done)
            part = staging.view[: some * self.page_bytes]
            if up:
                first = page_of(source) + done
                bad += [source - page_of(source) + page for page in self.disk.read(first, part)]
                self._move(self._at(target + done), staging.address, some, up)
                wait()
            else:
                self._move(staging.address, self._at(source + done), some, up)
                wait()
                try:
                    self.disk.write(page_of(target) + done, part)
                except OSError:
                    bad += range(source + done, source + done + some)
        return bad

    def _at(self, slot: int) -> int:
        if tier_of(slot) == Tier.DEVICE:
            return self.gpu.pages_at + page_of(slot) * self.page_bytes
        assert self.host is not None, "a copy to or from host memory that is not there"
        return self.host.address + page_of(slot) * self.page_bytes

    def _move(self, target: int, source: int, pages: int, up: bool, both: bool = False) -> None:
        runtime = self.gpu.runtime
        kind = runtime.memcpyHostToDevice if up else runtime.memcpyDeviceToHost
        kind = runtime.memcpyDeviceToDevice if both else kind
        runtime.memcpyAsync(target, source, pages * self.page_bytes, kind, self._streams[up])

    def close(self) -> None:
        """Destroy the streams and unpin host memory. Does not wait: no copy may be under way."""
        self.gpu.runtime.setDevice(self.gpu.device)  # otherwise this thread may make a context on another GPU
        for stream in self._streams.values():
            self.gpu.runtime.streamDestroy(stream)
        for pinned in (*self.staging.values(), *([self.host] if self.host else [])):
            pinned.close()


def open_gpu_store(gpu: GpuArena, host: memoryview | None, disk: DiskFile | None) -> GpuPageStore:
    """The store of a GPU's shard; pins the host tier and the staging memory. Blocks. Raises UserError."""
    page_bytes, runtime = gpu.header.page_bytes, gpu.runtime
    pinned = None if host is None else PinnedMemory.register(host, runtime, gpu.device)
    staging = {}
    if disk is not None:
        for up in (True, False):
            view = memoryview(mmap.mmap(-1, STAGED_PAGES * page_bytes))
            staging[up] = PinnedMemory.register(view, runtime, gpu.device)
    return GpuPageStore(page_bytes, gpu, pinned, disk, staging)
