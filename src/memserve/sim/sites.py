"""Steps that share the cores of a site: each progresses at the speed that its current share gives it.

As with real workers (:mod:`memserve.engine.cpu_budget`), a step that is alone has all cores. A worker that
comes then waits for that step's end, or for ``GIVE_AFTER_S``. From then on it shares the cores, step after
step, for as long as it has work. So a stream that comes next to another worker's long prompt stops for that
long once, and the prompt is slower while the stream's steps run, not until its own end.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from memserve.costs import GIVE_AFTER_S, Site, StepCosts
from memserve.sim.world import World

BETWEEN_S = 0.02
"""A worker whose last step ended at most this long ago still has work, and keeps its share."""

Done = Callable[[float, float, float], None]
"""Called with a step's seconds, with the number of the site's other steps that ran concurrently, averaged over
the step's work, and with the seconds that it had waited for cores."""


@attrs.define(eq=False)
class _Step:
    site: Site
    worker: str
    prompts: bool
    left_s: float
    """Seconds that the rest of the step takes when it runs alone."""
    work_s: float
    """Seconds that the whole step takes when it runs alone."""
    done: Done
    came: float
    began: float = 0.0
    settled: float = 0.0
    """The time until which its progress is accounted for."""
    others: int = 0
    beside_s: float = 0.0
    """Seconds of its work, each times the number of steps that ran concurrently."""


@attrs.define(eq=False)
class Sites:
    """All steps under way, by site."""

    world: World
    costs: StepCosts
    _under_way: dict[str, list[_Step]] = attrs.field(factory=dict)
    _waiting: dict[str, list[_Step]] = attrs.field(factory=dict)
    _ended: dict[str, dict[str, float]] = attrs.field(factory=dict)
    """When the last step of each worker ended, by site and worker."""

    def begin(self, site: Site | None, worker: str, seconds: float, prompts: bool, done: Done) -> None:
        """Run a step that takes ``seconds`` when it is alone on its site.

        Workers without a site are always alone.
        """
        if site is None:
            self.world.after(seconds, done, seconds, 0.0, 0.0)
            return
        step = _Step(site, worker, prompts, seconds, seconds, done, self.world.now)
        if self._all_taken(site):
            self._waiting.setdefault(site.key, []).append(step)
            self.world.after(GIVE_AFTER_S, self._admit, step)
        else:
            self._join(step)

    def _all_taken(self, site: Site) -> bool:
        """Whether one step has all cores: it is alone, and has been for a while.

        A GPU is shared in time, so no step waits for it.
        """
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
        """Account for the progress until now, at the speeds that held until now."""
        for one in self._under_way.get(site.key, ()):
            worked_s = (self.world.now - one.settled) / self._crowded(one)
            one.left_s -= worked_s
            one.beside_s += worked_s * one.others
            one.settled = self.world.now

    def _time(self, site: Site) -> None:
        """Schedule each step's end, valid as long as no step of the site begins or ends before."""
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
            return  # a later timing has replaced this one
        steps = self._under_way[one.site.key]
        if one not in steps:
            return
        self._settle(one.site)
        steps.remove(one)
        self._ended.setdefault(one.site.key, {})[one.worker] = self.world.now
        self._time(one.site)
        for other in tuple(self._waiting.get(one.site.key, ())):
            self._admit(other)
        neighbours = one.beside_s / one.work_s if one.work_s else 0.0
        one.done(self.world.now - one.began, neighbours, one.began - one.came)
