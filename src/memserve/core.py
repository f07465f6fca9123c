"""What every actor's core is to the shell that runs it, and to the simulator."""

from __future__ import annotations

from typing import Any, Protocol

from memserve.actions import Action
from memserve.identity import ActorId
from memserve.messages import Message


class Core(Protocol):
    """The part of an actor that decides: messages and time in, actions out.

    It has no sockets, clock, randomness, threads or arrays inside.
    """

    def receive(self, sender: ActorId, message: Any, now: float) -> None:
        """Process one message; never blocks."""

    def advance(self, now: float) -> None:
        """Let time pass: fire deadlines, form batches."""

    def take(self) -> list[Action]:
        """Messages to send and work to run; each is returned once."""

    @property
    def deadline(self) -> float:
        """When ``advance`` must be called next; infinity if nothing waits for time."""

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Handle a message that the shell could not send."""

    def gauges(self) -> dict[str, float]:
        """Load and counters, with units in the names; ``_total`` ones only grow."""
