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

RATE = 0.02
"""Weight of the latest step's miss. Some fifty steps move the scale most of the way."""
MISS_MAX = 0.5
"""Bound of one step's miss, as a logarithm: a step that takes ten times as long (a page fault, another
process) counts as about 1.65 times as long."""
SCALE_MAX = 16.0


@attrs.define
class Drift:
    """How much longer steps take than measured at start. One figure: noise cannot bend the costs' shape."""

    _log: float = attrs.field(default=0.0, init=False)

    @property
    def scale(self) -> float:
        """Factor on step times; 1 is as measured."""
        return math.exp(self._log)

    def saw(self, predicted_s: float, seconds: float) -> None:
        """Take in a finished step. ``predicted_s``: by the figures alone, without the scale."""
        if predicted_s <= 0 or seconds <= 0:
            return
        miss = math.log(seconds / predicted_s) - self._log
        limit = math.log(SCALE_MAX)
        self._log = max(-limit, min(limit, self._log + RATE * max(-MISS_MAX, min(MISS_MAX, miss))))
