"""The shell that all actors share: messages come in, the core decides, and the shell performs its actions.

A *turn* is synchronous: it lets the core advance, then performs what the core asks for. Everything that
happens to an actor (a message, a finished step, a client, a deadline) is given to the core and followed by a
turn. So a core needs no lock, and the event loop is never blocked for longer than one turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import attrs
import structlog
import trio

from memserve.actions import Action, Log, Send, Stop
from memserve.bus import Link, Received
from memserve.core import Core
from memserve.errors import PeerFull, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.messages import Cluster, Gone, Load, Message, Refused
from memserve.pool_messages import Meet
from memserve.processes.actor import RestartNeeded

log = structlog.get_logger()


@attrs.define(eq=False)
class Shell:
    """One core, its link, and ``perform``: the actions that only its kind of actor can perform."""

    core: Core
    link: Link
    perform: dict[type[Any], Callable[[Any], None]] = attrs.field(factory=dict)
    after_turn: Callable[[], None] = lambda: None
    """Called at the end of each turn, for work that is done once for all actions of the turn."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, from an arbitrary origin of this host."""
    turned: trio.Event = attrs.field(factory=trio.Event, init=False)
    """Set at the end of the next turn, then replaced; wait on it for a state of the core."""
    _timer: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _due: float = attrs.field(default=float("inf"), init=False)
    """When the timer fires, in ``clock`` time."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Process messages until cancelled.

        Raises RestartNeeded when the core asks to stop, and UserError when the cluster refuses this actor.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_deadlines)
            task_status.started()
            self.turn()
            await self._converse()

    async def _converse(self) -> None:
        while True:
            for received in await self.link.receive():
                self.hear(received)
            self.turn()

    async def _keep_deadlines(self) -> None:
        while True:
            with trio.CancelScope() as self._timer:
                self._due = float("inf")
                self._set_timer()
                await trio.sleep_forever()
            self.turn()

    def hear(self, received: Received) -> None:
        """Give one message to the core, and update the link's directory with the actors that it names."""
        self.core.receive(received.sender, received.message, self.clock())
        self._note(received.sender, received.message)

    def _note(self, sender: ActorId, message: Message) -> None:
        match message:
            case Cluster(_, members, gone):
                for member in members:
                    if member.id != self.link.actor:
                        self.link.connect(member.id, member.endpoint)
                if gone:  # repeated in each Cluster for actors that missed the announcement
                    self.hear(Received(sender, Gone(gone)))
            case Meet(shard, endpoint):
                self.link.introduce(shard, endpoint)
            case Load(member):
                self.link.connect(member.id, member.endpoint)
            case Gone(actors):
                for actor in actors:
                    self.link.forget(actor)
            case Refused(reason):
                raise UserError(reason)

    def tell(self, message: Any) -> None:
        """Give the core an event from inside this actor, and run the turn that follows."""
        self.core.receive(self.link.actor, message, self.clock())
        self.turn()

    def turn(self) -> None:
        """Let the core advance, then perform everything that it asks for."""
        self.core.advance(self.clock())
        while actions := self.core.take():
            for action in actions:
                self._perform(action)
        self.after_turn()
        self._set_timer()
        self.turned.set()
        self.turned = trio.Event()

    def _perform(self, action: Action) -> None:
        match action:
            case Send():
                self.send(action)
            case Log(level, event, data):
                getattr(log, level)(event, **data)
            case Stop(reason):
                raise RestartNeeded(reason)
            case _:
                self.perform[type(action)](action)

    def send(self, action: Send) -> None:
        """Queue a message, or report to the core that it is undeliverable."""
        try:
            self.link.send(action.to, action.message)
        except (PeerUnreachable, PeerFull):
            self.core.undeliverable(action.to, action.message, self.clock())
        if action.last:
            self.link.forget(action.to)

    def _set_timer(self) -> None:
        """Move the timer only to an earlier time.

        Heartbeats and repeats postpone their deadlines at every turn; such a deadline is checked when it was
        first due. trio's clock has its own origin, so deadlines are passed on as distances from now.
        """
        deadline = self.core.deadline
        if deadline < self._due:
            self._due = deadline
            self._timer.deadline = trio.current_time() + (deadline - self.clock())
