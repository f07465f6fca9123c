"""How far predictions of first tokens can be relied on: the margin that a deadline needs beyond them, learned from how they came out.

A worker compares each first token that a deadline depends on with what its plan says of it, and its reports tell the share
by which later ones must be expected to be late. A scheduler adds that to what it predicts for requests with a deadline,
and to nothing else. A worker that starts anew begins at 0.
"""

from __future__ import annotations

import attrs

FIXED_S = 0.25
"""A margin is a share of the predicted seconds and of so many more: what a step's end or a message takes is no share of anything."""
KEPT = 0.97
"""Share of first tokens that shall be there by prediction and margin."""
RATE = 0.02
"""How much a late one adds to the margin; each other takes off so little that the two balance where KEPT of them are in time."""
SHARE_MAX = 1.0


def margin_s(share: float, predicted_s: float) -> float:
    """Seconds to be added to a prediction."""
    return share * (predicted_s + FIXED_S)


@attrs.define
class Punctuality:
    """Of one worker's first tokens: a quantile of their lateness, followed one by one."""

    share: float = 0.0

    def saw(self, predicted_s: float, seconds: float) -> None:
        """A first token came after ``seconds``."""
        late = seconds > predicted_s + margin_s(self.share, predicted_s)
        self.share = min(SHARE_MAX, max(0.0, self.share + RATE * (KEPT if late else KEPT - 1.0)))
