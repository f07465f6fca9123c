"""From measured steps to cost figures: a least-squares fit of StepCosts, and a bounded scale for drift.

The problem is small enough for plain Python: some tens of measurements, a dozen unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from memserve.costs import StepCosts

Rows = Sequence[tuple[int, int]]
"""One step: each row's new tokens and the tokens before them."""

RIDGE = 1e-9
"""Relative addition to each diagonal entry: keeps equations solvable if samples do not separate unknowns."""


@attrs.frozen
class Sample:
    """One measured step."""

    rows: Rows
    seconds: float


def fit_steps(
    samples: Sequence[Sample], knots: Sequence[float], chunk_tokens: int, token_bytes: int
) -> StepCosts:
    """The StepCosts with a table at ``knots`` that fits ``samples`` with the least relative error.

    No figure is below 0: an unknown that would be is left out, and the others are fitted again. Raises
    ValueError with fewer samples than unknowns.
    """
    features = [_features(one.rows, knots) for one in samples]
    unknowns = list(range(len(knots) + 3))
    if len(samples) < len(unknowns):
        raise ValueError(f"{len(samples)} samples are too few to fit {len(unknowns)} figures")
    while True:
        found = dict(zip(unknowns, _least_squares(features, samples, unknowns), strict=True))
        wrong = min(unknowns, key=lambda one: found[one] * _size(features, one))
        if found[wrong] >= 0:
            break
        unknowns.remove(wrong)
    values = [found.get(one, 0.0) for one in range(len(knots) + 3)]
    table = tuple(zip((float(one) for one in knots), _growing(values[: len(knots)]), strict=True))
    row_s, read_s, pair_s = values[len(knots) :]
    return StepCosts(table, row_s, read_s, pair_s, chunk_tokens, token_bytes)


def _features(rows: Rows, knots: Sequence[float]) -> list[float]:
    """The coefficients of the unknowns in a step: each knot's share in its tokens, rows, context, pairs."""
    tokens = sum(new for new, _ in rows)
    context = sum(before for _, before in rows)
    pairs = sum(new * (before + new / 2) for new, before in rows)
    shares = [0.0] * len(knots)
    above = next((i for i, knot in enumerate(knots) if knot >= tokens), len(knots) - 1)
    if above == 0:
        shares[0] = 1.0
    else:
        low, high = knots[above - 1], knots[above]
        shares[above] = (tokens - low) / (high - low)
        shares[above - 1] = 1.0 - shares[above]
    return [*shares, float(len(rows)), float(context), pairs]


def _least_squares(
    features: list[list[float]], samples: Sequence[Sample], unknowns: list[int]
) -> list[float]:
    """Minimize the relative errors, by the normal equations, with each unknown scaled by its size."""
    sizes = [_size(features, one) or 1.0 for one in unknowns]
    rows = [
        [one[k] / size / sample.seconds for k, size in zip(unknowns, sizes, strict=True)]
        for one, sample in zip(features, samples, strict=True)
    ]
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(len(unknowns))] for i in range(len(unknowns))
    ]
    for i, line in enumerate(matrix):
        line[i] += RIDGE * (line[i] or 1.0)
        line.append(sum(row[i] for row in rows))
    solved = _solve(matrix)
    return [value / size for value, size in zip(solved, sizes, strict=True)]


def _size(features: list[list[float]], unknown: int) -> float:
    return max(one[unknown] for one in features)


def _solve(matrix: list[list[float]]) -> list[float]:
    """Gaussian elimination with pivoting; the last column is the right-hand side."""
    size = len(matrix)
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(matrix[row][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for below in range(i + 1, size):
            factor = matrix[below][i] / matrix[i][i]
            for column in range(i, size + 1):
                matrix[below][column] -= factor * matrix[i][column]
    values = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(matrix[i][k] * values[k] for k in range(i + 1, size))
        values[i] = (matrix[i][size] - rest) / matrix[i][i]
    return values


def _growing(values: list[float]) -> list[float]:
    """Make values non-decreasing: more tokens never take less time, and noise that says so is levelled."""
    most, level = 0.0, []
    for value in values:
        most = max(most, value)
        level.append(most)
    return level


# ---- drift after the start -----------------------------------------------------------------------------------

STEPS_MAX = 49.0
"""Most steps that earlier evidence counts for: the latest step's miss has a weight of a fiftieth at least, so
some fifty steps move the scale most of the way."""
STEPS_MIN = 4.0
"""Steps that even rough figures, or evidence of long ago, count for."""
MISS_MAX = 0.5
"""Bound of one step's miss, as a logarithm: a step that takes ten times as long (a page fault, another
process) counts as about 1.65 times as long."""
SCALE_MAX = 16.0
KEPT_S = 5.0
"""Seconds for which a worker keeps what it has seen, in full, while it sees nothing new."""
HALF_S = 10.0
"""Seconds after which it has forgotten half of it then, and so on."""
DOUBT = 4.0
"""How many times too high rough figures may be."""
PROVEN_STEPS = 100
"""Steps after which rough figures, corrected by the scale, are as good as any."""


def remembered(idle_s: float, kept_s: float = KEPT_S) -> float:
    """The part of a bad experience that counts ``idle_s`` seconds later, when nothing was seen since.

    ``kept_s``: see KEPT_S.

    Whoever is believed to be slow gets no requests, and cannot show that this is over: that another program
    has left the cores, for example. So experience fades until a request is worth a try. Where nothing has
    changed, that one request in some tens of seconds is what it costs.
    """
    return math.exp2(-max(0.0, idle_s - kept_s) / HALF_S)


@attrs.define
class Drift:
    """How much longer steps take than measured at start. One figure: noise cannot bend the costs' shape.

    While the worker is idle the scale returns to 1 if it is above it (see :func:`remembered`), and that of rough
    figures to what they are at best: they may have been measured beside other programs.
    """

    _log: float = attrs.field(default=0.0, init=False)
    _steps: float = attrs.field(default=STEPS_MAX, init=False)
    """Steps that the evidence so far counts for."""
    _unproven: int = attrs.field(default=0, init=False)
    """Steps until rough figures are proven."""
    _at: float | None = attrs.field(default=None, init=False)
    """Time of the latest evidence."""

    def begin(self, rough: bool, now: float) -> None:
        """Start with figures that have just been measured; only the first call counts."""
        if self._at is None:
            self._at = now
            if rough:
                self._steps, self._unproven = STEPS_MIN, PROVEN_STEPS

    def scale(self, now: float) -> float:
        """Factor on step times; 1 is as measured."""
        return math.exp(self._faded(now))

    def saw(self, predicted_s: float, seconds: float, now: float) -> None:
        """Take in a step that ended ``now``. ``predicted_s``: by the figures alone, without the scale."""
        if predicted_s <= 0 or seconds <= 0:
            return
        began = now - seconds
        log, steps = self._faded(began), max(STEPS_MIN, self._steps * self._remembered(began))
        miss, limit = math.log(seconds / predicted_s) - log, math.log(SCALE_MAX)
        log += max(-MISS_MAX, min(MISS_MAX, miss)) / (steps + 1.0)
        self._log = max(-limit, min(limit, log))
        self._steps, self._at = min(STEPS_MAX, steps + 1.0), now
        self._unproven = max(0, self._unproven - 1)

    def _faded(self, now: float) -> float:
        best = -math.log(DOUBT) if self._unproven else 0.0
        return best + (self._log - best) * self._remembered(now) if self._log > best else self._log

    def _remembered(self, now: float) -> float:
        return remembered(now - self._at) if self._at is not None else 1.0
