"""The cluster as a Frontend knows it: who is there by the schedulers' word, and whether a request could be served now."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import attrs

from memserve.identity import ActorId, actor_name
from memserve.messages import Cluster, Member
from memserve.scheduling.membership import DECODES, PREFILLS, pairs

MISSED_S = 60.0
"""Who died and has no successor is missed for so long, unless a supervisor goes on naming it: a joined worker may have left."""
SILENT_S = 3.0
"""A scheduler sends its view each second; after so long without one, none is taken for there."""
RECOVERING_S = 2.0
"""So long a scheduler's successor may not have heard from those whom it knew, and they count as there: heartbeats come each second."""


@attrs.frozen
class Health:
    """What ``/health`` says."""

    status: str
    """``ok``; ``degraded``: requests are served, something is missing; ``unavailable``: none could be served now."""
    reason: str = ""
    """What is missing; empty with ``ok``."""

    @property
    def serves(self) -> bool:
        """Whether a request sent now could be served."""
        return self.status != "unavailable"


@attrs.define
class ClusterView:
    """Everyone alive, by the newest word of each scheduler, and whoever is missed."""

    _seen: dict[ActorId, dict[ActorId, Member]] = attrs.field(factory=dict)
    _heard_at: float | None = None
    """When a scheduler was heard of last."""
    _missed: dict[str, float] = attrs.field(factory=dict)
    """When actors died that have no successor yet that is ready, by name."""
    _former: dict[ActorId, Member] = attrs.field(factory=dict)
    """What a scheduler that ended had said: its successor begins with nobody, while everyone goes on serving."""
    _former_until: float = 0.0

    def members(self) -> list[Member]:
        """Everyone alive."""
        found: dict[ActorId, Member] = {}
        for view in self._seen.values():
            found |= view
        return list(found.values())

    def heard(self, view: Cluster, now: float) -> list[ActorId]:
        """Take a scheduler's word in; returns the earlier incarnations of it, which know nothing newer and are forgotten."""
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
        """These are dead. One that was leaving is not missed, nor one whose successor is there."""
        self._missed = {name: at for name, at in self._missed.items() if now < at + MISSED_S}
        known = {one.id: one for one in self.members()}
        for actor in actors:
            self._forget(actor, now)
        for view in (*self._seen.values(), self._former):
            for actor in actors:
                view.pop(actor, None)
        alive = {actor_name(one.id) for one in self.members() if one.state == "ready"}
        for actor in actors:
            was = known.get(actor)  # none, of one whose death is told again
            if was is not None and was.state != "draining" and actor_name(actor) not in alive:
                self._missed.setdefault(actor_name(actor), now)

    def _forget(self, scheduler: ActorId, now: float) -> None:
        """This one, if it is a scheduler, says nothing any more; who was there by its word still is, for a while."""
        if scheduler in self._seen:
            before = self._former if now < self._former_until else {}
            self._former, self._former_until = before | self._seen.pop(scheduler), now + RECOVERING_S

    def health(self, me: Member, down: Mapping[str, str], now: float) -> Health:
        """Whether Frontend ``me`` could serve a request now. ``down``: what its supervisor says of actors that do not live."""
        if me.state != "ready":
            return Health("unavailable", f"{actor_name(me.id)} is {me.state}")
        members = [one for one in self.members() if actor_name(one.id) not in down]
        missing = self._missing(members, down, now)
        silent = _silence(self._heard_at, now)
        lacking = silent or _lacking(members)
        if lacking and not silent and not _lacking(members + self._unheard(members, down, now)):
            missing.append("a scheduler that has just started is hearing from everyone anew")
        elif lacking:
            return Health("unavailable", "; ".join((lacking, *missing)))
        return Health("degraded", "; ".join(missing)) if missing else Health("ok")

    def _unheard(self, members: list[Member], down: Mapping[str, str], now: float) -> list[Member]:
        """Who was there by the word of a scheduler that ended just now, and has nobody of its name among ``members``."""
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
    """Why nobody can plan a request, if so."""
    if heard_at is None:
        return "no GlobalScheduler has been heard of yet"
    if now - heard_at >= SILENT_S:
        return f"no GlobalScheduler has been heard of for {now - heard_at:.0f} s"
    return ""


def _lacking(members: list[Member]) -> str:
    """Why no placement can serve a request, if so."""
    if pairs(members):
        return ""
    ready = [one for one in members if one.state == "ready"]
    shards = {one.id for one in ready if one.kind == "MemPoolShard"}
    roles = {one.role for one in ready if one.shard in shards}
    if not shards:
        return "no MemPoolShard is ready"
    lack = [name for name, side in (("prefill", PREFILLS), ("decode", DECODES)) if not roles & {*side}]
    return (
        f"no {' and no '.join(lack)} worker is ready" if lack else "no prefill worker reaches a decode worker"
    )
