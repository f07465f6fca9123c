"""The cluster as a Frontend knows it: its members by the schedulers' views, and whether it can serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import attrs

from memserve.identity import ActorId, actor_name
from memserve.messages import Cluster, Member
from memserve.scheduling.membership import DECODES, PREFILLS, pairs

MISSED_S = 60.0
"""How long a dead actor without a successor counts as missing, unless a supervisor keeps naming it: a joined
worker may have left."""
SILENT_S = 3.0
"""A scheduler sends its view each second; after this long without one, no scheduler is presumed alive."""
RECOVERING_S = 2.0
"""How long actors known to a former scheduler count as present until they report to its successor; heartbeats
come each second."""


@attrs.frozen
class Health:
    """What ``/health`` says."""

    status: str
    """``ok``; ``degraded``: requests are served, something is missing; ``unavailable``: none can be."""
    reason: str = ""
    """What is missing; empty with ``ok``."""

    @property
    def serves(self) -> bool:
        """Whether a request sent now could be served."""
        return self.status != "unavailable"


@attrs.define
class ClusterView:
    """All live actors, by the latest view of each scheduler, and the missing ones."""

    _seen: dict[ActorId, dict[ActorId, Member]] = attrs.field(factory=dict)
    _heard_at: float | None = None
    """When a scheduler was last heard."""
    _missed: dict[str, float] = attrs.field(factory=dict)
    """Time of death of each actor without a ready successor, by name."""
    _former: dict[ActorId, Member] = attrs.field(factory=dict)
    """The last view of a scheduler that ended: its successor starts empty, while the members keep serving."""
    _former_until: float = 0.0

    def members(self) -> list[Member]:
        """All live actors."""
        found: dict[ActorId, Member] = {}
        for view in self._seen.values():
            found |= view
        return list(found.values())

    def everyone(self, now: float) -> list[Member]:
        """All live actors, with those that have yet to report to a scheduler that has just started."""
        members = self.members()
        return members + self._unheard(members, {}, now)

    def heard(self, view: Cluster, now: float) -> list[ActorId]:
        """Take in a scheduler's view and forget its earlier incarnations, which know nothing newer.

        The result is those incarnations.
        """
        name = actor_name(view.scheduler)
        earlier = [one for one in self._seen if actor_name(one) == name and one != view.scheduler]
        for one in earlier:
            self._forget(one, now)
        self._seen[view.scheduler] = {one.id: one for one in view.members}
        self._heard_at = now
        for member in view.members:
            if member.state == "ready":
                self._missed.pop(actor_name(member.id), None)
        return earlier

    def gone(self, actors: Collection[ActorId], now: float) -> None:
        """Remove dead actors. One that was draining is not missed, nor one with a ready successor."""
        self._missed = {name: at for name, at in self._missed.items() if now < at + MISSED_S}
        known = {one.id: one for one in self.members()}
        for actor in actors:
            self._forget(actor, now)
        for view in (*self._seen.values(), self._former):
            for actor in actors:
                view.pop(actor, None)
        alive = {actor_name(one.id) for one in self.members() if one.state == "ready"}
        for actor in actors:
            was = known.get(actor)  # None when a death is announced again
            if was is not None and was.state != "draining" and actor_name(actor) not in alive:
                self._missed.setdefault(actor_name(actor), now)

    def _forget(self, scheduler: ActorId, now: float) -> None:
        """If the actor is a scheduler, drop its view; the members in it count as present for a while."""
        if scheduler in self._seen:
            before = self._former if now < self._former_until else {}
            self._former, self._former_until = before | self._seen.pop(scheduler), now + RECOVERING_S

    def expects(self, name: str, now: float) -> bool:
        """Whether an actor that is not there will be again: it died, and did not leave."""
        return name in self._missed and now < self._missed[name] + MISSED_S

    def health(self, me: Member, down: Mapping[str, str], now: float) -> Health:
        """Whether Frontend ``me`` could serve a request now.

        ``down``: what its supervisor says of actors that are not alive.
        """
        if me.state != "ready":
            return Health("unavailable", f"{actor_name(me.id)} is {me.state}")
        members = [one for one in self.members() if actor_name(one.id) not in down]
        missing = self._missing(members, down, now)
        silent = _silence(self._heard_at, now)
        unservable = silent or _why_unservable(members)
        if unservable and not silent and not _why_unservable(members + self._unheard(members, down, now)):
            missing.append("a scheduler that has just started is still collecting reports")
        elif unservable:
            return Health("unavailable", "; ".join((unservable, *missing)))
        return Health("degraded", "; ".join(missing)) if missing else Health("ok")

    def _unheard(self, members: list[Member], down: Mapping[str, str], now: float) -> list[Member]:
        """Members of a recently ended scheduler's view whose name is not among ``members``."""
        known = {*down, *(actor_name(one.id) for one in members)}
        former = self._former.values() if now < self._former_until else ()
        return [one for one in former if actor_name(one.id) not in known]

    def _missing(self, members: list[Member], down: Mapping[str, str], now: float) -> list[str]:
        starting = dict.fromkeys(actor_name(one.id) for one in members if one.state == "starting")
        said = [f"{name} {text}" for name, text in down.items()]
        said += [f"{name} is starting" for name in starting if name not in down]
        missed = [name for name, at in self._missed.items() if now < at + MISSED_S]
        return said + [f"{name} is gone" for name in missed if name not in {*down, *starting}]


def _silence(heard_at: float | None, now: float) -> str:
    """Why no scheduler can plan a request; empty if one can."""
    if heard_at is None:
        return "no GlobalScheduler has been heard of yet"
    if now - heard_at >= SILENT_S:
        return f"no GlobalScheduler has been heard of for {now - heard_at:.0f} s"
    return ""


def _why_unservable(members: list[Member]) -> str:
    """Why no placement can serve a request; empty if one can."""
    if pairs(members):
        return ""
    ready = [one for one in members if one.state == "ready"]
    shards = {one.id for one in ready if one.kind == "MemPoolShard"}
    roles = {one.role for one in ready if one.shard in shards}
    if not shards:
        return "no MemPoolShard is ready"
    missing_sides = [
        name for name, side in (("prefill", PREFILLS), ("decode", DECODES)) if not roles & {*side}
    ]
    return (
        f"no {' and no '.join(missing_sides)} worker is ready"
        if missing_sides
        else "no prefill worker reaches a decode worker"
    )
