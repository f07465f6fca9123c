"""The lifeline: a stream socket between an actor and its supervisor that carries one JSON object per line::

    actor -> supervisor   {"event": "hello", "id": "p0.9f3a1c22"}   first, so that its death can be announced
                          {"event": "ready", "id": "p0.9f3a1c22"}
                          {"event": "leaving"}                       from a draining worker: it is not restarted
                          {"event": "serving", "url": "http://..."}  from a Frontend, once /health is true
                          {"event": "alive"}                         every BEAT_S
    supervisor -> actor   {"event": "drain"}
                          {"event": "died", "id": "p0.9f3a1c22"}     to GlobalSchedulers, see below
                          {"event": "down", "name": "p0", "why": "..."}  to Frontends: an actor is down
                          {"event": "up", "name": "p0"}                  to Frontends: it is up again

Where the GlobalSchedulers are on another host, ``died`` goes to all actors of this one, which pass it on.

The kernel closes the socket however the other side ends, so its end of file is the one reliable sign that the
supervisor is gone. The actor then stops at once. PR_SET_PDEATHSIG would not do: it fires when the *thread*
that started the child ends (trio starts children from a worker thread, which retires when idle), it is lost
between fork and prctl, and as SIGKILL it would leave the sockets behind.
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
"""Announcements queued for a busy scheduler.

Further ones are dropped: missed heartbeats report the same, later.
"""
LINE_BYTES_MAX = 64 << 10
"""Longest line of a lifeline; a longer one is not from memserve."""


@attrs.define(eq=False)
class EventSocket:
    """One end of a lifeline. ``receive`` may have one caller at a time; cancelling it loses nothing."""

    _socket: socket.socket
    _unread: bytearray = attrs.field(factory=bytearray)

    def __attrs_post_init__(self) -> None:
        self._socket.setblocking(False)

    def send(self, **event: str) -> bool:
        """Send an event; whether it was sent.

        It is not sent when the other side is gone, or hung with its buffer full. A line is far smaller than a
        socket buffer, so the kernel takes all of it or nothing.
        """
        try:
            self._socket.send(json.dumps(event).encode() + b"\n")
        except OSError:
            return False
        return True

    def send_with(self, descriptor: int, **event: str) -> bool:
        """Send an event together with a copy of an open file descriptor; whether it was sent."""
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
        """Close this end; the other side reads an end of file.

        No task may be in ``receive`` then: see ``hang_up``.
        """
        self._socket.close()

    def hang_up(self) -> None:
        """Shut down both directions: ``receive`` returns None on both sides, and the other side stops."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


@attrs.define(eq=False)
class Lifeline:
    """An actor's end of its lifeline: the supervisor's events, and those that the actor sends."""

    actor: ActorId
    _events: EventSocket
    _settle: Callable[[], None] = lambda: None
    """Called once, before the actor is reported ready."""
    drain: trio.Event = attrs.field(init=False, factory=trio.Event)
    """Set for good when the actor must drain: finish work in flight, take nothing new, leave ``main``."""
    gone: trio.Event = attrs.field(init=False, factory=trio.Event)
    """Set when the supervisor is gone. Everything is being cancelled then; no task needs to wait for this."""
    died: trio.MemoryReceiveChannel[ActorId] = attrs.field(init=False)
    """Actors whose process has ended, for GlobalSchedulers or to pass on to them. Faster than heartbeats."""
    down: dict[str, str] = attrs.field(init=False, factory=dict)
    """Why each actor that is down is down, by name. For Frontends, whose ``/health`` reports it."""
    _tell_died: trio.MemorySendChannel[ActorId] = attrs.field(init=False)
    _is_ready: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._tell_died, self.died = trio.open_memory_channel[ActorId](DIED_MESSAGES)

    def hello(self) -> None:
        """Report the id by which this process will be known."""
        self._events.send(event="hello", id=self.actor)

    def ready(self) -> None:
        """Report that the actor is ready to work. Only the first call counts."""
        if not self._is_ready:
            self._is_ready = True
            self._settle()
            self._events.send(event="ready", id=self.actor)

    async def beat(self) -> None:
        """Report to the supervisor every BEAT_S that the event loop turns.

        A report that cannot be sent is left out: the supervisor may be stopped, and read on later.
        """
        while True:
            self._events.send(event="alive")
            await trio.sleep(BEAT_S)

    def serving(self, url: str) -> None:
        """Report that a Frontend serves requests at ``url`` and its /health is true."""
        self._events.send(event="serving", url=url)

    def leaving(self) -> None:
        """Report that the actor ends for good when it has finished what it holds: it needs no successor."""
        self._events.send(event="leaving")

    async def listen(self) -> None:
        """Handle the supervisor's events until it is gone."""
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
