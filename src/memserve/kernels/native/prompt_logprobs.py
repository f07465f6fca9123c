"""What the native step tells of log probabilities: after a draw, or of a prompt's own tokens, instead of one."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_double, c_int32

import attrs
import numpy as np

from memserve.drawing import LOGPROBS_MAX, Logprobs, PromptLogprobs
from memserve.engine.plans import BatchPlan, Row
from memserve.tokens import count, pack, unpack

TOLD_AT_ONCE = 32
"""Tokens whose logits are held at a time. For so many, reading the weights takes less than multiplying with them."""
_TO_BE_DRAWN = -1


class NativeLogprobs(Structure):
    """``ms_logprobs``: how many are wanted and of which token, then what was found."""

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
        """Of the token that is drawn, and of the ``wanted`` most probable ones."""
        return cls(count=wanted, token=_TO_BE_DRAWN)

    def read(self) -> Logprobs:
        """What a step wrote."""
        return Logprobs(self.drawn, pack(self.ids[: self.count]), tuple(self.values[: self.count]))


@attrs.define
class Telling:
    """What the rows of one step are told of their prompts, gathered over the pieces in which the step runs."""

    _found: list[np.ndarray] = attrs.field(factory=list, init=False)
    """Of ``NativeLogprobs``, in the order of the rows' tokens."""

    def questions(self, rows: Sequence[Row]) -> Iterator[tuple[array[int], Sequence[NativeLogprobs]]]:
        """Places in a piece of ``rows``, a few at a time, and what is asked about the tokens behind them."""
        places, asked = array("i"), list[tuple[int, int]]()
        first = 0
        for row in rows:
            if row.tell is not None:
                asked += [(row.tell.count, token) for token in unpack(row.tell.follows)]
                places.extend(range(first, first + count(row.tell.follows)))
            first += count(row.tokens) + count(row.draft)
        for start in range(0, len(asked), TOLD_AT_ONCE):
            some = asked[start : start + TOLD_AT_ONCE]
            about = (NativeLogprobs * len(some))()
            for one, (wanted, token) in zip(about, some, strict=True):
                one.count, one.token = wanted, token
            yield places[start : start + TOLD_AT_ONCE], about  # type: ignore[misc]  # an array of them
            self._found.append(np.frombuffer(bytes(about), np.dtype(NativeLogprobs)))

    def prompts(self, plan: BatchPlan) -> dict[int, PromptLogprobs]:
        """What was told of the rows of the whole step, by their numbers."""
        first, found = 0, {}
        for number, row in enumerate(plan.rows):
            if row.tell is not None:
                end = first + count(row.tell.follows)
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
