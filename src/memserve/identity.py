"""Ids and names of actors."""

from __future__ import annotations

from typing import NewType

ActorId = NewType("ActorId", str)
"""``name.incarnation``: two runs of one actor never share an id, so the earlier run can be fenced off."""


def actor_name(actor: ActorId) -> str:
    """The configured name in an actor id."""
    return actor.rpartition(".")[0]
