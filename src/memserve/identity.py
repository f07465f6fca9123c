"""Who an actor is."""

from __future__ import annotations

from typing import NewType

ActorId = NewType("ActorId", str)
"""``name.incarnation``: two runs of one actor never share an id, so that the old one can be fenced off."""


def actor_name(actor: ActorId) -> str:
    """The configured name within an actor id."""
    return actor.rpartition(".")[0]
