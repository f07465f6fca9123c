"""How an actor makes itself known: a Load to every scheduler, at each interval and soon after a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from msgspec import UNSET, UnsetType

from memserve.actions import Action, Overslept, Send
from memserve.core import Core
from memserve.identity import ActorId
from memserve.messages import Change, Load, Member, Message
from memserve.scheduling.changes import changed

HEARTBEAT_S = 1.0
"""Longest silence of a live actor."""
CHANGE_S = 0.05
"""Shortest time between two reports, however fast the load changes."""

OVERSLEPT_S = 2.5
"""An actor takes a turn at least every HEARTBEAT_S; a gap longer than this means that it was stopped."""


@attrs.define
class Wakefulness:
    """Detects that this actor itself was stopped (SIGSTOP, a frozen container, Ctrl-Z and fg).

    What others sent in that time is still in its inbox, and they may have been stopped with it. So it must
    not call them silent before they had time to speak.
    """

    _turn_at: float | None = None

    def overslept(self, now: float) -> bool:
        """Whether the turn at ``now`` comes far too late after the previous one."""
        before, self._turn_at = self._turn_at, now
        return before is not None and now - before > OVERSLEPT_S


def seed_id(scheduler: str) -> ActorId:
    """The id under which others address a scheduler, by name, before and across its incarnations."""
    return ActorId(f"{scheduler}.seed")


@attrs.define
class Presence:
    """Decides when to report. The caller fills in ``member.load`` at the time of the report."""

    member: Member
    schedulers: tuple[ActorId, ...]
    also: tuple[ActorId, ...] = ()
    """Other receivers of the reports: a worker's shard, which renews the worker's leases by them."""
    deadline: float = 0.0
    """When the next report is due; at once after start."""
    _reported_at: float = float("-inf")
    terms: dict[str, str] | UnsetType = UNSET
    """This host's values of the settings that all hosts must share."""

    def changed(self) -> None:
        """Have a changed load reported before the next heartbeat."""
        self.deadline = min(self.deadline, self._reported_at + CHANGE_S)

    def become(self, state: str, shard: ActorId | None = None) -> None:
        """Enter a state (starting, ready, draining), on a shard if given, and have it reported."""
        self.member = attrs.evolve(self.member, state=state, shard=shard or self.member.shard)
        self.changed()
        if state == "draining":
            self.deadline = 0.0  # it may be its last report, without which it would be missed

    def change(self, change: Change) -> bool:
        """Apply a requested change and have it reported; whether anything had to change."""
        before, self.member = self.member, changed(self.member, change)
        if self.member == before:
            return False
        self.changed()
        return True

    def due(self, now: float) -> bool:
        """Whether a report should go out now."""
        return now >= self.deadline

    def report(self, now: float, load: dict[str, float], needs: tuple[ActorId, ...] = ()) -> list[Send]:
        """The reports to all receivers; the next is due an interval later."""
        self.member = attrs.evolve(self.member, load=load, needs=needs)
        self._reported_at, self.deadline = now, now + HEARTBEAT_S
        return [Send(one, Load(self.member, self.terms)) for one in (*self.schedulers, *self.also)]


@attrs.define
class Reporting:
    """Wraps a core with its heartbeats, and reports to the core when this actor was stopped."""

    core: Core
    presence: Presence
    needs: Callable[[], tuple[ActorId, ...]] = tuple
    """The actors whose death must not go unannounced, see :class:`~memserve.messages.Member`."""
    _reports: list[Send] = attrs.field(factory=list, init=False)
    _wakefulness: Wakefulness = attrs.field(factory=Wakefulness, init=False)

    def receive(self, sender: ActorId, message: Any, now: float) -> None:
        """Pass a message on to the core."""
        self.core.receive(sender, message, now)

    def advance(self, now: float) -> None:
        """Let time pass: report an interruption to the core, and the load when due."""
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
        """The earlier of the core's deadline and the next report."""
        return min(self.core.deadline, self.presence.deadline)

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Pass it on to the core, unless it is a report: the next report replaces it."""
        if not isinstance(message, Load):
            self.core.undeliverable(to, message, now)

    def gauges(self) -> dict[str, float]:
        """The core's gauges."""
        return self.core.gauges()
