"""Speed of page transfers between two shards of this machine: ``make bench-transfer``.

There are two processes with an arena each. Rounds are interleaved, so that a noisy neighbour disturbs all
figures equally. Measured are

- memcpy of the same bytes, and a bare blocking socket as a reference for tcp,
- each path (mapped, tcp, and nixl if it is installed) at each granularity, to contiguous and to scattered
  pages,
- the time from the end of a prefill of ``--layer-ms`` per layer until the pages are at the receiver, when
  they are sent whole and when they are sent layer by layer.

Rates cover the whole call, including connecting, checksums and the receiver's answer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.identity import ActorId
from memserve.kernels.arena import Arena, attach_arena, serve_arena
from memserve.transfer import nixl
from memserve.transfer.actions import Expect
from memserve.transfer.mapped import HostReach, MappedMover
from memserve.transfer.mover import Memory, Mover, PieceFeed
from memserve.transfer.tcp import TcpMover, TcpReceiver
from memserve.transfer.values import Geometry, PageTransfer, Piece, TransferDone
from memserve.transfer_messages import Granularity, Way

SENDER = ActorId("sender.1")


@attrs.define(eq=False)
class Bench:
    """The sending process: its movers, and a pipe to the receiving process."""

    geometry: Geometry
    pages: int
    memory: Memory
    movers: dict[str, Mover]
    ways: dict[str, Way]
    raw_port: int
    pipe: subprocess.Popen[str]
    number: int = 0

    def command(self, *words: object) -> str:
        """Send the receiver a command and wait for its answer."""
        assert self.pipe.stdin and self.pipe.stdout
        self.pipe.stdin.write(" ".join(map(str, words)) + "\n")
        self.pipe.stdin.flush()
        return self.pipe.stdout.readline()

    def expected(self, granularity: Granularity, scattered: bool) -> PageTransfer:
        """The next transfer, after telling the receiver to expect it."""
        self.number += 1
        source = tuple(range(self.pages))
        destination = _destination(self.pages, scattered)
        self.command("expect", self.number, granularity, int(scattered))
        return PageTransfer(SENDER, self.number, source, destination, granularity)

    async def move(self, path: str, granularity: Granularity, scattered: bool = False) -> float:
        """Make one transfer; its GB/s."""
        transfer = self.expected(granularity, scattered)
        began = time.perf_counter()
        feed = PieceFeed.whole(transfer, self.geometry)
        result = await self.movers[path].send(transfer, self.ways[path], feed, 120.0)
        took = time.perf_counter() - began
        assert isinstance(result, TransferDone), result
        return result.nbytes / took / 1e9

    async def tail(self, path: str, granularity: Granularity, layer_s: float) -> float:
        """Milliseconds from the end of a prefill to the arrival of its pages."""
        transfer = self.expected(granularity, scattered=False)
        feed = PieceFeed(self.pages, self.geometry.parts(granularity))
        ends = 0.0
        async with trio.open_nursery() as nursery:
            send = partial(self.movers[path].send, transfer, self.ways[path], feed, 120.0)
            nursery.start_soon(send)
            for layer in range(self.geometry.layers):
                await trio.sleep(layer_s)
                ends = time.perf_counter()
                if granularity is Granularity.BY_LAYER:
                    feed.put((Piece(0, self.pages, layer),))
            if granularity is not Granularity.BY_LAYER:
                feed.put((Piece(0, self.pages),))
        return (time.perf_counter() - ends) * 1e3


def _destination(pages: int, scattered: bool) -> tuple[int, ...]:
    order = list(range(pages))
    if scattered:
        random.Random(7).shuffle(order)
    return tuple(order)


# ---- the receiver's process ----------------------------------------------------------------------------------


async def receive(options: argparse.Namespace) -> None:
    """Serve an arena over every available path until stdin ends."""
    geometry = Geometry(options.page_bytes, options.layers)
    arena = Arena.create(ActorId("receiver.1"), options.pages, geometry.page_bytes)
    memory = Memory(arena.memory, geometry)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_arena, arena, Path(options.receive))
        receiver = TcpReceiver(memory, "127.0.0.1")
        tcp = await nursery.start(receiver.serve)
        ways = {"tcp": (tcp.address, tcp.data.hex())}
        if nixl.available():
            agent = nixl.NixlAgent(ActorId("receiver.1"), memory)
            ways["nixl"] = (agent.way.address, agent.way.data.hex())
        raw = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_drain, args=(raw, memory.view), daemon=True).start()
        print(json.dumps({"ways": ways, "raw_port": raw.getsockname()[1]}), flush=True)
        async for line in trio.wrap_file(sys.stdin):
            _, number, granularity, scattered = line.split()
            pages = _destination(options.pages, bool(int(scattered)))
            expect = Expect(SENDER, int(number), pages, Granularity(granularity), 0.0)
            receiver.expect(expect, lambda outcome: None)
            print("ok", flush=True)
        os._exit(0)


def _drain(listener: socket.socket, view: memoryview) -> None:
    """Receive as fast as a socket can: read straight into memory, and send one byte when it is full."""
    while True:
        connection, _ = listener.accept()
        with connection:
            got = 0
            while got < view.nbytes:
                got += connection.recv_into(view[got : got + (1 << 20)])
            connection.sendall(b"D")


# ---- the sender's process ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Start the receiver, measure, and print the report."""
    with tempfile.TemporaryDirectory() as directory:
        place = str(Path(directory) / "arena")
        command = [sys.executable, __file__, "--receive", place, "--pages", str(options.pages)]
        command += ["--page-bytes", str(options.page_bytes), "--layers", str(options.layers)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pipe:
            assert pipe.stdin and pipe.stdout
            try:
                # NIXL logs to stdout too, so other lines may come first.
                said = next(line for line in pipe.stdout if line.startswith("{"))
                trio.run(_send, options, place, pipe, json.loads(said))
            finally:
                pipe.stdin.close()


async def _send(
    options: argparse.Namespace, place: str, pipe: subprocess.Popen[str], said: dict[str, Any]
) -> None:
    geometry = Geometry(options.page_bytes, options.layers)
    arena = Arena.create(SENDER, options.pages, geometry.page_bytes)
    memory = Memory(arena.memory, geometry)
    memory.view[:] = random.Random(1).randbytes(memory.view.nbytes)
    ways = {path: Way(path, at, bytes.fromhex(data)) for path, (at, data) in said["ways"].items()}
    ways["mapped"] = Way("mapped", place)
    movers: dict[str, Mover] = {"mapped": MappedMover(HostReach(memory)), "tcp": TcpMover(memory)}
    if "nixl" in ways:
        movers["nixl"] = nixl.NixlMover(nixl.NixlAgent(SENDER, memory))
    await _measure(
        Bench(geometry, options.pages, memory, movers, ways, said["raw_port"], pipe), options, place
    )


async def _measure(bench: Bench, options: argparse.Namespace, place: str) -> None:
    cases = _cases(bench, options, place)
    for _, measure in cases.values():
        await measure()  # connects, maps memory, warms up
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (_, measure) in cases.items():
            samples[name].append(await measure())
    _report({name: unit for name, (unit, _) in cases.items()}, samples, options)


Case = tuple[str, Callable[[], Awaitable[float]]]


def _cases(bench: Bench, options: argparse.Namespace, place: str) -> dict[str, Case]:
    mapped = attach_arena(Path(place), options.page_bytes)
    cases: dict[str, Case] = {
        # libc bypasses the cache in one long call, not in short ones; the faster way depends on the machine.
        "memcpy, one call": ("GB/s", partial(_memcpy, bench, mapped, bench.memory.view.nbytes)),
        "memcpy, 1 MiB a call": ("GB/s", partial(_memcpy, bench, mapped, 1 << 20)),
        "socket": ("GB/s", partial(_socket, bench)),
    }
    for path in bench.movers:
        for granularity in Granularity:
            cases[f"{path} {granularity}"] = ("GB/s", partial(bench.move, path, granularity))
        scattered = partial(bench.move, path, Granularity.AGGREGATED, scattered=True)
        cases[f"{path} aggregated, scattered"] = ("GB/s", scattered)
    for path in bench.movers:
        for granularity in (Granularity.AGGREGATED, Granularity.BY_LAYER):
            tail = partial(bench.tail, path, granularity, options.layer_ms / 1e3)
            cases[f"{path} {granularity}, after the prefill"] = ("ms", tail)
    return cases


async def _memcpy(bench: Bench, arena: Arena, step: int) -> float:
    here = ctypes.addressof(ctypes.c_char.from_buffer(bench.memory.view))
    there = ctypes.addressof(ctypes.c_char.from_buffer(arena.memory))
    nbytes = bench.memory.view.nbytes
    began = time.perf_counter()
    for start in range(0, nbytes, step):
        ctypes.memmove(there + start, here + start, min(step, nbytes - start))
    return nbytes / (time.perf_counter() - began) / 1e9


async def _socket(bench: Bench) -> float:
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", bench.raw_port)) as connection:
        connection.sendall(bench.memory.view)
        assert connection.recv(1) == b"D"
    return bench.memory.view.nbytes / (time.perf_counter() - began) / 1e9


# ---- the report ----------------------------------------------------------------------------------------------


def _report(units: dict[str, str], samples: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    memcpy = max((name for name in medians if name.startswith("memcpy")), key=lambda name: medians[name])
    size = options.pages * options.page_bytes
    print(
        f"{options.pages} pages of {options.page_bytes:,} bytes in {options.layers} layers ({size / 1e6:.1f} MB), "
        f"{options.rounds} interleaved rounds\n{'':36}{'median':>8} {'range':>16}  unit  of {memcpy}, or of socket"
    )
    figures = {}
    for name, values in samples.items():
        span = f"{min(values):.2f} - {max(values):.2f}"
        reference = {"mapped": memcpy, "tcp": "socket"}.get(name.split()[0])
        share = medians[name] / medians[reference] if reference and units[name] == "GB/s" else None
        print(f"{name:36}{medians[name]:8.2f} {span:>16}  {units[name]:5} {f'{share:.0%}' if share else ''}")
        figures[name] = {"median": medians[name], "min": min(values), "max": max(values), "unit": units[name]}
        figures[name] |= {"share_of": reference, "share": share} if share else {}
    if options.json:
        _write(options, figures)


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    settings = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pages": options.pages,
        "page_bytes": options.page_bytes,
        "layers": options.layers,
        "layer_ms": options.layer_ms,
        "rounds": options.rounds,
    }
    options.json.write_text(json.dumps(settings | {"figures": figures}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=128)
    parser.add_argument("--page-bytes", type=int, default=368_640, help="SmolLM2-135M: 16 tokens in bfloat16")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--layer-ms", type=float, default=5.0, help="time of one layer in the prefill")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _options()
    if chosen.receive:
        trio.run(receive, chosen)
    else:
        measure(chosen)
