"""The members of the cluster: soft state, rebuilt from heartbeats within a second of a restart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import attrs

from memserve.identity import ActorId, actor_name
from memserve.messages import Member

DEAD_AFTER_S = 5.0
"""Silence after which a member is presumed dead and fenced off."""
DEAD_STARTING_S = 60.0
"""Silence after which a starting member is presumed dead: it owns nothing, and imports may block its loop."""
GONE_REMEMBERED = 1_000
"""Dead incarnations remembered, so that one that wakes up can be told."""
GONE_REPEATED_S = 60.0
"""How long the dead are named in every view, for members that missed the announcement."""

PREFILLS = ("prefill", "both")
DECODES = ("decode", "both")


@attrs.frozen
class Pair:
    """A prefill and a decode worker; the same worker twice if it does both."""

    prefill: Member
    decode: Member
    shard: Member
    """The prefill worker's shard. If the decode worker's shard is another one, the pages move there."""


def pairs(members: Iterable[Member]) -> list[Pair]:
    """Every placement that can serve a request now. A worker of role ``both`` keeps what it prefills.

    A prefill worker with decode workers on its own shard is paired only with those: there nothing moves.
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
    """Members by id, and when each was last heard."""

    members: dict[ActorId, Member] = attrs.field(factory=dict)
    _heard_at: dict[ActorId, float] = attrs.field(factory=dict)
    _gone: OrderedDict[ActorId, float] = attrs.field(factory=OrderedDict)

    def hear(self, member: Member, now: float) -> tuple[bool, tuple[ActorId, ...]]:
        """Take a heartbeat in.

        The result is whether anything lasting changed, not just load and needs, and which older incarnations
        it replaces.
        """
        known = self.members.get(member.id)
        # Seldom: a thousand members send two thousand heartbeats a second.
        replaced = self.named(actor_name(member.id)) if known is None else ()
        self.members[member.id] = member
        self._heard_at[member.id] = now
        for one in (*filter(None, (member.shard,)), *member.needs):
            if one not in self._gone:
                # It may have died with the last scheduler, which alone was told: then its silence begins
                # here.
                self._heard_at.setdefault(one, now)
        changed = known is None or _lasting(known) != _lasting(member)
        return changed, replaced

    def named(self, name: str) -> tuple[ActorId, ...]:
        """The members called ``name``: one, or none."""
        return tuple(one for one in self.members if actor_name(one) == name)

    def is_gone(self, actor: ActorId) -> bool:
        """Whether this incarnation was declared dead before."""
        return actor in self._gone

    def revive(self, actor: ActorId) -> None:
        """Undo the death of an actor that was only stopped and owned nothing that was given to others."""
        self._gone.pop(actor, None)

    def recently_gone(self, now: float) -> tuple[ActorId, ...]:
        """The dead of the last GONE_REPEATED_S."""
        return tuple(one for one, at in self._gone.items() if now - at < GONE_REPEATED_S)

    def bury(self, actors: Iterable[ActorId], now: float) -> tuple[ActorId, ...]:
        """Remove dead actors for good; the result is those not buried before."""
        fresh = tuple(one for one in actors if one not in self._gone)
        for one in fresh:
            self._gone[one] = now
            self.members.pop(one, None)
            self._heard_at.pop(one, None)
        while len(self._gone) > GONE_REMEMBERED:
            self._gone.popitem(last=False)
        return fresh

    def excuse(self, now: float) -> None:
        """Count every member as heard now: it was this scheduler that was stopped and heard nothing."""
        self._heard_at = dict.fromkeys(self._heard_at, now)

    def silent(self, now: float) -> tuple[ActorId, ...]:
        """Members not heard for DEAD_AFTER_S, or DEAD_STARTING_S while starting."""
        return tuple(one for one in self._heard_at if now >= self._silent_at(one))

    @property
    def deadline(self) -> float:
        """When the next member would count as silent."""
        return min(map(self._silent_at, self._heard_at), default=float("inf"))

    def _silent_at(self, actor: ActorId) -> float:
        member = self.members.get(actor)  # None for an actor that was only named by others
        starting = member is not None and member.state == "starting"
        return self._heard_at[actor] + (DEAD_STARTING_S if starting else DEAD_AFTER_S)


def _lasting(member: Member) -> Member:
    """The parts of a member that seldom change."""
    return attrs.evolve(member, load={}, needs=())
