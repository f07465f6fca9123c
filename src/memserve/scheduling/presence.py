"""How an actor makes itself known: Load to every scheduler, each interval and soon after a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
from msgspec import UNSET, UnsetType

from memserve.actions import Action, Overslept, Send
from memserve.identity import ActorId
from memserve.messages import Change, Load, Member, Message
from memserve.scheduling.changes import changed

HEARTBEAT_S = 1.0
"""Longest silence of a live actor."""
CHANGE_S = 0.05
"""Least time between two reports, however fast the load changes."""

OVERSLEPT_S = 2.5
"""An actor takes a turn at least every HEARTBEAT_S; a longer gap means that it was stopped."""


@attrs.define
class Wakefulness:
    """Tells an actor that it was stopped itself (SIGSTOP, a frozen container, Ctrl-Z and fg).

    What others said meanwhile is still in its inbox, and they may have been stopped with it: it must not call them
    silent before they had the time to speak.
    """

    _turn_at: float | None = None

    def overslept(self, now: float) -> bool:
        """Whether the turn at ``now`` comes far too late after the one before."""
        before, self._turn_at = self._turn_at, now
        return before is not None and now - before > OVERSLEPT_S


def seed_id(scheduler: str) -> ActorId:
    """How others address a scheduler before, and across, its incarnations: by name."""
    return ActorId(f"{scheduler}.seed")


@attrs.define
class Presence:
    """Decides when to report. ``member.load`` is filled in by the caller at the time of the report."""

    member: Member
    schedulers: tuple[ActorId, ...]
    also: tuple[ActorId, ...] = ()
    """Who else must hear that this actor lives: a worker's shard, which renews its leases by it."""
    deadline: float = 0.0
    """When the next report is due; at once after start."""
    _reported_at: float = float("-inf")
    terms: dict[str, str] | UnsetType = UNSET
    """What this host has of what all must agree on."""

    def changed(self) -> None:
        """The load is worth reporting before the next heartbeat."""
        self.deadline = min(self.deadline, self._reported_at + CHANGE_S)

    def become(self, state: str, shard: ActorId | None = None) -> None:
        """Enter a state (starting, ready, draining), on a shard if given, and report it."""
        self.member = attrs.evolve(self.member, state=state, shard=shard or self.member.shard)
        self.changed()
        if state == "draining":
            self.deadline = 0.0  # it may be its last word, without which it would be missed

    def change(self, change: Change) -> bool:
        """Do what an operator wants, and report it; whether anything had to change."""
        before, self.member = self.member, changed(self.member, change)
        if self.member == before:
            return False
        self.changed()
        return True

    def due(self, now: float) -> bool:
        """Whether a report should go out now."""
        return now >= self.deadline

    def report(self, now: float, load: dict[str, float], needs: tuple[ActorId, ...] = ()) -> list[Send]:
        """The report for everyone concerned; the next is due an interval later."""
        self.member = attrs.evolve(self.member, load=load, needs=needs)
        self._reported_at, self.deadline = now, now + HEARTBEAT_S
        return [Send(one, Load(self.member, self.terms)) for one in (*self.schedulers, *self.also)]


class Core(Protocol):
    """What decides (DESIGN section 3): no sockets, clock, randomness, threads or arrays inside."""

    def receive(self, sender: ActorId, message: Any, now: float) -> None:
        """Take one message in; never blocks."""

    def advance(self, now: float) -> None:
        """Let time pass: fire deadlines, form batches."""

    def take(self) -> list[Action]:
        """Messages to send and work to run."""

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next; infinity when nothing waits for time."""

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """A Send that could not be performed."""

    def gauges(self) -> dict[str, float]:
        """Load and counters, units in the names; ``_total`` ones only grow."""


@attrs.define
class Reporting:
    """Any core, with its heartbeats: a core like the one within, which is told when it was stopped."""

    core: Core
    presence: Presence
    needs: Callable[[], tuple[ActorId, ...]] = tuple
    """Whose death must not go unannounced, see :class:`~memserve.messages.Member`."""
    _reports: list[Send] = attrs.field(factory=list, init=False)
    _wakefulness: Wakefulness = attrs.field(factory=Wakefulness, init=False)

    def receive(self, sender: ActorId, message: Any, now: float) -> None:
        """Pass a message on."""
        self.core.receive(sender, message, now)

    def advance(self, now: float) -> None:
        """Let time pass."""
        if self._wakefulness.overslept(now):
            self.core.receive(self.presence.member.id, Overslept(), now)
        self.core.advance(now)
        if self.presence.due(now):
            self._reports += self.presence.report(now, self.core.gauges(), self.needs())

    def take(self) -> list[Action]:
        """The core's actions, then the report that is due."""
        reports, self._reports = self._reports, []
        return [*self.core.take(), *reports]

    @property
    def deadline(self) -> float:
        """The core's, or the next report's."""
        return min(self.core.deadline, self.presence.deadline)

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Tell the core; a report that was lost is followed by the next."""
        if not isinstance(message, Load):
            self.core.undeliverable(to, message, now)

    def gauges(self) -> dict[str, float]:
        """The core's."""
        return self.core.gauges()
