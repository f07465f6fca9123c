"""The network of a simulated cluster: how long each message takes, and what happens to it on the way.

Messages of a pair arrive in order, as on one connection. A lost one leaves a gap. A duplicate arrives later
than the original and may be overtaken: ZeroMQ does less, a repeated message may do as much.
"""

from __future__ import annotations

import random

import attrs

from memserve.messages import Message, decode, encode


@attrs.frozen
class LinkCosts:
    """Latencies of a healthy network, in seconds."""

    least_s: float = 0.0001
    """Least latency of a message between two actors."""
    spread_s: float = 0.0001
    """Mean of the exponential draws added to it: one per pair of actors, and one more per message."""


@attrs.define(eq=False)
class Network:
    """Carries messages between actors, named without their incarnations."""

    random: random.Random
    costs: LinkCosts = LinkCosts()
    through_codec: bool = False
    """Encode and decode every message: what arrives is what the wire can carry."""
    loss: float = 0.0
    """Share of messages that never arrive."""
    duplication: float = 0.0
    """Share of messages that arrive twice."""
    slow_share: float = 0.0
    """Share of messages that are late by up to ``slow_s``; those behind them wait."""
    slow_s: float = 0.5
    cut: set[str] = attrs.field(factory=set)
    """Names on one side of a partition; nothing passes between them and the others."""
    lost: int = 0
    duplicated: int = 0
    _base: dict[tuple[str, str], float] = attrs.field(factory=dict)
    _last: dict[tuple[str, str], float] = attrs.field(factory=dict)

    def heal(self) -> None:
        """End all faults: from now on nothing goes wrong."""
        self.loss = self.duplication = self.slow_share = 0.0
        self.cut.clear()

    def carry(self, sender: str, to: str, message: Message, now: float) -> list[tuple[float, Message]]:
        """The arrivals of a message as (time, message): none, one or two."""
        if (sender in self.cut) != (to in self.cut) or (self.loss and self.random.random() < self.loss):
            self.lost += 1
            return []
        carried = decode(*encode(message)) if self.through_codec else message
        arrival = max(now + self._delay(sender, to), self._last.get((sender, to), 0.0))
        self._last[sender, to] = arrival
        arrivals = [(arrival, carried)]
        if self.duplication and self.random.random() < self.duplication:
            self.duplicated += 1
            arrivals.append((arrival + self.random.random() * 2.0, carried))
        return arrivals

    def _delay(self, sender: str, to: str) -> float:
        base = self._base.get((sender, to))
        if base is None:
            base = self.costs.least_s + self.random.expovariate(1.0) * self.costs.spread_s
            self._base[sender, to] = base
        delay = base + self.random.expovariate(1.0) * self.costs.spread_s
        if self.slow_share and self.random.random() < self.slow_share:
            delay += self.random.random() * self.slow_s
        return delay
