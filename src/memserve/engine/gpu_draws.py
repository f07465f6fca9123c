"""A step's draws on a GPU: many rows at a time, and as few waits for the device as there can be.

Drawing or reporting row by row would cost each row some fifty launches and several waits, a millisecond or so,
in which the GPU is idle most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from memserve.drawing import Logprobs
from memserve.engine import sampling
from memserve.engine.adjusting import adjusted
from memserve.engine.plans import Row
from memserve.engine.prompt_logprobs import scores_of
from memserve.kernels.sending import sent
from memserve.settings.gpu_room import drawn_together
from memserve.tokens import pack


def best_of(logits: torch.Tensor) -> torch.Tensor:
    """Each row's largest logit and its token, (2, rows) float64, exact for both: one copy to the host."""
    values, ids = logits.max(dim=-1)
    return torch.stack((values.double(), ids.double()))


def draw_rows(
    rows: Mapping[int, Row], places: Mapping[int, int], logits: torch.Tensor, best: torch.Tensor
) -> tuple[dict[int, int], dict[int, Logprobs]]:
    """The tokens that ``rows`` draw and the log probabilities that they ask for, by row number.

    ``places``: each row's line in ``logits``, (lines, vocab) float32, and in ``best``, what :func:`best_of`
    found in them. All likely draws are launched before the first wait for the device. Raises
    FloatingPointError, naming the row, when logits are not finite.
    """
    others = [i for i, row in rows.items() if row.past or not (row.sample and row.sample.greedy)]
    parts = list(_launched(others, rows, places, logits, sampling.HEAD))
    values, ids = best.tolist()  # waits
    for number, place in places.items():
        if not math.isfinite(values[place]):
            raise FloatingPointError(f"row {number}: the largest logit is {values[place]}")
    drawn = {number: int(ids[place]) for number, place in places.items()}
    drawn.update(zip(others, _read(parts), strict=True))
    far = [i for i in others if drawn[i] == sampling.ELSEWHERE]
    drawn.update(zip(far, _read(_launched(far, rows, places, logits, sampling.WIDE)), strict=True))
    for number in far:
        if drawn[number] == sampling.ELSEWHERE:
            drawn[number] = _draw_alone(logits[places[number]], rows[number])
    return drawn, _reports(rows, places, logits, drawn)


def _launched(
    numbers: Sequence[int],
    rows: Mapping[int, Row],
    places: Mapping[int, int],
    logits: torch.Tensor,
    head: int,
) -> Iterator[torch.Tensor]:
    """Launch the draws of rows ``numbers`` from their ``head`` most probable tokens, many rows at a time."""
    for some in _cut(numbers, logits):
        chosen = [rows[number] for number in some]
        settings = [row.sample for row in chosen if row.sample is not None]
        lines = adjusted(_lines(logits, [places[number] for number in some]), chosen)
        yield sampling.draws(lines, settings, [row.end for row in chosen], head)


def _read(parts: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> list[int]:
    return [token for part in list(parts) for token in part.tolist()]


def _cut(numbers: Sequence[int], logits: torch.Tensor) -> Iterator[Sequence[int]]:
    """``numbers`` in parts, each of which may be drawn or reported at once."""
    together = drawn_together(logits.shape[1])
    return (numbers[first : first + together] for first in range(0, len(numbers), together))


def _lines(logits: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """The lines of ``logits`` at ``places``; not copied where they follow one another."""
    first = places[0]
    if list(places) == list(range(first, first + len(places))):
        return logits[first : first + len(places)]
    return logits[sent(np.array(places), logits.device)]


def _draw_alone(logits: torch.Tensor, row: Row) -> int:
    """``logits``: (vocab,), unadjusted."""
    assert row.sample is not None, "a row that draws nothing"
    (token,) = sampling.draw(adjusted(logits[None], [row]), [row.sample], [row.end])
    return token


def _reports(
    rows: Mapping[int, Row], places: Mapping[int, int], logits: torch.Tensor, drawn: Mapping[int, int]
) -> dict[int, Logprobs]:
    """The log probabilities of the draws of the rows that ask for them, by row number."""
    counts = {i: row.sample.logprobs for i, row in rows.items() if row.sample}
    asked = {i: count for i, count in counts.items() if count is not None}
    found: dict[int, Logprobs] = {}
    for some in _cut(list(asked), logits):
        tokens = sent(np.array([drawn[i] for i in some]), logits.device)
        lines = _lines(logits, [places[i] for i in some])
        scores = scores_of(lines, tokens, max(asked[i] for i in some)).tolist()  # waits
        found.update((i, _report(line, asked[i])) for i, line in zip(some, scores, strict=True))
    return found


def _report(line: Sequence[float], count: int) -> Logprobs:
    """``line``: of :func:`~memserve.engine.prompt_logprobs.scores_of`, with at least ``count`` tokens."""
    own, _, *rest = line
    ids, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return Logprobs(own, pack([int(one) for one in ids[:count]]), tuple(values[:count]))
