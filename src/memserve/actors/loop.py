"""The shell that all actors share: messages in, the core decides, actions out.

A *turn* is synchronous: let the core advance, then perform what it asks for. Whatever happens to an actor (messages,
a finished step, a client, a deadline) is given to the core and followed by a turn, so a core needs no lock, and the
event loop is never blocked for longer than one turn.
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
from memserve.errors import PeerFull, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.messages import Cluster, Gone, Load, Message, Refused
from memserve.pool_messages import Meet
from memserve.processes.actor import RestartNeeded
from memserve.scheduling.presence import Core

log = structlog.get_logger()


@attrs.define(eq=False)
class Shell:
    """One core, its link, and the actions that only its kind of actor knows how to perform."""

    core: Core
    link: Link
    perform: dict[type[Any], Callable[[Any], None]] = attrs.field(factory=dict)
    after_turn: Callable[[], None] = lambda: None
    """Called at the end of each turn: for what many actions of one turn are to share."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, from an origin of the host's own."""
    turned: trio.Event = attrs.field(factory=trio.Event, init=False)
    """Set after the next turn, then replaced: for whoever waits for a state of the core."""
    _timer: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _due: float = attrs.field(default=float("inf"), init=False)
    """When the timer fires, by ``clock``."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Converse until cancelled. Raises RestartNeeded when the core asks to stop, UserError when the cluster refuses it."""
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
        """Give one message to the core, and keep the link's directory by what it says about actors."""
        now = self.clock()
        self.core.receive(received.sender, received.message, now)
        self._note(received.sender, received.message, now)

    def _note(self, sender: ActorId, message: Message, now: float) -> None:
        match message:
            case Cluster(_, members, gone):
                for member in members:
                    if member.id != self.link.actor:
                        self.link.connect(member.id, member.endpoint)
                if gone:  # again, for whoever missed it
                    self.hear(Received(sender, Gone(gone)))
            case Meet(shard, endpoint):
                self.link.connect(shard, endpoint)
            case Load(member):
                self.link.connect(member.id, member.endpoint)
            case Gone(actors):
                for actor in actors:
                    self.link.forget(actor)
            case Refused(reason):
                raise UserError(reason)

    def tell(self, message: Any) -> None:
        """Give the core something that happened inside this actor, and take the turn that follows."""
        self.core.receive(self.link.actor, message, self.clock())
        self.turn()

    def turn(self) -> None:
        """Let the core advance and perform everything that it asks for."""
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
        """Queue a message, or tell the core that it cannot be."""
        try:
            self.link.send(action.to, action.message)
        except (PeerUnreachable, PeerFull):
            self.core.undeliverable(action.to, action.message, self.clock())
        if isinstance(action.message, Gone) and action.to in action.message.actors:
            self.link.forget(
                action.to
            )  # the last word to one that is fenced off; its successor has another id

    def _set_timer(self) -> None:
        """Only forward: a deadline that moved back, as heartbeats and repeats do at every turn, is looked at when it was due.

        trio's clock has an origin of its own, so deadlines are passed on as distances.
        """
        deadline = self.core.deadline
        if deadline < self._due:
            self._due = deadline
            self._timer.deadline = trio.current_time() + (deadline - self.clock())
