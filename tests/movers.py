"""A sender's arena, a receiver's arena and every path between them, for tests of movers."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import torch
import trio

from fake_cupy import fake_cupy
from memserve.engine.weights import save_weights
from memserve.kernels.arena import Arena, serve_arena, serve_packet
from memserve.kernels.gpu_memory import GpuArena
from memserve.transfer import nixl
from memserve.transfer.actions import Expect
from memserve.transfer.cuda import GpuReach
from memserve.transfer.mapped import HostReach, MappedMover
from memserve.transfer.mover import Memory, Mover, PieceFeed
from memserve.transfer.tcp import TcpMover, TcpReceiver
from memserve.transfer.values import Geometry, PageTransfer, Result
from memserve.transfer_messages import Granularity, Way

GEOMETRY = Geometry(page_bytes=24_000, layers=4)  # a page is not a multiple of the system's page size
PAGES = 40

PATHS = [
    "mapped",
    "cuda",
    "tcp",
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(
            not nixl.available(), reason="nixl, the extra [multihost], is not installed"
        ),
    ),
]


@attrs.define(eq=False)
class Pair:
    """A mover from one arena to another."""

    mover: Mover
    way: Way
    source: memoryview
    destination: memoryview
    receiver: TcpReceiver | None
    reported: list = attrs.field(factory=list)
    """What the receiving side reported, for paths in which it takes part."""
    number: int = 0
    runtime: Any = None
    """CuPy's runtime, if the pages are on GPUs."""

    def transfer(self, source, destination, granularity=Granularity.AGGREGATED) -> PageTransfer:
        """The next transfer; the receiving side expects it."""
        self.number += 1
        one = PageTransfer("a.1", self.number, tuple(source), tuple(destination), granularity)
        if self.receiver is not None:
            self.receiver.expect(
                Expect("a.1", one.id, one.destination, granularity, 0.0), self.reported.append
            )
        return one

    async def send(self, transfer, feed=None, deadline_s=20.0) -> Result:
        """Carry out a transfer; its result."""
        feed = feed or PieceFeed.whole(transfer, GEOMETRY)
        return await self.mover.send(transfer, self.way, feed, deadline_s)

    def assert_moved(self, transfer) -> None:
        """Check that only the destination pages changed, and that they equal the source pages."""
        size = GEOMETRY.page_bytes
        expected = bytearray(len(self.destination))
        for source, destination in zip(transfer.source, transfer.destination, strict=True):
            expected[destination * size : (destination + 1) * size] = self.source[source * size :][:size]
        assert self.destination == expected


@asynccontextmanager
async def gpus(nursery, directory, devices=2):
    """Two shards on GPUs of a machine with ``devices`` of them, by CuPy's calls on host memory."""
    cupy = fake_cupy()
    cupy.cuda.runtime.devices = devices
    weights = directory / "w.safetensors"
    save_weights({"one": torch.zeros(8)}, weights)
    sides = [
        GpuArena.create(f"{name}.1", number % devices, PAGES, GEOMETRY.page_bytes, weights, cupy)
        for number, name in enumerate("ab")
    ]
    await nursery.start(serve_packet, sides[1].header.encode(), (), directory / "b")
    here, there = (memoryview(one.bytes_at(one.pages_at, PAGES * GEOMETRY.page_bytes)) for one in sides)
    here[:], there[:] = random.Random(1).randbytes(len(here)), bytes(len(there))
    mover = MappedMover(GpuReach(sides[0], GEOMETRY), "cuda")
    yield Pair(mover, Way("cuda", str(directory / "b")), here, there, None, runtime=cupy.cuda.runtime)
    mover.close()
    assert not cupy.cuda.runtime.opened and not cupy.cuda.runtime.queued
    for one in sides:
        one.close()


@asynccontextmanager
async def pair(path, directory):
    """Two arenas in this process and a mover between them over ``path``."""
    arenas = [Arena.create(f"{name}.1", PAGES, GEOMETRY.page_bytes) for name in "ab"]
    here, there = (Memory(arena.memory, GEOMETRY) for arena in arenas)
    here.view[:] = random.Random(1).randbytes(len(here.view))
    async with trio.open_nursery() as nursery:
        if path == "mapped":
            await nursery.start(serve_arena, arenas[1], directory / "b")
            yield Pair(
                MappedMover(HostReach(here)), Way("mapped", str(directory / "b")), here.view, there.view, None
            )
        elif path == "cuda":
            async with gpus(nursery, directory) as both:
                yield both
        elif path == "tcp":
            receiver = TcpReceiver(there, "127.0.0.1")
            way = await nursery.start(receiver.serve)
            yield Pair(TcpMover(here), way, here.view, there.view, receiver)
        else:
            agents = [nixl.NixlAgent(f"{name}.1", memory) for name, memory in (("a", here), ("b", there))]
            yield Pair(nixl.NixlMover(agents[0]), agents[1].way, here.view, there.view, None)
        nursery.cancel_scope.cancel()
    for arena in arenas:
        arena.close()
