"""The settings that all hosts of a cluster must share, and the ownership of names.

The scheduler compares them at registration, before it places anything on an actor. A worker with other
weights, another data type or another page size would continue a stream with tokens that the cluster's model
never gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import UNSET, UnsetType

from memserve.identity import actor_name
from memserve.messages import Member

Terms = dict[str, str]
"""Settings by their keys; ``model.path`` stands for the content of its files."""


def disagreement(ours: Terms | UnsetType, theirs: Terms | UnsetType) -> str:
    """Why two hosts do not belong to one cluster, in words for the one that joins; empty if they do."""
    if ours is UNSET or theirs is UNSET:
        return "" if ours is theirs else "one of the two hosts has no [cluster]"
    return "\n".join(_differences(ours, theirs))


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterable[str]:
    for key, value in ours.items():
        mine = theirs.get(key, "nothing")
        if mine != value:
            yield f"{key} must be the same on all hosts of the cluster: {value} on the scheduler's, not {mine}"


def name_taken(members: Iterable[Member], member: Member) -> str:
    """Why a newcomer cannot have its name: an actor of another host has it. Empty if it can."""
    name = actor_name(member.id)
    for one in members:
        if actor_name(one.id) == name and one.host != member.host:
            return f"the name {name} is taken by an actor of the host {one.host}: choose another on {member.host}"
    return ""
