"""Who is in the cluster: soft state, rebuilt from heartbeats, so that a restarted scheduler knows all within a second."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import attrs

from memserve.identity import ActorId, actor_name
from memserve.messages import Member

DEAD_AFTER_S = 5.0
"""Silence after which a member is held for dead and fenced off."""
DEAD_STARTING_S = 60.0
"""The same for one that still starts: it owns nothing yet, and its imports may keep its event loop from turning."""
GONE_REMEMBERED = 1_000
"""Dead incarnations remembered, so that one that wakes up is told."""
GONE_REPEATED_S = 60.0
"""How long the dead are named in every view, for whoever missed the announcement."""

PREFILLS = ("prefill", "both")
DECODES = ("decode", "both")


@attrs.frozen
class Pair:
    """A prefill and a decode worker; the same worker twice when it does both."""

    prefill: Member
    decode: Member
    shard: Member
    """The prefill worker's. Where the decode worker's is another, the pages move there."""


def pairs(members: Iterable[Member]) -> list[Pair]:
    """Every placement that can serve a request now. A worker of role ``both`` keeps what it prefills.

    Prefill workers that have a decode worker on their own shard are paired with those only: there nothing moves.
    """
    ready = [one for one in members if one.state == "ready"]
    shards = {one.id: one for one in ready if one.kind == "MemPoolShard"}
    workers = [one for one in ready if one.shard in shards]
    found = []
    for prefill in (one for one in workers if one.role in PREFILLS):
        decoders = [prefill] if prefill.role == "both" else [one for one in workers if one.role in DECODES]
        near = [one for one in decoders if one.shard == prefill.shard]
        found += [Pair(prefill, one, shards[prefill.shard]) for one in near or decoders]
    return found


@attrs.define
class Membership:
    """Members by id, and when each was heard last."""

    members: dict[ActorId, Member] = attrs.field(factory=dict)
    _heard_at: dict[ActorId, float] = attrs.field(factory=dict)
    _gone: OrderedDict[ActorId, float] = attrs.field(factory=OrderedDict)

    def hear(self, member: Member, now: float) -> tuple[bool, tuple[ActorId, ...]]:
        """Take a heartbeat in: whether the view changed beyond the load, and which older incarnations it replaces."""
        known = self.members.get(member.id)
        replaced: tuple[ActorId, ...] = ()
        if known is None:  # seldom: with a thousand members there are two thousand heartbeats a second
            name = actor_name(member.id)
            replaced = tuple(one for one in self.members if actor_name(one) == name)
        self.members[member.id] = member
        self._heard_at[member.id] = now
        for one in (*filter(None, (member.shard,)), *member.needs):
            if one not in self._gone:
                # It may have died with the last scheduler, which alone was told: then its silence begins here.
                self._heard_at.setdefault(one, now)
        changed = known is None or _lasting(known) != _lasting(member)
        return changed, replaced

    def is_gone(self, actor: ActorId) -> bool:
        """Whether this incarnation was declared dead before."""
        return actor in self._gone

    def revive(self, actor: ActorId) -> None:
        """One that only slept, and owned nothing that was given to others, is a member again."""
        self._gone.pop(actor, None)

    def recently_gone(self, now: float) -> tuple[ActorId, ...]:
        """The dead of the last GONE_REPEATED_S."""
        return tuple(one for one, at in self._gone.items() if now - at < GONE_REPEATED_S)

    def bury(self, actors: Iterable[ActorId], now: float) -> tuple[ActorId, ...]:
        """Remove actors for good; returns those that were not buried before."""
        fresh = tuple(one for one in actors if one not in self._gone)
        for one in fresh:
            self._gone[one] = now
            self.members.pop(one, None)
            self._heard_at.pop(one, None)
        while len(self._gone) > GONE_REMEMBERED:
            self._gone.popitem(last=False)
        return fresh

    def excuse(self, now: float) -> None:
        """Everyone's silence counts from now: it was this scheduler that heard nothing."""
        self._heard_at = dict.fromkeys(self._heard_at, now)

    def silent(self, now: float) -> tuple[ActorId, ...]:
        """Members not heard of for DEAD_AFTER_S, or DEAD_STARTING_S."""
        return tuple(one for one in self._heard_at if now >= self._silent_at(one))

    @property
    def deadline(self) -> float:
        """When the next member would count as silent."""
        return min(map(self._silent_at, self._heard_at), default=float("inf"))

    def _silent_at(self, actor: ActorId) -> float:
        member = self.members.get(actor)  # none yet, of one that only others have named
        starting = member is not None and member.state == "starting"
        return self._heard_at[actor] + (DEAD_STARTING_S if starting else DEAD_AFTER_S)


def _lasting(member: Member) -> Member:
    """What of a member changes seldom."""
    return attrs.evolve(member, load={}, needs=())
