"""The load generator's stub server for tests, over memory streams with a virtual clock or on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio
import trio.testing

from loadgen import api
from loadgen.options import ArrivalOptions, MeasureOptions, RunOptions, ServerOptions, WorkloadOptions
from loadgen.rundir import Run
from loadgen.stub import Behaviour, Stub

SMALL = WorkloadOptions(groups=2, group_size=3, prefix_tokens=64, question_tokens=16, output_tokens=8)
"""Six sessions of two prefixes."""


def options(
    workload: WorkloadOptions = SMALL,
    arrivals: ArrivalOptions | None = None,
    server: ServerOptions | None = None,
    measures: MeasureOptions | None = None,
    kind: str = "shared-prefix",
) -> RunOptions:
    """Options for a run of a small workload, by default with a single client."""
    return RunOptions(
        kind=kind,  # type: ignore[arg-type]
        workload=workload,
        arrivals=arrivals or ArrivalOptions(clients=1),
        server=server or ServerOptions(model="stub"),
        measures=measures or MeasureOptions(),
    )


async def played(
    stub: Stub, given: RunOptions, out: Path | None = None, watch: api.Watch | None = None
) -> Run:
    """A run against a stub over memory streams; with ``autojump_clock``, in virtual time."""
    async with trio.open_nursery() as nursery:

        async def connect() -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(stub.converse, theirs)
            return ours

        run = await api.play(given, out, watch, connect=connect)
        nursery.cancel_scope.cancel()
    return run


@asynccontextmanager
async def on_loopback(stub: Stub) -> AsyncIterator[str]:
    """A stub's address on loopback."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(stub.listen)
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


def with_(behaviour: Behaviour | None = None, **changes: Any) -> Stub:
    """A stub with this behaviour and these changes to it."""
    return Stub(attrs.evolve(behaviour or Behaviour(), **changes))
