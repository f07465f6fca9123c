"""Log probabilities that the native step reports: of drawn tokens, or of a prompt's own tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_double, c_int32

import attrs
import numpy as np

from memserve.drawing import LOGPROBS_MAX, Logprobs, PromptLogprobs
from memserve.engine.plans import BatchPlan, Row
from memserve.tokens import count, pack, unpack

SCORED_AT_ONCE = 32
"""Tokens whose logits are held at a time; for these, reading the weights costs less than multiplying."""
_TO_BE_DRAWN = -1


class NativeLogprobs(Structure):
    """``ms_logprobs``: the number of top tokens and the token to report, then the results."""

    _fields_ = [
        ("count", c_int32),
        ("ids", c_int32 * LOGPROBS_MAX),
        ("values", c_double * LOGPROBS_MAX),
        ("drawn", c_double),
        ("token", c_int32),
        ("rank", c_int32),
    ]

    @classmethod
    def of_draw(cls, wanted: int) -> NativeLogprobs:
        """A request for the drawn token's log probability and those of the ``wanted`` most probable ones."""
        return cls(count=wanted, token=_TO_BE_DRAWN)

    def read(self) -> Logprobs:
        """The results that a step wrote."""
        return Logprobs(self.drawn, pack(self.ids[: self.count]), tuple(self.values[: self.count]))


@attrs.define
class Scoring:
    """Log probabilities reported for the prompts of a step's rows, gathered over the step's pieces."""

    _found: list[np.ndarray] = attrs.field(factory=list, init=False)
    """Arrays of ``NativeLogprobs``, in the order of the rows' tokens."""

    def questions(self, rows: Sequence[Row]) -> Iterator[tuple[array[int], Sequence[NativeLogprobs]]]:
        """Tokens of a piece of ``rows``, a few at a time, and what to report about the token after each.

        The caller runs the step on each pair before it takes the next one.
        """
        places, asked = array("i"), list[tuple[int, int]]()
        first = 0
        for row in rows:
            if row.score is not None:
                asked += [(row.score.count, token) for token in unpack(row.score.follows)]
                places.extend(range(first, first + count(row.score.follows)))
            first += count(row.tokens) + count(row.draft)
        for start in range(0, len(asked), SCORED_AT_ONCE):
            some = asked[start : start + SCORED_AT_ONCE]
            about = (NativeLogprobs * len(some))()
            for one, (wanted, token) in zip(about, some, strict=True):
                one.count, one.token = wanted, token
            yield places[start : start + SCORED_AT_ONCE], about  # type: ignore[misc]  # an array of them
            self._found.append(np.frombuffer(bytes(about), np.dtype(NativeLogprobs)))

    def prompts(self, plan: BatchPlan) -> dict[int, PromptLogprobs]:
        """Log probabilities reported for the rows of the whole step, by row number."""
        first, found = 0, {}
        for number, row in enumerate(plan.rows):
            if row.score is not None:
                end = first + count(row.score.follows)
                found[number] = _packed(np.concatenate(self._found)[first:end])
                first = end
        return found


def _packed(lines: np.ndarray) -> PromptLogprobs:
    likeliest = int(lines["count"][0])
    return PromptLogprobs(
        lines["drawn"].tobytes(),
        lines["rank"].tobytes(),
        lines["ids"][:, :likeliest].tobytes(),
        lines["values"][:, :likeliest].tobytes(),
    )
