"""Steps that share the cores of a site: each goes on at the speed that its share of the moment gives it.

As with real workers (:mod:`memserve.engine.cpu_budget`), a step that is alone has all cores. Who comes then waits for its end, or for
``GIVE_AFTER_S``, and shares them from then on, from step to step, for as long as it has work. So a stream that comes beside
another worker's long prompt stops for so long once, and the prompt is slower for as long as the stream's steps take, not to its end.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memserve.costs import GIVE_AFTER_S, Site, StepCosts
from memserve.sim.world import World

BETWEEN_S = 0.02
"""A worker whose last step ended so recently has work still, and keeps its share."""

Done = Callable[[float, float], None]
"""Called with a step's seconds and with how many others of its site were in a step beside it, on average over its work."""


@attrs.define(eq=False)
class _Step:
    site: Site
    worker: str
    prompts: bool
    left_s: float
    """Seconds that the rest of it takes alone."""
    work_s: float
    """And all of it."""
    done: Done
    began: float = 0.0
    settled: float = 0.0
    """Until when it is accounted for."""
    others: int = 0
    beside_s: float = 0.0
    """Seconds of its work times the others that were beside it."""


@attrs.define(eq=False)
class Sites:
    """All steps under way, by site."""

    world: World
    costs: StepCosts
    _under_way: dict[str, list[_Step]] = attrs.field(factory=dict)
    _waiting: dict[str, list[_Step]] = attrs.field(factory=dict)
    _ended: dict[str, dict[str, float]] = attrs.field(factory=dict)
    """When the last step of each worker ended, by site."""

    def begin(self, site: Site | None, worker: str, seconds: float, prompts: bool, done: Done) -> None:
        """Run a step that takes ``seconds`` where nobody else is in one. Workers without a site have their own."""
        if site is None:
            self.world.after(seconds, done, seconds, 0.0)
            return
        step = _Step(site, worker, prompts, seconds, seconds, done)
        if self._all_taken(site):
            self._waiting.setdefault(site.key, []).append(step)
            self.world.after(GIVE_AFTER_S, self._admit, step)
        else:
            self._join(step)

    def _all_taken(self, site: Site) -> bool:
        """Whether one step has all cores: it is alone, and was so for a while. A GPU is shared in time, and nobody waits."""
        steps = self._under_way.get(site.key, ())
        if len(steps) != 1 or not site.threads >= site.cores > 1:
            return False
        ended = self._ended.get(site.key, {})
        return all(self.world.now - at > BETWEEN_S for name, at in ended.items() if name != steps[0].worker)

    def _admit(self, step: _Step) -> None:
        waiting = self._waiting[step.site.key]
        if step in waiting:
            waiting.remove(step)
            self._join(step)

    def _join(self, step: _Step) -> None:
        step.began = step.settled = self.world.now
        self._settle(step.site)
        self._under_way.setdefault(step.site.key, []).append(step)
        self._time(step.site)

    def _settle(self, site: Site) -> None:
        """Account for what has been done until now, at the speeds until now."""
        for one in self._under_way.get(site.key, ()):
            worked_s = (self.world.now - one.settled) / self._crowded(one)
            one.left_s -= worked_s
            one.beside_s += worked_s * one.others
            one.settled = self.world.now

    def _time(self, site: Site) -> None:
        """When each will end, if nobody begins or ends one before."""
        steps = self._under_way[site.key]
        for one in steps:
            one.others = len(steps) - 1
            self.world.after(
                max(0.0, one.left_s) * self._crowded(one), self._end, one, one.others, one.left_s
            )

    def _crowded(self, one: _Step) -> float:
        return self.costs.crowded(one.site.slices(one.others), one.prompts)

    def _end(self, one: _Step, others: int, left_s: float) -> None:
        if (one.others, one.left_s) != (others, left_s):
            return  # timed anew meanwhile
        steps = self._under_way[one.site.key]
        if one not in steps:
            return
        self._settle(one.site)
        steps.remove(one)
        self._ended.setdefault(one.site.key, {})[one.worker] = self.world.now
        self._time(one.site)
        for other in tuple(self._waiting.get(one.site.key, ())):
            self._admit(other)
        one.done(self.world.now - one.began, one.beside_s / one.work_s if one.work_s else 0.0)
