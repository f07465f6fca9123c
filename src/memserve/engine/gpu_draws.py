"""A step's draws on a GPU: many rows at a time, and as few waits for the device as there can be.

Drawing or reporting row by row would cost each row some fifty launches and several waits, a millisecond or so,
in which the GPU is idle most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch

from memserve.drawing import Logprobs
from memserve.engine import sampling
from memserve.engine.adjusting import adjusted
from memserve.engine.plans import Row
from memserve.engine.prompt_logprobs import scores_of
from memserve.kernels.sending import fetched, sent
from memserve.settings.gpu_room import drawn_together
from memserve.tokens import pack


def best_of(logits: torch.Tensor) -> torch.Tensor:
    """Each row's largest logit and its token, (2, rows) float64, exact for both: one copy to the host."""
    values, ids = logits.max(dim=-1)
    return torch.stack((values.double(), ids.double()))


@attrs.define(eq=False)
class Draws:
    """The draws of one step's rows, launched behind it; :meth:`read` may be called once the device made them."""

    rows: Mapping[int, Row]
    """The rows that draw, by number, in order."""
    tokens: torch.Tensor
    """(rows,) int64 on the device: the drawn tokens, or ``ELSEWHERE``."""
    _found: torch.Tensor
    """(2, rows) float64 on the host: each row's largest logit, and its token of ``tokens``."""
    _places: Mapping[int, int]
    _logits: torch.Tensor | None

    def give_up_logits(self) -> None:
        """Allow the logits to be overwritten: draws that would still need them become void."""
        self._logits = None

    def read(self) -> tuple[dict[int, int], dict[int, Logprobs], frozenset[int]]:
        """The drawn tokens and the log probabilities that rows ask for, by row number, and the void rows.

        Raises FloatingPointError, naming the row, when logits are not finite.
        """
        values, ids = self._found.tolist()
        for number, value in zip(self.rows, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"row {number}: the largest logit is {value}")
        drawn = {number: int(token) for number, token in zip(self.rows, ids, strict=True)}
        far = [number for number, token in drawn.items() if token == sampling.ELSEWHERE]
        if self._logits is None:
            return {i: token for i, token in drawn.items() if i not in far}, {}, frozenset(far)
        drawn.update(self._drawn_far(far, self._logits))
        return drawn, _reports(self.rows, self._places, self._logits, drawn), frozenset()

    def _drawn_far(self, far: Sequence[int], logits: torch.Tensor) -> dict[int, int]:
        """The tokens of rows that are not among their ``HEAD`` most probable ones."""
        parts = list(_launched(far, self.rows, self._places, logits, sampling.WIDE))
        found = dict(zip(far, (token for part in parts for token in part.tolist()), strict=True))
        for number, token in found.items():
            if token == sampling.ELSEWHERE:
                found[number] = _draw_alone(logits[self._places[number]], self.rows[number])
        return found


def launch_draws(
    rows: Mapping[int, Row], places: Mapping[int, int], logits: torch.Tensor, best: torch.Tensor
) -> Draws:
    """Launch the draws of ``rows`` and the copy of their tokens to the host, without a wait for the device.

    ``places``: each row's line in ``logits``, (lines, vocab) float32, and in ``best``, what :func:`best_of`
    found in them.
    """
    numbers, others = list(rows), [i for i, row in rows.items() if not _takes_the_best(row)]
    values, tokens = _lines(best.T, [places[number] for number in numbers]).unbind(1)
    tokens = tokens.long()
    if parts := list(_launched(others, rows, places, logits, sampling.HEAD)):
        drawn = torch.cat(parts)
        at = {number: index for index, number in enumerate(numbers)}
        at_others = sent(np.array([at[number] for number in others]), logits.device)
        tokens = drawn if others == numbers else tokens.index_copy(0, at_others, drawn)
    return Draws(rows, tokens, fetched(torch.stack((values, tokens.double()))), places, logits)


def _takes_the_best(row: Row) -> bool:
    return row.past is None and row.sample is not None and row.sample.greedy


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
