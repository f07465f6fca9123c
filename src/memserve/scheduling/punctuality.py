"""How reliable predictions of first tokens are: a deadline's margin, learned from past predictions.

A worker compares each first token that a deadline depends on with its plan's prediction. It reports the share
by which later first tokens must be expected to be late. A scheduler adds this margin to its predictions for
requests with a deadline, and to nothing else. A worker that starts again begins at 0.
"""

from __future__ import annotations

import attrs

FIXED_S = 0.25
"""Added to the predicted seconds before the margin's share is taken: the end of a step or a message takes
time that does not grow with the prediction."""
KEPT = 0.97
"""Share of first tokens that should come within prediction plus margin."""
RATE = 0.02
"""Learning rate. A late first token adds RATE * KEPT to the share, any other takes off RATE * (1 - KEPT): the
two balance when KEPT of them are in time."""
SHARE_MAX = 1.0


def margin_s(share: float, predicted_s: float) -> float:
    """Seconds to add to a prediction."""
    return share * (predicted_s + FIXED_S)


@attrs.define
class Punctuality:
    """One worker's lateness of first tokens, as a quantile updated with each one."""

    share: float = 0.0

    def saw(self, predicted_s: float, seconds: float) -> None:
        """Take in a first token that came after ``seconds``."""
        late = seconds > predicted_s + margin_s(self.share, predicted_s)
        self.share = min(SHARE_MAX, max(0.0, self.share + RATE * (KEPT if late else KEPT - 1.0)))
