"""A virtual world: a heap of events for time, and actors whose cores are driven exactly as by a real shell.

Nothing here waits: the clock is a number that jumps to the next event. Events at the same time happen in the
order in which they were scheduled, so a run is a function of its seed, on any machine and with any hash seed.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable
from typing import Any

import attrs

from memserve.actions import Action, Log, Send, Stop
from memserve.core import Core
from memserve.identity import ActorId, actor_name
from memserve.messages import Cluster, Gone, Load, Message
from memserve.sim.network import Network

SPINS_MAX = 2_000
"""Turns that one actor may take in a row without time passing; a core that takes more keeps itself awake."""


class Violation(AssertionError):
    """An invariant does not hold in a run; the text says which, and when."""


@attrs.define(eq=False)
class Actor:
    """One incarnation of an actor: its core, the actors it can reach, the actions its shell can perform."""

    id: ActorId
    kind: str
    core: Core
    known: set[ActorId] = attrs.field(factory=set)
    """Actors whose address it has; a Send to any other is undeliverable."""
    perform: dict[type[Any], Callable[[Any], None]] = attrs.field(factory=dict)
    turned: Callable[[], None] = lambda: None
    """Called after each turn; for a shell that waits for a state of its core."""
    alive: bool = True
    paused: bool = False
    """Stopped by SIGSTOP: messages that arrive wait, and so does what happens inside the actor."""
    slowness: float = 1.0
    """Factor on the duration of its steps."""
    timer_at: float = math.inf
    held: list[Callable[[], None]] = attrs.field(factory=list)
    """Calls that wait for the end of a pause, in order."""
    _spins: int = 0
    _turned_at: float = -1.0

    @property
    def name(self) -> str:
        """The configured name."""
        return actor_name(self.id)

    def note_turn(self, now: float) -> None:
        """Count turns at the same time. Raises Violation after more than SPINS_MAX."""
        self._spins = self._spins + 1 if now == self._turned_at else 0
        self._turned_at = now
        if self._spins > SPINS_MAX:
            raise Violation(f"{self.id} takes turn after turn at {now:.6f} s: its deadline does not move")


@attrs.define(eq=False)
class World:
    """Clock, events, actors and the network between them."""

    network: Network
    now: float = 0.0
    """Virtual time in seconds."""
    actors: dict[str, Actor] = attrs.field(factory=dict)
    """Living actors, by name."""
    kill: Callable[[Actor], None] = lambda actor: None
    """Ends an actor as SIGKILL does; set by the cluster, which restarts the actor."""
    after_turn: Callable[[Actor], None] = lambda actor: None
    """Called after each turn of any actor; for the audit."""
    heard: Callable[[Actor, ActorId, Message], None] | None = None
    """Called for each message that arrives."""
    logged: Callable[[Actor, Log], None] | None = None
    events: int = 0
    messages: dict[str, int] = attrs.field(factory=dict)
    """Number of messages sent, by kind."""
    _by_id: dict[ActorId, Actor] = attrs.field(factory=dict)
    _heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = attrs.field(factory=list)
    _order: int = 0
    _digest: Any = attrs.field(factory=lambda: hashlib.blake2b(digest_size=16))

    # ---- time ----------------------------------------------------------------------------------------------

    def at(self, time: float, call: Callable[..., None], *args: Any) -> None:
        """Schedule a call; a time in the past means now."""
        self._order += 1
        heapq.heappush(self._heap, (max(time, self.now), self._order, call, args))

    def after(self, delay: float, call: Callable[..., None], *args: Any) -> None:
        """Schedule a call ``delay`` seconds from now."""
        self.at(self.now + delay, call, *args)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Run events until a time, or until ``done``; the clock stops at the last event."""
        heap = self._heap
        while heap and heap[0][0] <= until and not done():
            self.now, _, call, args = heapq.heappop(heap)
            self.events += 1
            call(*args)

    def note(self, *words: object) -> None:
        """Add a line to the event log, which is kept only as a digest."""
        self._digest.update(f"{self.now!r} {words!r}\n".encode())

    @property
    def digest(self) -> str:
        """Digest of the event log so far: equal runs have equal digests."""
        return str(self._digest.copy().hexdigest())

    # ---- actors --------------------------------------------------------------------------------------------

    def start(self, actor: Actor) -> None:
        """Bring an actor to life; its first turn is taken at once."""
        assert actor.name not in self.actors, f"two actors are named {actor.name}"
        self.actors[actor.name] = self._by_id[actor.id] = actor
        self.note("start", actor.id)
        self.turn(actor)

    def remove(self, actor: Actor) -> None:
        """Remove an actor: it does nothing any more, and messages on their way to it are lost."""
        actor.alive = False
        del self.actors[actor.name], self._by_id[actor.id]
        self.note("end", actor.id)

    def find(self, actor: ActorId) -> Actor | None:
        """The actor with this id, if it lives; a scheduler's seed id finds its current incarnation."""
        if actor.endswith(".seed"):
            return self.actors.get(actor_name(actor))
        return self._by_id.get(actor)

    def pause(self, actor: Actor) -> None:
        """Pause an actor, as SIGSTOP does."""
        actor.paused = True
        self.note("pause", actor.id)

    def resume(self, actor: Actor) -> None:
        """Resume an actor, as SIGCONT does: everything that waited happens now, in order."""
        if not actor.alive or not actor.paused:
            return
        actor.paused = False
        self.note("resume", actor.id)
        held, actor.held = actor.held, []
        for call in held:
            if actor.alive:
                call()
        if actor.alive:
            self.turn(actor)

    def tell(self, actor: Actor, message: Any) -> None:
        """Tell a core of an event inside its actor, such as a step's end; waits while the actor is paused."""
        if not actor.alive:
            return
        if actor.paused:
            actor.held.append(lambda: self.tell(actor, message))
            return
        actor.core.receive(actor.id, message, self.now)
        self.turn(actor)

    def turn(self, actor: Actor) -> None:
        """Let the core advance, perform every action that it asks for, and set its timer."""
        actor.note_turn(self.now)
        actor.core.advance(self.now)
        while actions := actor.core.take():
            for action in actions:
                self._perform(actor, action)
                if self._by_id.get(actor.id) is None:
                    return  # it has stopped
        self._set_timer(actor)
        actor.turned()
        self.after_turn(actor)

    def _set_timer(self, actor: Actor) -> None:
        deadline = max(actor.core.deadline, self.now)
        if deadline < actor.timer_at:
            actor.timer_at = deadline
            self.at(deadline, self._fire, actor, deadline)

    def _fire(self, actor: Actor, deadline: float) -> None:
        if not actor.alive or deadline != actor.timer_at:
            return
        actor.timer_at = math.inf
        if not actor.paused:
            self.turn(actor)

    def _perform(self, actor: Actor, action: Action) -> None:
        match action:
            case Send(to, message):
                self._send(actor, to, message)
            case Log():
                if self.logged is not None:
                    self.logged(actor, action)
            case Stop(reason):
                self.note("stop", actor.id, reason)
                self.kill(actor)
            case _:
                actor.perform[type(action)](action)

    # ---- messages ------------------------------------------------------------------------------------------

    def _send(self, actor: Actor, to: ActorId, message: Message) -> None:
        kind = type(message).__name__
        self.messages[kind] = self.messages.get(kind, 0) + 1
        if to not in actor.known and not to.endswith(".seed"):
            actor.core.undeliverable(to, message, self.now)
            return
        for arrival, carried in self.network.carry(actor.name, actor_name(to), message, self.now):
            self.at(arrival, self._arrive, actor.id, to, carried)

    def _arrive(self, sender: ActorId, to: ActorId, message: Message) -> None:
        actor = self.find(to)
        if actor is None:
            return
        if actor.paused:
            actor.held.append(lambda: self._hear(actor, sender, message))
            return
        self.note(sender, actor.id, type(message).__name__)
        self._hear(actor, sender, message)
        if actor.alive:
            self.turn(actor)

    def _hear(self, actor: Actor, sender: ActorId, message: Message) -> None:
        """Like :meth:`memserve.actors.loop.Shell.hear`: first the core, then the addresses in the message."""
        if self.heard is not None:
            self.heard(actor, sender, message)
        actor.known.add(sender)
        actor.core.receive(sender, message, self.now)
        match message:
            case Cluster(_, members, gone):
                actor.known.update(one.id for one in members)
                if gone:
                    self._hear(actor, sender, Gone(gone))
            case Load(member):
                actor.known.add(member.id)
            case Gone(gone):
                actor.known.difference_update(gone)
