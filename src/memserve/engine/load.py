"""A worker's load, as its heartbeats report it and schedulers price it."""

from __future__ import annotations

import math
from collections.abc import Collection

import attrs

from memserve.costs import Site, StepCosts
from memserve.engine.plans import BatchPlan
from memserve.engine.sequence import Phase, Sequence
from memserve.identity import ActorId
from memserve.scheduling.cost_fit import Drift
from memserve.scheduling.cost_model import CostModel
from memserve.scheduling.punctuality import Punctuality
from memserve.tokens import count

_TO_RUN = (Phase.WAITING, Phase.READY)
"""Phases in which a prompt still has to run here."""


def load_of(live: Collection[Sequence], me: ActorId, page_tokens: int) -> dict[str, float]:
    """Load gauges over the sequences that worker ``me`` holds."""
    phases = [one.phase for one in live]
    prompts = [one for one in live if not (one.decoding or one.arriving) and one.phase in _TO_RUN]
    to_run = [(one.length, one.to_compute(page_tokens)) for one in prompts]
    kept = [one for one in live if one.plan.decode == me]
    return {
        "requests_running": float(phases.count(Phase.READY)),
        "requests_waiting": float(phases.count(Phase.WAITING) + phases.count(Phase.ADOPTING)),
        "requests_leaving": float(phases.count(Phase.LEAVING)),
        "waiting_tokens": float(sum(missing for _, missing in to_run)),
        # Each token to run attends to all tokens before it: the quadratic part of the waiting work.
        "waiting_pairs": float(sum((length**2 - (length - missing) ** 2) // 2 for length, missing in to_run)),
        # Streams that decode here, or will, whichever worker runs their prompt.
        "decode_rows": float(len(kept)),
        "context_tokens": float(sum(one.length for one in kept)),
    }


def swap_least(costs: StepCosts | None, tokens_max: int) -> int:
    """Least number of cached tokens in slower tiers for which a swap-in pays; 0 without measured costs."""
    return 0 if costs is None else math.ceil(min(CostModel(costs).swap_break_even(), tokens_max))


@attrs.define
class StepWatch:
    """Compares steps with the worker's cost figures, and first tokens with the plans' predictions.

    The results are gauges in the worker's heartbeats.
    """

    drift: Drift = attrs.field(factory=Drift)
    """Of steps of streams; of all steps until the first one of those."""
    prompt_drift: Drift = attrs.field(factory=Drift)
    """Of steps with prompt tokens, beyond ``drift``. Figures from a busy machine are wrong in shape, too: a short step
    is disturbed more than a long one. Streams, whose steps are many, would set one scale for both."""
    punctuality: Punctuality = attrs.field(factory=Punctuality)
    _model: CostModel | None = None
    _predicted_s: float = 0.0
    _prompt_tokens: int = 0
    """Prompt tokens in the running step."""
    _prompt_pairs: float = 0.0
    _began: float = 0.0
    _streamed: bool = False
    """Whether it has seen a step of streams alone."""
    _foreseen: bool = True
    """Whether the cost figures cover the running step.

    They cover neither prompt log probabilities nor the tokens that grammars add to drafts.
    """

    def began(self, costs: StepCosts | None, plan: BatchPlan, now: float) -> None:
        """Record the start of a step and predict its duration."""
        if costs is None:
            return
        self.drift.begin(costs.rough, now)
        if self._model is None or self._model.steps is not costs:
            self._model = CostModel(costs)
        rows = [(count(row.tokens), row.start) for row in plan.rows]
        drafts = [(count(row.draft), row.end) for row in plan.rows if row.draft]
        self._foreseen = not any(row.score is not None or row.draft_most for row in plan.rows)
        self._predicted_s, self._began = self._model.step_s(rows, drafts), now
        self._prompt_tokens = sum(tokens for tokens, _ in rows if tokens > 1)
        self._prompt_pairs = sum(tokens * (start + tokens / 2) for tokens, start in rows if tokens > 1)

    def ended(
        self, now: float, site: Site | None = None, neighbours: float = 0.0, waited_s: float = 0.0
    ) -> None:
        """Record the end of the step; ``neighbours`` other workers of the site had work.

        It had no core for ``waited_s``. Slowdown by crowding is not drift, nor is waiting for the end of a
        neighbour's step: the scheduler prices them. With more workers than cores each step waits, and crowding
        includes that.
        """
        crowded = 1.0
        if site is not None and neighbours and self._model is not None:
            crowded = self._model.steps.crowded(site.slices(neighbours), self._prompt_tokens > 0)
        if site is None or neighbours + 1.0 > site.cores:
            waited_s = 0.0
        if self._foreseen:
            self._saw(self._predicted_s * crowded, now - self._began - waited_s, now)
        self._prompt_tokens, self._prompt_pairs = 0, 0.0

    def _saw(self, predicted_s: float, seconds: float, now: float) -> None:
        if self._prompt_tokens and self._streamed:
            self.prompt_drift.saw(self.drift.scale(self._began) * predicted_s, seconds, now)
        else:
            self._streamed = not self._prompt_tokens
            self.drift.saw(predicted_s, seconds, now)

    def _prompt_scale(self, now: float) -> float:
        return self.drift.scale(now) * self.prompt_drift.scale(now)

    def under_way(self, load: dict[str, float], now: float) -> dict[str, float]:
        """The gauges of :func:`load_of`, less what a running prompt step should have computed by ``now``.

        ``step_tokens`` of the ``waiting_tokens`` belong to that step, which should end in ``step_left_s``
        seconds; it reads all weights however few of its tokens are left. None of the ``waiting_pairs`` belong
        to it.
        """
        expected_s = self._predicted_s * self._prompt_scale(self._began)
        if not self._prompt_tokens or not expected_s:
            return load
        left_s = max(0.0, expected_s - (now - self._began))
        left = self._prompt_tokens * left_s / expected_s
        waiting = load["waiting_tokens"] - self._prompt_tokens + left
        return {
            **load,
            "waiting_tokens": max(0.0, waiting),
            "waiting_pairs": max(0.0, load["waiting_pairs"] - self._prompt_pairs),
            "step_tokens": min(left, max(0.0, waiting)),
            "step_left_s": left_s,
        }

    def gauges(self, costs: StepCosts | None, now: float) -> dict[str, float]:
        """Drift and lateness gauges: a scale of 1 is as measured at start, a share of 0 is as predicted."""
        late = {"first_tokens_late_share": self.punctuality.share(now)}
        if costs is None:
            return late
        self.drift.begin(costs.rough, now)
        scales = {"step_cost_scale": self.drift.scale(now), "prompt_cost_scale": self._prompt_scale(now)}
        return {**scales, **late}
