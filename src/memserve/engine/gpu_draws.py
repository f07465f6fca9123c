"""A step's draws on a GPU: many rows at a time, and as few waits for the device as there can be.

Drawing or reporting row by row would cost each row some fifty launches and several waits, a millisecond or so,
in which the GPU is idle most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import numpy as np
import torch

from memserve.drawing import Logprobs
from memserve.engine import sampling
from memserve.engine.adjusting import adjusted
from memserve.engine.plan_check import check_late
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
    """The draws of one step's rows, launched behind it; :meth:`read` may be called once the device made them.

    Rows that draw late are void unless :meth:`draw_late` launches their draws.
    """

    rows: Mapping[int, Row]
    """The rows that draw, by number, in the order of ``tokens``."""
    tokens: torch.Tensor
    """(rows,) int64 on the device: the drawn tokens, or ``ELSEWHERE``; of rows that do not draw, any token."""
    _best: torch.Tensor
    """(rows,) float64 on the device: each row's largest logit. May be overwritten when the logits may be."""
    _places: Mapping[int, int]
    _logits: torch.Tensor | None
    _head: int
    """How many of a row's most probable tokens its draw is looked for among."""
    _reports: list[tuple[Sequence[int], torch.Tensor]] = attrs.field(factory=list, init=False)
    """Row numbers, and on the host what :func:`scores_of` says of their draws."""
    _found: torch.Tensor = attrs.field(init=False)
    """(2, rows) on the host: ``_best`` and ``tokens``."""

    def __attrs_post_init__(self) -> None:
        self._launch([number for number, row in self.rows.items() if not row.late])

    def draw_late(self, rows: Mapping[int, Row]) -> None:
        """Launch the draws of ``rows``, which draw late and are known now, without a wait for the device.

        Raises ValueError, naming the row, for adjustments that reach beyond the logits.
        """
        assert self._logits is not None, "a row draws late from logits that may be gone"
        assert all(self.rows[number].late for number in rows), "a row draws twice"
        check_late(rows, self._logits.shape[1])
        self.rows = {**self.rows, **rows}
        self._launch(list(rows))

    def _launch(self, numbers: Sequence[int]) -> None:
        """Launch the draws of rows ``numbers``, and the copies to the host."""
        assert self._logits is not None
        others = [number for number in numbers if not _takes_the_best(self.rows[number])]
        if parts := list(_launched(others, self.rows, self._places, self._logits, self._head)):
            drawn = torch.cat(parts)
            if others != list(self.rows):
                drawn = self.tokens.index_copy(0, _on(self._logits, self._lines_of(others)), drawn)
            self.tokens = drawn
        reporting = [number for number in numbers if _most(self.rows[number]) is not None]
        if reporting:
            drawn = _lines(self.tokens, self._lines_of(reporting)).clamp(min=0)
            scores = _scored(reporting, self.rows, self._places, self._logits, drawn)
            self._reports += [(some, fetched(part)) for some, part in scores]
        self._found = fetched(torch.stack((self._best, self.tokens.double())))

    def _lines_of(self, numbers: Sequence[int]) -> list[int]:
        """The lines of rows ``numbers`` in ``tokens``."""
        lines = {number: line for line, number in enumerate(self.rows)}
        return [lines[number] for number in numbers]

    def drawn_by(self, numbers: Sequence[int]) -> torch.Tensor:
        """What rows ``numbers`` draw, (numbers,) int64 on the device; any token for draws not found there."""
        return _lines(self.tokens, self._lines_of(numbers)).clamp(min=0)

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
        undrawn = frozenset(number for number, row in self.rows.items() if row.late)
        tokens = {i: int(token) for i, token in zip(self.rows, ids, strict=True) if i not in undrawn}
        drawn = {i: token for i, token in tokens.items() if token != sampling.ELSEWHERE}
        reports = _read_reports(self.rows, self._reports)
        far = [number for number in tokens if number not in drawn]
        if not far:
            return drawn, reports, undrawn
        if self._logits is None:
            return drawn, {i: one for i, one in reports.items() if i in drawn}, undrawn.union(far)
        found = self._drawn_far(far, self._logits)
        scores = _scored(far, self.rows, self._places, self._logits, _on(self._logits, list(found.values())))
        reports |= _read_reports(self.rows, [(some, part.cpu()) for some, part in scores])
        return drawn | found, reports, undrawn

    def _drawn_far(self, far: Sequence[int], logits: torch.Tensor) -> dict[int, int]:
        """The tokens of rows ``far``, in their order, which are not among their ``HEAD`` most probable ones."""
        parts = list(_launched(far, self.rows, self._places, logits, sampling.WIDE))
        found = dict(zip(far, (token for part in parts for token in part.tolist()), strict=True))
        for number, token in found.items():
            if token == sampling.ELSEWHERE:
                found[number] = _draw_alone(logits[self._places[number]], self.rows[number])
        return found


def launch_draws(
    rows: Mapping[int, Row],
    places: Mapping[int, int],
    logits: torch.Tensor,
    best: torch.Tensor,
    followed: bool = False,
) -> Draws:
    """Launch the draws of ``rows`` and the copy of their tokens to the host, without a wait for the device.

    Rows that draw late are left to :meth:`Draws.draw_late`.

    ``places``: each row's line in ``logits``, (lines, vocab) float32, and in ``best``, what :func:`best_of`
    found in them. ``followed``: whether the logits may be overwritten before the draws are read. A draw that is
    not found by then costs its stream three steps, so it is looked for among more tokens at once.
    """
    values, tokens = _lines(best.T, [places[number] for number in rows]).unbind(1)
    head = sampling.WIDE if followed else sampling.HEAD
    return Draws(rows, tokens.long(), values, places, logits, head)


def _takes_the_best(row: Row) -> bool:
    return row.past is None and row.sample is not None and row.sample.greedy


def _launched(
    numbers: Sequence[int],
    rows: Mapping[int, Row],
    places: Mapping[int, int],
    logits: torch.Tensor,
    head: int,
) -> Iterator[torch.Tensor]:
    """Launch the draws of rows ``numbers`` from their ``head`` most probable tokens, many rows at a time.

    Rows that draw from few tokens in any case (greedy ones, and a small ``top_k``) need no more than ``HEAD``.
    """
    for some in _cut(numbers, logits):
        chosen = [rows[number] for number in some]
        settings = [row.sample for row in chosen if row.sample is not None]
        lines = adjusted(_lines(logits, [places[number] for number in some]), chosen)
        few = all(how.greedy or 0 < how.top_k < sampling.HEAD for how in settings)
        yield sampling.draws(lines, settings, [row.end for row in chosen], sampling.HEAD if few else head)


def _cut(numbers: Sequence[int], logits: torch.Tensor) -> Iterator[Sequence[int]]:
    """``numbers`` in parts, each of which may be drawn or reported at once."""
    together = drawn_together(logits.shape[1])
    return (numbers[first : first + together] for first in range(0, len(numbers), together))


def _lines(values: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """The lines of ``values`` at ``places``; not copied where they follow one another."""
    first = places[0]
    if list(places) == list(range(first, first + len(places))):
        return values[first : first + len(places)]
    return values[_on(values, places)]


def _on(values: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """``numbers`` as (numbers,) int64 on the device of ``values``."""
    return sent(np.array(numbers, np.int64), values.device)


def _draw_alone(logits: torch.Tensor, row: Row) -> int:
    """``logits``: (vocab,), unadjusted."""
    assert row.sample is not None, "a row that draws nothing"
    (token,) = sampling.draw(adjusted(logits[None], [row]), [row.sample], [row.end])
    return token


def _scored(
    numbers: Sequence[int],
    rows: Mapping[int, Row],
    places: Mapping[int, int],
    logits: torch.Tensor,
    tokens: torch.Tensor,
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Launch the reports on the draws of those of rows ``numbers`` that ask for log probabilities.

    ``tokens``: (numbers,) int64 on the device. Yields row numbers with what :func:`scores_of` says of them.
    """
    at = {number: index for index, number in enumerate(numbers)}
    counts = {i: _most(rows[i]) for i in numbers if _most(rows[i]) is not None}
    for some in _cut(list(counts), logits):
        lines, drawn = _lines(logits, [places[i] for i in some]), _lines(tokens, [at[i] for i in some])
        yield some, scores_of(lines, drawn, max(counts[i] or 0 for i in some))


def _most(row: Row) -> int | None:
    """How many most probable tokens the row's draw reports; None: it reports nothing."""
    return None if row.sample is None else row.sample.logprobs


def _read_reports(
    rows: Mapping[int, Row], parts: Iterable[tuple[Sequence[int], torch.Tensor]]
) -> dict[int, Logprobs]:
    """The log probabilities of draws, by row number, from parts of :func:`_scored` on the host."""
    lines = [(i, line) for some, part in parts for i, line in zip(some, part.tolist(), strict=True)]
    return {i: _report(line, _most(rows[i]) or 0) for i, line in lines}


def _report(line: Sequence[float], count: int) -> Logprobs:
    """``line``: of :func:`~memserve.engine.prompt_logprobs.scores_of`, with at least ``count`` tokens."""
    own, _, *rest = line
    ids, values = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return Logprobs(own, pack([int(one) for one in ids[:count]]), tuple(values[:count]))
