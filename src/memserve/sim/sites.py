"""Steps that share the cores of a site: each goes on at the speed that its share of the moment gives it.

As real workers do (:mod:`memserve.engine.cores`), a step gives cores to a neighbour that begins one, and gets them back when that
one is over. So a stream that comes beside another worker's long prompt has its core at once, and the prompt is slower for
as long as the stream's steps take, not to its end.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memserve.costs import Site, StepCosts
from memserve.sim.world import World

Done = Callable[[float, float], None]
"""Called with a step's seconds and with how many others of its site were in a step beside it, on average over its work."""


@attrs.define(eq=False)
class _Step:
    site: Site
    prompts: bool
    left_s: float
    """Seconds that the rest of it takes alone."""
    work_s: float
    """And all of it."""
    began: float
    settled: float
    """Until when it is accounted for."""
    done: Done
    others: int = 0
    beside_s: float = 0.0
    """Seconds of its work times the others that were beside it."""


@attrs.define(eq=False)
class Sites:
    """All steps under way, by site."""

    world: World
    costs: StepCosts
    _under_way: dict[str, list[_Step]] = attrs.field(factory=dict)

    def begin(self, site: Site | None, seconds: float, prompts: bool, done: Done) -> None:
        """Run a step that takes ``seconds`` where nobody else is in one. Workers without a site have their own."""
        if site is None:
            self.world.after(seconds, done, seconds, 0.0)
            return
        now = self.world.now
        self._settle(site)
        step = _Step(site, prompts, seconds, seconds, now, now, done)
        self._under_way.setdefault(site.key, []).append(step)
        self._time(site)

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
        self._time(one.site)
        one.done(self.world.now - one.began, one.beside_s / one.work_s if one.work_s else 0.0)
