"""Reports log probabilities of a prompt's own tokens, which are given rather than drawn.

They are computed from the model's unadjusted logits, as in :func:`memserve.engine.adjusting.logprobs_of`. The
logits of a whole chunk would take too much memory, so those of a few tokens are computed at a time and
reduced to the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from memserve.drawing import PromptLogprobs
from memserve.engine.plans import Row, Score
from memserve.kernels.sending import sent
from memserve.tokens import count, unpack

LogitsAt = Callable[[torch.Tensor], torch.Tensor]
"""Maps places of tokens in a step, (places,) int64, to the logits after them, (places, vocab) float32."""


def score_prompts(
    rows: Iterable[tuple[int, Row]], logits_at: LogitsAt, device: torch.device, at_once: int
) -> dict[int, PromptLogprobs]:
    """Prompt log probabilities of each row with a ``score``, by row number.

    ``rows``: all rows of a step, in the order of its tokens. ``at_once``: tokens whose logits are held at a
    time. There is one device-to-host copy per row. Raises FloatingPointError, naming the row, when logits are
    not numbers.
    """
    first, found = 0, {}
    for number, row in rows:
        if row.score is not None:
            lines = _lines(row.score, first, logits_at, device, at_once)
            if np.isnan(lines).any():
                raise FloatingPointError(f"row {number}: logits of its prompt are not numbers")
            found[number] = _packed(lines)
        first += count(row.tokens)
    return found


def _lines(score: Score, first: int, logits_at: LogitsAt, device: torch.device, at_once: int) -> np.ndarray:
    """:func:`scores_of` for a row's tokens, one line each; the row begins at token ``first`` of the step."""
    follows = sent(np.array(unpack(score.follows), np.int64), device)
    places = torch.arange(first, first + len(follows), device=device)
    parts = zip(torch.split(places, at_once), torch.split(follows, at_once), strict=True)
    lines = torch.cat([scores_of(logits_at(some), tokens, score.count) for some, tokens in parts])
    found: np.ndarray = lines.cpu().numpy()
    return found


def scores_of(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The report on each of ``tokens``, (rows,) int64, by its row of ``logits``, (rows, vocab) float32.

    Returns (rows, 2 + 2 * count) float64, which represents all of it exactly: the token's log probability,
    its rank, the ids of the ``count`` most probable tokens and their log probabilities. ``count`` is capped
    at the vocabulary.
    """
    order = _order(logits)
    below = (logits - logits.amax(-1, keepdim=True)).double()
    values = below - below.exp().sum(-1, keepdim=True).log()
    own = tokens[:, None]
    rank = (order > order.gather(1, own)).sum(-1, keepdim=True) + 1
    ids = order.topk(min(count, logits.shape[1]), dim=-1).indices
    return torch.cat((values.gather(1, own), rank.double(), ids.double(), values.gather(1, ids)), dim=1)


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Distinct integers, (rows, vocab) int64, ordered as the logits; equal logits rank by falling id."""
    bits = (logits + 0.0).view(torch.int32).long()  # -0.0, which equals 0.0, becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) - torch.arange(logits.shape[1], device=logits.device)


def _packed(lines: np.ndarray) -> PromptLogprobs:
    likeliest = (lines.shape[1] - 2) // 2
    return PromptLogprobs(
        lines[:, 0].astype("<f8").tobytes(),
        lines[:, 1].astype("<i4").tobytes(),
        lines[:, 2 : 2 + likeliest].astype("<i4").tobytes(),
        lines[:, 2 + likeliest :].astype("<f8").tobytes(),
    )
