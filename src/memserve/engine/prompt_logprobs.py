"""Tells log probabilities of a prompt's tokens: of those that are there, where a draw tells of the one that is drawn.

They are of the model's own logits, as :func:`memserve.engine.adjusting.logprobs_of` has it. Nobody could hold the logits of
a whole chunk, so those of a few of its tokens are made at a time and reduced to what is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from memserve.drawing import PromptLogprobs
from memserve.engine.plans import Row, Tell
from memserve.kernels.sending import sent
from memserve.tokens import count, unpack

LogitsAt = Callable[[torch.Tensor], torch.Tensor]
"""Logits, (places, vocab) float32, after the tokens of a step at (places,) int64."""


def tell_prompts(
    rows: Iterable[tuple[int, Row]], logits_at: LogitsAt, device: torch.device, at_once: int
) -> dict[int, PromptLogprobs]:
    """What each row with a ``tell`` is told, by its number. ``rows``: all of a step, in the order of its tokens.

    ``at_once``: logits of so many tokens are held. One answer from the device for each row. Raises FloatingPointError,
    naming the row, when logits are not numbers.
    """
    first, found = 0, {}
    for number, row in rows:
        if row.tell is not None:
            lines = _lines(row.tell, first, logits_at, device, at_once)
            if np.isnan(lines).any():
                raise FloatingPointError(f"row {number}: logits of its prompt are not numbers")
            found[number] = _packed(lines)
        first += count(row.tokens)
    return found


def _lines(tell: Tell, first: int, logits_at: LogitsAt, device: torch.device, at_once: int) -> np.ndarray:
    """What :func:`told_of` says of a row's tokens, which begin as token ``first`` of the step: a line each."""
    follows = sent(np.array(unpack(tell.follows), np.int64), device)
    places = torch.arange(first, first + len(follows), device=device)
    parts = zip(torch.split(places, at_once), torch.split(follows, at_once), strict=True)
    lines = torch.cat([told_of(logits_at(some), tokens, tell.count) for some, tokens in parts])
    found: np.ndarray = lines.cpu().numpy()
    return found


def told_of(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Of each of ``tokens``, (rows,) int64, after its row of ``logits``, (rows, vocab) float32.

    (rows, 2 + 2 * count) float64, which holds all of it exactly: its log probability, its rank, the ids of the ``count`` most
    probable tokens and their log probabilities; fewer, where the vocabulary has fewer.
    """
    order = _order(logits)
    below = (logits - logits.amax(-1, keepdim=True)).double()
    values = below - below.exp().sum(-1, keepdim=True).log()
    own = tokens[:, None]
    rank = (order > order.gather(1, own)).sum(-1, keepdim=True) + 1
    ids = order.topk(min(count, logits.shape[1]), dim=-1).indices
    return torch.cat((values.gather(1, own), rank.double(), ids.double(), values.gather(1, ids)), dim=1)


def _order(logits: torch.Tensor) -> torch.Tensor:
    """Integers, (rows, vocab) int64, that differ and order as the logits do, and where these are equal by falling id."""
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
