"""How busy a worker is, as its heartbeats say it and schedulers price it."""

from __future__ import annotations

import math
from collections.abc import Collection

import attrs

from memserve.costs import Site, StepCosts
from memserve.engine.plans import BatchPlan
from memserve.engine.sequence import Phase, Sequence
from memserve.messages import ActorId
from memserve.scheduling.cost_fit import Drift
from memserve.scheduling.cost_model import CostModel
from memserve.tokens import count

_TO_RUN = (Phase.WAITING, Phase.READY)
"""Phases in which a prompt is still to be run here."""


def load_of(live: Collection[Sequence], me: ActorId) -> dict[str, float]:
    """Gauges of the sequences that worker ``me`` holds."""
    phases = [one.phase for one in live]
    prompts = [one for one in live if not (one.decoding or one.arriving) and one.phase in _TO_RUN]
    kept = [one for one in live if one.plan.decode == me]
    return {
        "requests_running": float(phases.count(Phase.READY)),
        "requests_waiting": float(phases.count(Phase.WAITING) + phases.count(Phase.ADOPTING)),
        "requests_leaving": float(phases.count(Phase.LEAVING)),
        "waiting_tokens": float(sum(one.to_compute for one in prompts)),
        # Each token to run attends to all before it: the quadratic part of what waits.
        "waiting_pairs": float(
            sum((one.length**2 - (one.length - one.to_compute) ** 2) // 2 for one in prompts)
        ),
        # Streams that are, or will be, continued here, whoever runs their prompt.
        "decode_rows": float(len(kept)),
        "context_tokens": float(sum(one.length for one in kept)),
    }


def swap_least(costs: StepCosts | None, tokens_max: int) -> int:
    """Tokens from which cached pages of slower tiers are worth bringing in; 0 where nothing was measured."""
    return 0 if costs is None else math.ceil(min(CostModel(costs).swap_break_even(), tokens_max))


@attrs.define
class StepWatch:
    """Compares each step with what the worker's figures say: the scale in its heartbeats."""

    drift: Drift = attrs.field(factory=Drift)
    _model: CostModel | None = None
    _predicted_s: float = 0.0
    _prompt_tokens: int = 0
    """Of the step under way."""
    _began: float = 0.0

    def began(self, costs: StepCosts | None, plan: BatchPlan, now: float) -> None:
        """A step begins."""
        if costs is None:
            return
        if self._model is None or self._model.steps is not costs:
            self._model = CostModel(costs)
        rows = [(count(row.tokens), row.start) for row in plan.rows]
        self._predicted_s, self._began = self._model.step_s(rows), now
        self._prompt_tokens = sum(tokens for tokens, _ in rows if tokens > 1)

    def ended(self, now: float, site: Site | None = None, beside: int = 0) -> None:
        """And is over; ``beside`` others of the site had work. What crowding takes is no drift: schedulers reckon with it."""
        crowded = 1.0
        if site is not None and beside and self._model is not None:
            crowded = self._model.steps.crowded(site.slices(beside), self._prompt_tokens > 0)
        self.drift.saw(self._predicted_s * crowded, now - self._began)
        self._prompt_tokens = 0

    def done_tokens(self, now: float) -> float:
        """Prompt tokens of the step under way that are run by now, if it takes as long as it should."""
        expected_s = self._predicted_s * self.drift.scale
        return self._prompt_tokens * min(1.0, (now - self._began) / expected_s) if expected_s else 0.0

    def gauges(self) -> dict[str, float]:
        """1 is as measured at start."""
        return {} if self._model is None else {"step_cost_scale": self.drift.scale}
