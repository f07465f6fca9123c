"""Changes to a running worker that an operator or a scheduler wants: another role, or drain and leave.

A change is a wanted state, not an event: it may be sent any number of times, and it is in force when the
scheduler's view of the cluster shows it. Only the worker changes itself. Placements follow what it reports,
and requests under way keep their plans.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from memserve.errors import RequestFailed
from memserve.identity import actor_name
from memserve.messages import Change, Member
from memserve.scheduling.membership import pairs

HAND = "hand"
SCHEDULER = "scheduler"
"""The two sources of roles. An operator's choice stays until the operator gives the role back (``auto``)."""


def changed(member: Member, change: Change) -> Member:
    """The worker as the change wants it; ``member`` itself if it is so already."""
    if change.drain:
        member = attrs.evolve(member, state="draining")
    if not change.role or (change.by == SCHEDULER and member.role_by == HAND):
        return member
    if change.role == "auto":
        return attrs.evolve(member, role=member.role_configured or member.role, role_by="")
    return attrs.evolve(member, role=change.role, role_by=change.by)


def find_worker(name: str, change: Change, members: Iterable[Member]) -> Member:
    """The worker named in a change.

    Raises RequestFailed: 404 ``worker_not_found``, 409 ``worker_not_ready``, or 409 ``no_pair_left`` if
    afterwards no worker could prefill or none could decode.
    """
    everyone = list(members)
    workers = {actor_name(one.id): one for one in everyone if one.role}
    worker = workers.get(name)
    if worker is None:
        known = ", ".join(sorted(workers)) or "none"
        raise RequestFailed(
            "worker_not_found", f"no worker is called {name[:100]!r}; there are: {known}", 404
        )
    wanted = changed(worker, change)
    if wanted == worker:
        return worker
    if worker.state != "ready":
        text = f"{name} is {worker.state}; only a ready worker can be changed, try again when it is"
        raise RequestFailed("worker_not_ready", text, 409, retry_after_s=1.0)
    if pairs(everyone) and not pairs([wanted if one is worker else one for one in everyone]):
        text = (
            f"without {name} as {worker.role}, no worker could prefill, or none decode, on a common shard; change"
            " or add another worker first"
        )
        raise RequestFailed("no_pair_left", text, 409)
    return worker


def incarnations(name: str, members: Iterable[Member]) -> list[Member]:
    """The worker of this name: one member; none where it is gone, or two that different schedulers list."""
    return [one for one in members if one.role and actor_name(one.id) == name]


def in_force(name: str, change: Change, members: Iterable[Member], expected: bool = False) -> bool:
    """Whether the view shows the change of the worker called ``name``.

    A worker that has left was drained, unless it is ``expected`` back: then it died before it drained.
    """
    found = incarnations(name, members)
    return all(changed(one, change) == one for one in found) if found else change.drain and not expected
