"""The gate of a running cluster: where workers of `memserve join` enter, and how the supervisor sees them.

It is a Unix socket in the place. Each worker has one connection for as long as it belongs to the cluster. A
connection carries one JSON object per line::

    memserve join -> supervisor   {"event": "join", "worker": "{...}", "cores": "8"}
                                  {"event": "hello", "id": "d1.9f3a1c22"}    an incarnation began
                                  {"event": "died", "id": "d1.9f3a1c22"}     and ended
    supervisor -> memserve join   {"event": "welcome"}                       with the claim's descriptor
                                  {"event": "refused", "reason": "..."}
                                  {"event": "drain"}                         the cluster drains its workers

The end of file tells either side that the other is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import attrs
import msgspec
import structlog
import trio

from memserve.accepting import accepted
from memserve.config import RESERVED_NAME, Resolved
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.lifecycle import ActorSpec, roster, worker_spec
from memserve.processes.lifeline import EventSocket
from memserve.processes.place import Place
from memserve.settings.sections import WorkerConfig

log = structlog.get_logger()

SOCKET_NAME = "supervisor.sock"
KNOCK_S = 5.0
"""Longest wait from a connection to its request."""
GUESTS_MAX = 256
"""Most workers that may have joined at a time; further ones are refused."""


@attrs.define(eq=False)
class Guest:
    """A joined worker. `memserve join` keeps its process; the supervisor ends it with a child's methods."""

    spec: ActorSpec
    _events: EventSocket
    id: ActorId | None = None
    """The id of the present incarnation."""
    gone: trio.Event = attrs.field(init=False, factory=trio.Event)

    def ask_to_drain(self) -> None:
        """End the worker for good, gracefully."""
        self._events.send(event="drain")

    def hang_up(self) -> None:
        """End the worker for good, at once."""
        self._events.hang_up()

    def kill(self) -> None:
        """End it at once, like :meth:`hang_up`: at the end of file `memserve join` ends its child."""
        self._events.hang_up()

    async def next_event(self) -> dict[str, str] | None:
        """The next event from `memserve join`; None when that is gone."""
        return await self._events.receive()


@attrs.define(eq=False)
class Gate:
    """Lets workers join, and informs the supervisor."""

    place: Place
    resolved: Callable[[], Resolved]
    """The cluster's present configuration, joined workers included."""
    replace_config: Callable[[Resolved], None]
    """Replaces that configuration after a worker joined or left; on return it is in cluster.json.

    Raises UserError when it is replaced but could not be written.
    """
    on_end: Callable[[ActorId], None]
    """Called with each incarnation that has ended."""
    is_open: Callable[[], bool]
    """Whether workers may join; false while the cluster drains."""
    say: Callable[[str], None]
    guests: dict[str, Guest] = attrs.field(init=False, factory=dict)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept connections until cancelled."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(str(self.place.socket_path(SOCKET_NAME)))
            listener.listen()
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    connection, _ = await accepted(listener.accept)
                    nursery.start_soon(self._serve, socket.socket(fileno=connection.detach()))

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one connection from its request to its end."""
        with connection:
            events = EventSocket(connection)
            try:
                guest = await self._admit(events)
                if guest is not None:
                    await self._host(guest)
            except (ValueError, KeyError, TypeError) as error:  # not a message of `memserve join`
                log.warning("join connection broken", reason=repr(error))

    async def _admit(self, events: EventSocket) -> Guest | None:
        """Read the request, then let the worker in or refuse it.

        Raises ValueError for anything that is not a request.
        """
        asked = None
        with trio.move_on_after(KNOCK_S):
            asked = await events.receive()
        if asked is None:
            return None
        worker, cores = msgspec.json.decode(asked["worker"], type=WorkerConfig), int(asked["cores"])
        reason = self._why_not(worker) or self._add(worker, cores)
        if reason is not None:
            log.warning("join refused", child=worker.name, reason=reason)
            events.send(event="refused", reason=reason)
            return None
        guest = self.guests[worker.name] = Guest(worker_spec(worker), events)
        events.send_with(self.place.fileno(), event="welcome")
        log.info("worker joined", child=worker.name, role=worker.role, shard=worker.shard)
        self.say(f"memserve: {worker.name} joins: role {worker.role}, on {worker.shard}")
        return guest

    def _why_not(self, worker: WorkerConfig) -> str | None:
        """Why the worker may not join, and what to do about it; None if it may."""
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

    def _add(self, worker: WorkerConfig, cores: int) -> str | None:
        """Add a worker to the configuration; why that failed, or None."""
        try:
            self.replace_config(self.resolved().with_worker(worker, cores))
        except UserError as error:
            self._remove(worker.name)
            return str(error)
        return None

    def _remove(self, name: str) -> None:
        """Remove a worker from the configuration; the file, if it cannot be written now, lists it for longer."""
        with contextlib.suppress(UserError):
            self.replace_config(self.resolved().without_worker(name))

    async def _host(self, guest: Guest) -> None:
        """Pass on the worker's incarnations and deaths until `memserve join` ends."""
        try:
            while (event := await guest.next_event()) is not None:
                if event["event"] == "hello":
                    guest.id = ActorId(event["id"])
                elif event["event"] == "died":
                    self._end_guest(guest)
        finally:
            self._end_guest(guest)
            del self.guests[guest.spec.name]
            self._remove(guest.spec.name)
            guest.gone.set()
            log.info("joined worker left", child=guest.spec.name)
            self.say(f"memserve: {guest.spec.name} has left")

    def _end_guest(self, guest: Guest) -> None:
        if guest.id is not None:
            self.place.remove_files_of(guest.id)
            self.on_end(guest.id)
            guest.id = None
