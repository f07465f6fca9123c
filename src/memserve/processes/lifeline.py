"""The lifeline: a stream socket between an actor and its supervisor that carries one JSON object a line::

    actor -> supervisor   {"event": "hello", "id": "p0.9f3a1c22"}   at once, so that its death can be announced
                          {"event": "ready", "id": "p0.9f3a1c22"}
                          {"event": "leaving"}                       a worker told to drain: it is not to be restarted
                          {"event": "serving", "url": "http://..."}  Frontends, once /health is true
                          {"event": "alive"}                         every BEAT_S
    supervisor -> actor   {"event": "drain"}
                          {"event": "died", "id": "p0.9f3a1c22"}     GlobalSchedulers; all, where those are on another host
                          {"event": "down", "name": "p0", "why": "..."}  Frontends: an actor does not live
                          {"event": "up", "name": "p0"}                  and lives again

The kernel closes it however the other side ends, so its end of file is the one reliable word that the supervisor is
gone; the actor then stops at once. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the child
ends (trio starts children from a worker thread, which retires when idle), it is lost between fork and prctl, and as
SIGKILL it would leave the sockets behind.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable

import attrs
import trio

from memserve.identity import ActorId
from memserve.processes.lifecycle import BEAT_S

DIED_MESSAGES = 256
"""Announcements kept for a scheduler that is busy. More are dropped: missed heartbeats tell it the same, later."""
LINE_BYTES_MAX = 64 << 10
"""A longer line on a lifeline is not ours."""


@attrs.define(eq=False)
class EventSocket:
    """One end of a lifeline. ``receive`` has one caller at a time; cancelled, it loses nothing."""

    _socket: socket.socket
    _unread: bytearray = attrs.field(factory=bytearray)

    def __attrs_post_init__(self) -> None:
        self._socket.setblocking(False)

    def send(self, **event: str) -> bool:
        """Send an event; whether it went out. It does not when the other side is gone, or hung with its buffer full.

        A line is far smaller than a socket buffer, so the kernel takes it as a whole or not at all.
        """
        try:
            self._socket.send(json.dumps(event).encode() + b"\n")
        except OSError:
            return False
        return True

    def send_with(self, descriptor: int, **event: str) -> bool:
        """The same with a copy of an open file."""
        try:
            socket.send_fds(self._socket, [json.dumps(event).encode() + b"\n"], [descriptor])
        except OSError:
            return False
        return True

    async def receive(self) -> dict[str, str] | None:
        """The next event, or None when the other side is gone."""
        while b"\n" not in self._unread:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                chunk = self._socket.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                return None
            if not chunk or len(self._unread) > LINE_BYTES_MAX:
                return None
            self._unread += chunk
        line, _, rest = self._unread.partition(b"\n")
        self._unread = rest
        event: dict[str, str] = json.loads(line)
        return event

    def close(self) -> None:
        """The other side reads an end of file. No task may be in ``receive`` then: see ``hang_up``."""
        self._socket.close()

    def hang_up(self) -> None:
        """End both directions; ``receive`` here and there answers None. The other side stops at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


@attrs.define(eq=False)
class Lifeline:
    """What an actor hears from its supervisor and tells it."""

    actor: ActorId
    _events: EventSocket
    _settle: Callable[[], None] = lambda: None
    """Called once, before the actor is reported ready."""
    drain: trio.Event = attrs.field(init=False, factory=trio.Event)
    """Finish what is in flight, take nothing new, return from ``main``. Set for good."""
    gone: trio.Event = attrs.field(init=False, factory=trio.Event)
    """The supervisor is gone. Everything is being cancelled already; nothing needs to wait for this."""
    died: trio.MemoryReceiveChannel[ActorId] = attrs.field(init=False)
    """Actors whose process has ended, for GlobalSchedulers, or to be passed on to them: faster than missing heartbeats."""
    down: dict[str, str] = attrs.field(init=False, factory=dict)
    """Actors that do not live, and why, for Frontends: ``/health`` says it."""
    _tell_died: trio.MemorySendChannel[ActorId] = attrs.field(init=False)
    _is_ready: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._tell_died, self.died = trio.open_memory_channel[ActorId](DIED_MESSAGES)

    def hello(self) -> None:
        """Tell the id under which this process is going to be known."""
        self._events.send(event="hello", id=self.actor)

    def ready(self) -> None:
        """The actor does its work from now on. Only the first call counts."""
        if not self._is_ready:
            self._is_ready = True
            self._settle()
            self._events.send(event="ready", id=self.actor)

    async def beat(self) -> None:
        """Tell the supervisor, for as long as the event loop turns, that it does."""
        while True:
            if not self._events.send(event="alive"):
                return
            await trio.sleep(BEAT_S)

    def serving(self, url: str) -> None:
        """A Frontend answers requests at ``url``, and /health is true."""
        self._events.send(event="serving", url=url)

    def leaving(self) -> None:
        """The actor ends for good once it has finished what it holds: no successor is to be started."""
        self._events.send(event="leaving")

    async def listen(self) -> None:
        """Take in what the supervisor says, until it is gone."""
        while (event := await self._events.receive()) is not None:
            if event["event"] == "drain":
                self.drain.set()
            elif event["event"] == "died":
                with contextlib.suppress(trio.WouldBlock):
                    self._tell_died.send_nowait(ActorId(event["id"]))
            elif event["event"] == "down":
                self.down[event["name"]] = event["why"]
            elif event["event"] == "up":
                self.down.pop(event["name"], None)
        self.gone.set()
