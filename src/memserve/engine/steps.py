"""The steps that a worker's engine has: the running one and, where the engine overlaps steps, the next one.

A GPU runs what the host launches. Between two steps the host reads the draws, the core decides, messages are
sent, and the GPU waits. An engine that overlaps steps is given the next step while one runs. The tokens that
the running step draws are unknown then: a row of the next step names the row that it follows, and the engine
fills in the token on the device. A stream that ends with that token has run one row too many, whose result is
ignored; its pages are freed once that row has ended.

Of a row with penalties or a grammar, only the draw depends on the token before it, not what it runs. The
engine launches it like the others and draws late: once the token is known, and while the device runs the row.
A draw that the engine cannot make on the device alone comes back as a void row, and is made again in a step
that is not followed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Values

import attrs

from memserve.costs import Site, StepCosts
from memserve.engine.batching import Batch, WorkerSettings, form_batch
from memserve.engine.drafting import Drafting
from memserve.engine.load import StepWatch
from memserve.engine.plans import BatchResult
from memserve.engine.sequence import Sequence
from memserve.identity import ActorId

AHEAD = 2
"""Unfinished steps that an overlapping engine has at most."""


@attrs.define
class Steps:
    """Forms a worker's steps, and holds those that have not ended."""

    me: ActorId
    settings: WorkerSettings
    drafting: Drafting
    watch: StepWatch
    _given: deque[Batch] = attrs.field(factory=deque, init=False)
    _number: int = attrs.field(default=0, init=False)
    """Number of the latest step."""

    @property
    def idle(self) -> bool:
        """Whether the engine has no step."""
        return not self._given

    def next(self, ready: Values[Sequence], costs: StepCosts | None, now: float) -> Batch | None:
        """Form the step to give to the engine now and record it as given; None if there is none to give."""
        batch = self._formed(ready)
        if batch is None:
            return None
        batch = self.drafting.added(batch, costs)
        if self.settings.overlaps:
            batch = attrs.evolve(batch, plan=attrs.evolve(batch.plan, followed=_may_be_followed(batch)))
        if self.idle:
            self.watch.began(costs, batch.plan, now)
        self._number += 1
        self._given.append(batch)
        for number, (one, row) in enumerate(zip(batch.sequences, batch.plan.rows, strict=True)):
            one.launched(self._number, number, row)
        return batch

    def ended(self, result: BatchResult, site: Site | None, costs: StepCosts | None, now: float) -> Batch:
        """Record that the step given first has ended; returns it."""
        assert self._given, "a step has ended that was never given"
        batch = self._given.popleft()
        number = self._number - len(self._given)
        for one in batch.sequences:
            if one.flight is not None and one.flight.step == number:
                one.flight = None
        self.watch.ended(now, site, result.neighbours, result.waited_s)
        self.drafting.saw(batch, result)
        if self._given:
            self.watch.began(costs, self._given[0].plan, now)
        return batch

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._given) <= (AHEAD if self.settings.overlaps else 1), "too many steps"
        for batch in self._given:
            assert len({id(one) for one in batch.sequences}) == len(batch.sequences), "a sequence twice"
            assert all(one.flight is not None for one in batch.sequences), "a row whose sequence was let go"

    def _formed(self, ready: Values[Sequence]) -> Batch | None:
        limits, page_tokens = self.settings.limits, self.settings.page_tokens
        if self.idle:
            return form_batch(ready, limits, page_tokens)
        if not self._given[-1].plan.followed or len(self._given) == AHEAD:
            return None
        if any(one.starved and one.room(page_tokens) <= 0 for one in ready):
            return None  # a shortage of pages is relieved only while no step runs
        batch = form_batch([one for one in ready if self._goes_on(one)], limits, page_tokens)
        reports = batch is not None and any(row.score is not None for row in batch.plan.rows)
        return None if reports else batch  # to report on a prompt, the engine waits for the device

    def _goes_on(self, one: Sequence) -> bool:
        """Whether a sequence surely has another row here, behind the one that the engine has."""
        if one.dropped:
            return False
        return one.flight is None or not one.flight.draws or self._streams_on(one)

    def _streams_on(self, one: Sequence) -> bool:
        """Whether a sequence is decoded here after its present draw, unless that draw is an end token."""
        return one.plan.decode == self.me and one.remaining(self.settings.max_context) > 1


def _may_be_followed(batch: Batch) -> bool:
    """Whether another step may be launched before the result of this one is known."""
    reports = any(row.score is not None for row in batch.plan.rows)
    return not reports and not any(one.voided for one in batch.sequences)
