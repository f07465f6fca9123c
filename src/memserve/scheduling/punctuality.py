"""How reliable predictions of first tokens are: a deadline's margin, learned from past predictions.

A worker compares each first token that a deadline depends on with its plan's prediction. It reports the share
by which later first tokens must be expected to be late. A scheduler adds this margin to its predictions for
requests with a deadline, and to nothing else. A worker that starts again begins at 0.

The share shrinks while no first token comes (see :func:`~memserve.scheduling.cost_fit.remembered`): with a share
that keeps every deadline from being met, no request would come that could lower it.
"""

from __future__ import annotations

import attrs

from memserve.scheduling.cost_fit import remembered

FIXED_S = 0.25
"""Added to the predicted seconds before the margin's share is taken: the end of a step or a message takes
time that does not grow with the prediction."""
KEPT = 0.97
"""Share of first tokens that should come within prediction plus margin."""
RATE = 0.02
"""Learning rate. A late first token adds RATE * KEPT to the share, any other takes off RATE * (1 - KEPT): the
two balance when KEPT of them are in time."""
SHARE_MAX = 1.0
SHARE_KEPT_S = 30.0
"""Seconds without a first token for which the share is kept in full. It is learned from many of them, which may
come one by one."""


def margin_s(share: float, predicted_s: float) -> float:
    """Seconds to add to a prediction."""
    return share * (predicted_s + FIXED_S)


@attrs.define
class Punctuality:
    """One worker's lateness of first tokens, as a quantile updated with each one."""

    _share: float = 0.0
    _at: float | None = None
    """Time of the latest first token."""

    def share(self, now: float) -> float:
        """The share by which later first tokens must be expected to be late."""
        return self._share * (1.0 if self._at is None else remembered(now - self._at, SHARE_KEPT_S))

    def saw(self, predicted_s: float, seconds: float, now: float) -> None:
        """Take in a first token that came after ``seconds``."""
        share = self.share(now - seconds)
        late = seconds > predicted_s + margin_s(share, predicted_s)
        self._share = min(SHARE_MAX, max(0.0, share + RATE * (KEPT if late else KEPT - 1.0)))
        self._at = now
