"""One actor as its supervisor sees it: successive processes, each with a lifeline and an output pipe."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import attrs
import structlog
import trio

from memserve.identity import ActorId
from memserve.processes.lifecycle import (
    HUNG_S,
    HUNG_STARTING_S,
    STATUS_CRASHED,
    ActorSpec,
    RestartPolicy,
)
from memserve.processes.lifeline import EventSocket
from memserve.processes.zygote import Forked, Zygote

log = structlog.get_logger()

OUTPUT_TAIL_BYTES = 8 << 10
"""Bytes of a child's stdout and stderr that are kept to show when it dies."""
OUTPUT_SHOWN_LINES = 20
"""Lines of the kept output that are printed when a child dies."""
OUTPUT_LOGGED_BYTES = 64 << 10
"""Bytes of one process's output that are copied into the log as they arrive."""
REAP_S = 5.0
"""Longest wait for a process after its SIGKILL; only an unfinished system call can take so long."""
OVERSLEPT_S = 1.0
"""If it wakes later than this, the supervisor itself was stopped and has not read its actors' events."""
OUTPUT_GRACE_S = 0.5
"""How long a dead child's pipe is still read: a process that the child started may hold it open."""


@attrs.define(eq=False)
class Child:
    """One actor across its incarnations."""

    spec: ActorSpec
    policy: RestartPolicy = attrs.field(factory=RestartPolicy)
    hung_s: float = HUNG_S
    """Longest silence of the actor once it is ready."""
    process: Forked | None = None
    """The present process; None between two incarnations."""
    events: EventSocket | None = None
    """Our end of its lifeline."""
    id: ActorId | None = None
    started_at: float = 0.0
    ready_at: float = math.inf
    heard_at: float = 0.0
    """When the actor last sent an event."""
    hung: bool = False
    """Whether this incarnation was killed because of its silence."""
    restarts: int = 0
    down: str = ""
    """Why the actor is down, and what is done about it; empty while it is up."""
    url: str | None = None
    """The address at which a Frontend serves; None for other actors."""
    tail: bytes = b""
    leaving: trio.Event = attrs.field(factory=trio.Event)
    """Set once the actor is asked to end; it gets no further incarnation."""
    gone: trio.Event = attrs.field(factory=trio.Event)
    """Set when the actor has ended for good."""

    def ready_s(self, now: float) -> float:
        """Seconds since it became ready; 0 if it is not ready."""
        return max(0.0, now - self.ready_at)

    def text(self) -> str:
        """The end of its output."""
        return self.tail.decode(errors="replace").strip()

    def ask_to_drain(self) -> None:
        """End the actor for good, gracefully.

        One that is not ready yet has nothing to finish and may not be listening: it is killed.
        """
        self.leaving.set()
        if self.events is None or self.ready_at == math.inf or not self.events.send(event="drain"):
            self.kill()

    def hang_up(self) -> None:
        """End the actor for good, at once: it cancels its work and removes its sockets."""
        self.leaving.set()
        if self.events is not None:
            self.events.hang_up()

    def kill(self) -> None:
        """Kill this incarnation with SIGKILL."""
        if self.process is not None:
            self.process.kill()

    async def live(self, zygote: Zygote, listen: Callable[[Child], Awaitable[None]]) -> int:
        """Run one incarnation until its process has ended; the return code.

        ``listen`` handles its events in the meantime.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # out of descriptors, as below
            self.tail = str(error).encode()
            return STATUS_CRASHED
        with ours:
            self._begin(EventSocket(ours))
            with theirs:
                try:
                    process = self.process = await zygote.fork(self.spec.name, theirs)
                except OSError as error:  # no processes, memory or descriptors: the others go on
                    self.tail = str(error).encode()
                    return STATUS_CRASHED
            log.info("actor started", child=self.spec.name, child_pid=process.pid)
            try:
                if self.leaving.is_set():  # it was asked to leave while it was being started
                    self.kill()
                return await self._watch(process, listen)
            finally:
                await _reap(process)
                self.process = self.events = None

    def _begin(self, events: EventSocket) -> None:
        """Reset the state of the previous incarnation."""
        self.events, self.id, self.tail = events, None, b""
        self.started_at, self.ready_at = trio.current_time(), math.inf
        self.heard_at, self.hung = self.started_at, False

    async def _watch(self, process: Forked, listen: Callable[[Child], Awaitable[None]]) -> int:
        async with trio.open_nursery() as readers:
            readers.start_soon(listen, self)
            readers.start_soon(self._read_output, process)
            async with trio.open_nursery() as watching:
                watching.start_soon(self._end_when_hung)
                returncode = await process.wait()
                watching.cancel_scope.cancel()
            readers.cancel_scope.deadline = trio.current_time() + OUTPUT_GRACE_S
        return returncode

    async def _end_when_hung(self) -> None:
        """Kill an incarnation whose event loop has stopped turning, so that a successor replaces it."""
        while not self.hung:
            wake_at = min(self._hung_at(), trio.current_time() + self.hung_s)
            await trio.sleep_until(wake_at)
            if trio.current_time() > wake_at + OVERSLEPT_S:
                self.heard_at = trio.current_time()
            self.hung = trio.current_time() >= self._hung_at()
        log.warning(
            "actor hung", child=self.id or self.spec.name, silent_s=trio.current_time() - self.heard_at
        )
        self.kill()

    def _hung_at(self) -> float:
        return self.heard_at + (self.hung_s if self.ready_at < math.inf else HUNG_STARTING_S)

    async def _read_output(self, process: Forked) -> None:
        """Keep the end of a process's output, and log its beginning."""
        logged = 0
        async for chunk in process.stdout:
            self.tail = (self.tail + chunk)[-OUTPUT_TAIL_BYTES:]
            if logged < OUTPUT_LOGGED_BYTES:
                logged += len(chunk)
                text = chunk[:OUTPUT_TAIL_BYTES].decode(errors="replace")
                log.info("actor output", child=self.id or self.spec.name, text=text)


class Ending(Protocol):
    """An actor as its supervisor ends it."""

    gone: trio.Event

    def hang_up(self) -> None:
        """End it for good, at once."""

    def kill(self) -> None:
        """Kill its process."""


async def all_gone(children: Iterable[Ending], limit_s: float = math.inf) -> None:
    """Wait until every one of ``children`` has ended for good, or for ``limit_s``."""
    with trio.move_on_after(limit_s):
        for child in children:
            await child.gone.wait()


async def end_now(children: Sequence[Ending], stop_s: float) -> None:
    """End every one of ``children`` at once: through its lifeline, and after ``stop_s`` with SIGKILL."""
    for child in children:
        child.hang_up()
    await all_gone(children, stop_s)
    for child in children:
        child.kill()


async def _reap(process: Forked) -> None:
    """Make sure that the process has ended, whatever ended the watch over it."""
    if process.returncode is None:
        process.kill()
        with trio.move_on_after(REAP_S, shield=True):
            await process.wait()
    await trio.aclose_forcefully(process.stdout)
