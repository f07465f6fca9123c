"""The gate of a running cluster: where the workers of `memserve join` come in, and how its supervisor sees them.

A Unix socket in the place, and one connection a worker for as long as it belongs to the cluster, with one JSON object a
line::

    memserve join -> supervisor   {"event": "join", "worker": "{...}", "cores": "8"}
                                  {"event": "hello", "id": "d1.9f3a1c22"}    an incarnation began
                                  {"event": "died", "id": "d1.9f3a1c22"}     and ended
    supervisor -> memserve join   {"event": "welcome"}                       with the claim's descriptor, see place.py
                                  {"event": "refused", "reason": "..."}
                                  {"event": "drain"}                         the cluster drains its workers

The end of file tells either side that the other is gone, however it ended.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import attrs
import msgspec
import structlog
import trio

from memserve.config import RESERVED_NAME, Resolved
from memserve.identity import ActorId
from memserve.processes.lifecycle import ActorSpec, roster, worker_spec
from memserve.processes.lifeline import EventSocket
from memserve.processes.place import Place
from memserve.settings.sections import WorkerConfig

log = structlog.get_logger()

SOCKET_NAME = "supervisor.sock"
KNOCK_S = 5.0
"""From a connection to its request."""
GUESTS_MAX = 256
"""Joined workers at a time; another one is refused."""
ACCEPT_PAUSE_S = 1.0
"""After the system refused a connection: it may have no descriptor left."""


@attrs.define(eq=False)
class Guest:
    """A joined worker. Its process is kept by `memserve join`, which is asked to end it as a child would be."""

    spec: ActorSpec
    _events: EventSocket
    id: ActorId | None = None
    """Of the present incarnation."""
    gone: trio.Event = attrs.field(init=False, factory=trio.Event)

    def ask_to_drain(self) -> None:
        """End it for good, politely."""
        self._events.send(event="drain")

    def hang_up(self) -> None:
        """End it for good, at once."""
        self._events.hang_up()

    def kill(self) -> None:
        """The same: its process is another's child, which ends it when it reads the end of file."""
        self._events.hang_up()

    async def next_event(self) -> dict[str, str] | None:
        """What `memserve join` says; None when it is gone."""
        return await self._events.receive()


@attrs.define(eq=False)
class Gate:
    """Lets workers join, and tells the supervisor about them."""

    place: Place
    resolved: Callable[[], Resolved]
    """The cluster as it is now, joined workers included."""
    change: Callable[[Resolved], None]
    """Takes the cluster with one joined worker more or less; what it is told is in cluster.json afterwards."""
    buried: Callable[[ActorId], None]
    """Told of each incarnation that ended."""
    is_open: Callable[[], bool]
    """False while the cluster drains."""
    say: Callable[[str], None]
    guests: dict[str, Guest] = attrs.field(init=False, factory=dict)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self.place.socket_path(SOCKET_NAME)))
            listener.listen()
            listener.setblocking(False)
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        connection, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        log.warning("join not accepted", reason=str(error))
                        await trio.sleep(ACCEPT_PAUSE_S)
                        continue
                    nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: socket.socket) -> None:
        """One connection, from its request to its end."""
        with connection:
            events = EventSocket(connection)
            try:
                guest = await self._admit(events)
                if guest is not None:
                    await self._host(guest)
            except (ValueError, KeyError, TypeError) as error:  # not said by `memserve join`
                log.warning("join connection broken", reason=repr(error))

    async def _admit(self, events: EventSocket) -> Guest | None:
        """Read the request, and refuse it or let the worker in. Raises ValueError for what is no request."""
        asked = None
        with trio.move_on_after(KNOCK_S):
            asked = await events.receive()
        if asked is None:
            return None
        worker, cores = msgspec.json.decode(asked["worker"], type=WorkerConfig), int(asked["cores"])
        reason = self._why_not(worker)
        if reason is not None:
            log.warning("join refused", child=worker.name, reason=reason)
            events.send(event="refused", reason=reason)
            return None
        self.change(self.resolved().with_worker(worker, cores))
        guest = self.guests[worker.name] = Guest(worker_spec(worker), events)
        events.send_with(self.place.fileno(), event="welcome")
        log.info("worker joined", child=worker.name, role=worker.role, shard=worker.shard)
        self.say(f"memserve: {worker.name} joins: role {worker.role}, on {worker.shard}")
        return guest

    def _why_not(self, worker: WorkerConfig) -> str | None:
        """Why it may not join, and what to do about it."""
        resolved = self.resolved()
        names = [one.name for one in roster(resolved)]
        shards = [shard.name for shard in resolved.config.shard]
        if not self.is_open():
            return "the cluster is shutting down"
        if worker.name in names or RESERVED_NAME.fullmatch(worker.name):
            return (
                f"--name {worker.name} is taken in this cluster: choose a name other than {', '.join(names)}"
            )
        if worker.shard not in shards:
            return f"--shard must be one of {', '.join(shards)}, not {worker.shard!r}"
        if len(self.guests) >= GUESTS_MAX:
            return f"{GUESTS_MAX} workers have joined, and more may not: let one of them leave first"
        return None

    async def _host(self, guest: Guest) -> None:
        """Pass on what happens to its process, until `memserve join` ends."""
        try:
            while (event := await guest.next_event()) is not None:
                if event["event"] == "hello":
                    guest.id = ActorId(event["id"])
                elif event["event"] == "died":
                    self._bury(guest)
        finally:
            self._bury(guest)
            del self.guests[guest.spec.name]
            self.change(self.resolved().without_worker(guest.spec.name))
            guest.gone.set()
            log.info("joined worker left", child=guest.spec.name)
            self.say(f"memserve: {guest.spec.name} has left")

    def _bury(self, guest: Guest) -> None:
        if guest.id is not None:
            self.place.remove_files_of(guest.id)
            self.buried(guest.id)
            guest.id = None
