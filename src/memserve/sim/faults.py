"""The faults of a run, drawn from its seed: they happen until ``heals_at``, and never after."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import attrs

from memserve.errors import UserError
from memserve.sim.clients import Call
from memserve.sim.cluster import SimCluster
from memserve.sim.world import Actor

KINDS = ("delay", "loss", "duplication", "partition", "crash", "pause", "slow", "damage", "cancel", "tear")
"""``delay``: messages are late by up to half a second. ``loss``, ``duplication``: any message may be lost or
arrive twice. ``partition``: some actors cannot reach the others. ``crash``: SIGKILL of any kind of actor.
``pause``: SIGSTOP, for less or more time than it takes to be declared dead. ``slow``: a worker's steps take
many times as long. ``damage``: pages on disk do not read back as they were written. ``cancel``: clients
leave. ``tear``: transfers between shards break off."""


def parse(words: str) -> tuple[str, ...]:
    """The kinds that ``words`` names: ``all``, ``none``, or kinds separated by commas. Raises UserError."""
    if words in ("all", "none"):
        return KINDS if words == "all" else ()
    chosen = tuple(word.strip() for word in words.split(","))
    unknown = [word for word in chosen if word not in KINDS]
    if unknown:
        raise UserError(f"--faults must be all, none or of {', '.join(KINDS)}, not {unknown[0]!r}")
    return chosen


@attrs.define(eq=False)
class Faults:
    """Draws the faults of one run and makes them happen. Everything is healed at ``heals_at`` seconds."""

    cluster: SimCluster
    random: random.Random
    kinds: tuple[str, ...]
    heals_at: float
    happened: dict[str, int] = attrs.field(factory=dict)

    def arrange(self) -> None:
        """Set up or schedule everything that will go wrong."""
        rng, network = self.random, self.cluster.world.network
        if "delay" in self.kinds:
            network.slow_share = rng.choice((0.0, 0.02, 0.2))
        if "loss" in self.kinds:
            network.loss = rng.choice((0.0, 0.002, 0.02, 0.1))
        if "duplication" in self.kinds:
            network.duplication = rng.choice((0.0, 0.02, 0.2))
        if "damage" in self.kinds:
            share = rng.choice((0.0, 0.1))
            self.cluster.damaged = lambda slot: not self.healed and rng.random() < share
        if "slow" in self.kinds:
            self._some(2, self._slow)
        if "crash" in self.kinds:
            self._some(4, self._crash)
        if "pause" in self.kinds:
            self._some(2, self._pause)
        if "partition" in self.kinds:
            self._some(2, self._partition)
        if "tear" in self.kinds:
            broken = rng.choice((0.0, 0.1, 0.5))
            self.cluster.movers.breaks = lambda: not self.healed and rng.random() < broken
        self.cluster.world.at(self.heals_at, self._heal)

    def patience(self, call: Call) -> float | None:
        """Seconds until this client leaves; None for a client that stays."""
        if "cancel" not in self.kinds or self.healed or self.random.random() > 0.15:
            return None
        return self.random.random() * self.random.choice((0.05, 0.5, 5.0))

    @property
    def healed(self) -> bool:
        """Whether faults have ended."""
        return self.cluster.world.now >= self.heals_at

    # ---- one of each ---------------------------------------------------------------------------------------

    def _some(self, most: int, fault: Callable[[], None]) -> None:
        for _ in range(self.random.randint(0, most)):
            self.cluster.world.at(self.random.random() ** 2 * self.heals_at, fault)

    def _any(self, names: Iterable[str]) -> Actor | None:
        name = self.random.choice(list(names))
        return self.cluster.world.actors.get(name)

    def _count(self, kind: str) -> None:
        self.happened[kind] = self.happened.get(kind, 0) + 1

    def _crash(self) -> None:
        actor = self._any(self.cluster.names)
        if actor is not None:
            self._count("crash")
            self.cluster.kill(actor)

    def _pause(self) -> None:
        actor = self._any(self.cluster.names)
        if actor is None or actor.paused:
            return
        self._count("pause")
        world = self.cluster.world
        world.pause(actor)
        seconds = self.random.choice((0.3, 3.0, 7.0, 14.0)) * (0.5 + self.random.random() / 2)
        world.after(seconds, world.resume, actor)

    def _partition(self) -> None:
        names = self.cluster.names
        cut = {name for name in names if self.random.random() < 0.3} or {self.random.choice(names)}
        self._count("partition")
        network = self.cluster.world.network
        network.cut |= cut
        self.cluster.world.after(self.random.random() * 8.0, network.cut.difference_update, cut)

    def _slow(self) -> None:
        actor = self._any(worker.name for worker in self.cluster.layout.workers)
        if actor is None:
            return
        self._count("slow")
        actor.slowness = self.random.choice((3.0, 30.0))
        self.cluster.world.after(self.random.random() * 5.0, setattr, actor, "slowness", 1.0)

    def _heal(self) -> None:
        world = self.cluster.world
        world.note("healed")
        world.network.heal()
        for actor in list(world.actors.values()):
            actor.slowness = 1.0
            world.resume(actor)
