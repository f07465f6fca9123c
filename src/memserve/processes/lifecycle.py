"""The supervisor's decisions: which actors there are, when to restart, how to drain, when to stop.

These are plain values and classes: the time is passed in, and nothing here touches a process.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable

import attrs

from memserve.config import Resolved
from memserve.settings.sections import WorkerConfig

STATUS_DRAINED = 0
STATUS_CRASHED = 1
STATUS_USER_ERROR = 2
STATUS_RESTART = 3
"""Nothing is broken here, but this incarnation is of no more use: start a successor."""


BEAT_S = 2.0
"""Interval at which an actor reports to its supervisor that its event loop turns."""
HUNG_S = 10.0
"""Silence after which a ready actor is presumed hung: stopped, deadlocked, or swapped out for good."""
HUNG_STARTING_S = 120.0
"""The same limit while an actor starts: imports and large allocations block its loop for long."""


@attrs.frozen
class ActorSpec:
    """The name and kind of one configured actor."""

    name: str
    kind: str


def worker_spec(worker: WorkerConfig) -> ActorSpec:
    """The actor of a configured worker."""
    return ActorSpec(worker.name, "PrefillWorker" if worker.role == "prefill" else "DecodeWorker")


def roster(resolved: Resolved) -> tuple[ActorSpec, ...]:
    """Every actor that the configuration asks for."""
    config = resolved.config
    return (
        *(ActorSpec(name, "GlobalScheduler") for name in resolved.scheduler_names),
        *(ActorSpec(shard.name, "MemPoolShard") for shard in config.shard),
        *map(worker_spec, config.worker),
        *(ActorSpec(name, "Frontend") for name in resolved.frontend_names),
    )


@attrs.frozen
class Restart:
    """What to do about a death."""

    delay_s: float
    looping: bool
    """Whether the actor is in a crash loop: it is restarted with the longest delay until it stays alive."""
    newly_looping: bool
    """Whether this death began a crash loop, which is when the user is informed."""


@attrs.define
class RestartPolicy:
    """When to restart one actor: at once the first time, with growing delays while it keeps dying.

    A crash loop is ``loop_deaths`` deaths within ``loop_window_s``, or as many in a row in which the actor
    was never ready, however long each of these starts took.
    """

    first_s: float = 0.2
    """Delay after a second death in a row; doubled with each further one."""
    slowest_s: float = 10.0
    healthy_s: float = 30.0
    """Having been ready for this long clears an actor's record."""
    loop_deaths: int = 5
    loop_window_s: float = 30.0
    _in_a_row: int = attrs.field(init=False, default=0)
    _never_ready: int = attrs.field(init=False, default=0)
    """How many of the latest deaths in a row came before the actor was ready."""
    _recent: deque[float] = attrs.field(init=False, factory=deque)
    """Times of the last ``loop_deaths`` deaths."""
    _looping: bool = attrs.field(init=False, default=False)

    def died(self, ready_s: float, now: float) -> Restart:
        """Record a death. ``ready_s`` is how long the actor had been ready, 0 if it never was."""
        if ready_s >= self.healthy_s:
            self._in_a_row, self._looping = 0, False
            self._recent.clear()
        self._in_a_row += 1
        self._never_ready = 0 if ready_s else self._never_ready + 1
        self._recent.append(now)
        if len(self._recent) > self.loop_deaths:
            self._recent.popleft()
        quick = len(self._recent) == self.loop_deaths and now - self._recent[0] <= self.loop_window_s
        loops = quick or self._never_ready >= self.loop_deaths
        newly = loops and not self._looping
        self._looping |= loops
        # The exponent is bounded to keep the float from overflowing: an actor may die a thousand times.
        growing = self.first_s * 2.0 ** min(self._in_a_row - 2, 32)
        delay_s = min(self.slowest_s, growing) if self._in_a_row > 1 else 0.0
        return Restart(self.slowest_s if self._looping else delay_s, self._looping, newly)


WORKER_KINDS = ("PrefillWorker", "DecodeWorker")
DRAIN_ORDER = (("Frontend",), WORKER_KINDS, ("MemPoolShard",), ("GlobalScheduler",))
"""Order of draining.

Each stage needs the later ones while it drains: requests need workers, workers need pages, and all need a
scheduler.
"""


def drain_stages(actors: Iterable[ActorSpec]) -> list[list[ActorSpec]]:
    """The actors in the order in which they are drained; those of one stage drain together."""
    everyone = list(actors)
    stages = [[actor for actor in everyone if actor.kind in kinds] for kinds in DRAIN_ORDER]
    return [stage for stage in stages if stage]


@attrs.define
class StopSignals:
    """The meaning of a signal: the first drains, a later one stops at once."""

    echo_s: float = 0.5
    """Further signals within this time echo the first: ``timeout`` signals its child, then its group."""
    _first_at: float | None = attrs.field(init=False, default=None)

    def received(self, now: float) -> str:
        """``drain``, ``stop`` or ``ignore``, for a signal at time ``now``."""
        if self._first_at is None:
            self._first_at = now
            return "drain"
        return "stop" if now - self._first_at > self.echo_s else "ignore"


def process_title(name: str, runtime_dir: object) -> str:
    """What process listings and /proc show as the command line of an actor, or of a ``zygote``."""
    return f"memserve {name} {runtime_dir}"


def describe_end(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        names = {one.value: one.name for one in signal.Signals}
        return f"was killed by {names.get(-returncode, f'signal {-returncode}')}"
    known = {STATUS_DRAINED: "ended by itself", STATUS_RESTART: "lost its shard or was fenced off"}
    return known.get(returncode, f"ended with status {returncode}")
