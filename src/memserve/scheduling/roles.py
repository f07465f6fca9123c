"""Which role each worker ought to have: what operators gave by hand, and what was decided from the load.

A role is a wish that is repeated until the worker reports it, and again to the worker's successor, which starts with the
role of the configuration. Wishes are soft state: a scheduler that restarts hears from the workers what they were given,
and only where both die together is a worker's role the configured one again.
"""

from __future__ import annotations

import attrs

from memserve.actions import Action, Send
from memserve.messages import ActorId, Change, Member, actor_name
from memserve.scheduling.changes import HAND, SCHEDULER

ASK_AGAIN_S = 1.0
"""How long a worker may take to report what it was asked for."""


@attrs.define
class Wish:
    """The role that a worker is to have."""

    role: str
    by: str
    """HAND or SCHEDULER."""
    configured: str
    """What it starts with. A worker of its name that starts with another role is a new one."""
    taken_by: ActorId | None = None
    """The incarnation that reported it."""
    asked_at: float = float("-inf")


@attrs.define
class Roles:
    """Remembers wishes by the workers' names."""

    _wishes: dict[str, Wish] = attrs.field(factory=dict)

    def heard(self, member: Member, now: float) -> list[Action]:
        """Take a worker's heartbeat in; a Change where it has not the role that it is to have."""
        name, wish = actor_name(member.id), self._wishes.get(actor_name(member.id))
        if member.state == "draining":
            self._wishes.pop(name, None)  # it leaves for good
        elif _is_news(member, wish):
            self._wishes[name] = Wish(member.role, member.role_by, member.role_configured, member.id)
        elif wish is None:
            pass
        elif (member.role, member.role_by) == (wish.role, wish.by):
            wish.taken_by = member.id
        elif wish.taken_by == member.id or wish.configured != member.role_configured:
            del self._wishes[name]  # given back by an operator, or another worker took the name
        elif member.state == "ready" and now >= wish.asked_at + ASK_AGAIN_S:
            wish.asked_at = now
            return [Send(member.id, Change(wish.role, by=wish.by))]
        return []

    def seen(self, member: Member) -> Member:
        """The member as a view shows it: with the role that it has yet to take."""
        wish = self._wishes.get(actor_name(member.id)) if member.role else None
        if wish is None or wish.role == member.role:
            return member
        return attrs.evolve(member, role_wanted=wish.role)


def _is_news(member: Member, wish: Wish | None) -> bool:
    """Whether it has a role that was given to it and that is not known here, or outweighs what is."""
    if wish is None:
        return member.role_by in (HAND, SCHEDULER)
    return member.role_by == HAND and (member.role, HAND) != (wish.role, wish.by)
