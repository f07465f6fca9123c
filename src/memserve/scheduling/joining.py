"""The core of a worker that is still starting: learns which incarnation of its shard is alive."""

from __future__ import annotations

import attrs

from memserve.actions import Action, Stop
from memserve.costs import StepCosts
from memserve.identity import ActorId, actor_name
from memserve.messages import Cluster, Gone, Member, Message

SHARD_WAIT_S = 60.0
"""How long a starting worker waits for its shard before it asks to be restarted."""
AT_WORK_S = 10.0
"""How long a worker counts as at work after it last reported requests. Clients pause between their requests, and
a measurement of some seconds that began or ended in such a pause was disturbed all the same."""


@attrs.define
class JoiningCore:
    """The core until the worker's own core takes over. ``shard`` is the configured name."""

    me: ActorId
    shard: str
    found: ActorId | None = None
    """The shard to attach to, once a scheduler lists it as ready."""
    at_work: StepCosts | None = None
    """Step costs of a worker of the shard that had requests within AT_WORK_S, as long as its steps take now; None if
    none had."""
    _at_work_until: float = attrs.field(default=float("inf"), init=False)
    _actions: list[Action] = attrs.field(factory=list, init=False)

    def receive(self, sender: ActorId, message: Message, now: float) -> None:
        """Process one message; only those about members matter yet."""
        match message:
            case Gone(actors) if self.found in actors:
                self._actions.append(Stop(f"the shard {self.found} died while this worker started"))
            case Gone(actors) if self.me in actors:
                self._actions.append(Stop("fenced off: the cluster presumes this worker dead"))
            case Cluster(_, members):
                near = [one for one in members if actor_name(one.shard) == self.shard]
                busy = next((one for one in near if one.costs and _has_requests(one)), None)
                if busy is not None:
                    self.at_work, self._at_work_until = _costs(busy), now + AT_WORK_S
                shards = (one for one in members if one.kind == "MemPoolShard" and one.state == "ready")
                home = next((one.id for one in shards if actor_name(one.id) == self.shard), None)
                self.found = self.found or home

    def advance(self, now: float) -> None:
        """Forget the worker that was at work AT_WORK_S ago."""
        if now >= self._at_work_until:
            self.at_work, self._at_work_until = None, float("inf")

    def take(self) -> list[Action]:
        """The pending actions; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    @property
    def deadline(self) -> float:
        """When the worker that was at work is forgotten; infinity if there is none."""
        return self._at_work_until

    def gauges(self) -> dict[str, float]:
        """No load yet."""
        return {}

    def undeliverable(self, to: ActorId, message: Message, now: float) -> None:
        """Do nothing: this core sends no messages."""


def _costs(worker: Member) -> StepCosts | None:
    """What a worker's steps take, by its own correction of what they took at its start.

    Uncorrected, costs that were measured on a busy machine would keep a worker that adopts them from ever being
    given a request, and so from correcting them.
    """
    return worker.costs and worker.costs.scaled(worker.load.get("step_cost_scale", 1.0))


def _has_requests(worker: Member) -> bool:
    return any(worker.load.get(name) for name in ("requests_running", "requests_waiting"))
