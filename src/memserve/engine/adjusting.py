"""Adjusts a row's logits as its request asks, and reports log probabilities of the unadjusted logits.

The adjustments of a token's logit ``l`` are, in this order:

1. ``l + bias``: ``logit_bias``;
2. ``l / repetition`` if ``l > 0``, otherwise ``l * repetition``; once for each token that occurs in prompt or
   answer (Keskar et al., arXiv 1909.05858, as in transformers and vLLM);
3. ``l - frequency * n`` and then ``l - presence``, if the token occurs ``n > 0`` times in the answer:
   OpenAI's penalties;
4. minus infinity, if the token would end an answer shorter than ``min_tokens``, or if the answer's grammar
   forbids it.

Every operation is rounded to float32 and none is fused with the next, so every engine and device computes the
same bits from the same logits (``kernels/native/sampling.hpp`` does the same). Temperature, min_p, top_k and
top_p follow in :mod:`memserve.engine.sampling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from memserve.drawing import Adjustments, Logprobs
from memserve.engine.plans import Past, Row
from memserve.kernels.sending import sent
from memserve.tokens import pack


def adjusted(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The logits that ``rows`` draw from: ``logits``, (rows, vocab) float32, or a copy if any row adjusts."""
    if all(row.past is None for row in rows):
        return logits
    changed = logits.clone()
    for number, row in enumerate(rows):
        if row.past is not None and row.sample is not None and row.sample.adjust is not None:
            adjust(changed[number], row.sample.adjust, row.past)
    return changed


def adjust(logits: torch.Tensor, how: Adjustments, past: Past) -> None:
    """Adjust one row in place, without waiting for the device. ``logits``: (vocab,) float32 on any device."""

    there = partial(sent, device=logits.device)

    def at(packed: bytes) -> torch.Tensor:
        return there(_ids(packed)).long()

    def number(value: float) -> torch.Tensor:
        # On the device: to divide by a host number, CUDA multiplies by its reciprocal instead.
        return torch.full((1,), value, dtype=torch.float32, device=logits.device)

    if how.biased:
        logits[at(how.biased)] += there(np.frombuffer(how.bias, "<f4"))
    if how.repetition != 1:
        seen, by = at(past.prompt + past.output), number(how.repetition)
        was = logits[seen]  # a token that occurs twice gets the same value twice
        logits[seen] = torch.where(was > 0, was / by, was * by)
    if past.output and (how.frequency or how.presence):
        said, times = np.unique(_ids(past.output), return_counts=True)
        places = there(said).long()
        logits[places] -= number(how.frequency) * there(times.astype(np.float32))
        logits[places] -= number(how.presence)
    if past.forbidden:
        # To assign a number, torch waits for the device.
        logits.index_fill_(0, at(past.forbidden), -torch.inf)
    if past.allowed:
        bits = np.unpackbits(np.frombuffer(past.allowed, np.uint8), bitorder="little", count=len(logits))
        logits.masked_fill_(there(bits == 0), -torch.inf)


def _ids(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<i4")


def logprobs_of_draws(
    logits: Iterable[torch.Tensor], rows: Iterable[Row], tokens: Iterable[int]
) -> list[Logprobs | None]:
    """Log probabilities per row, None for rows that did not ask. ``logits``: (vocab,) float32, unadjusted."""
    return [
        logprobs_of(one, token, row.sample.logprobs)
        if row.sample is not None and row.sample.logprobs is not None
        else None
        for one, row, token in zip(logits, rows, tokens, strict=True)
    ]


def logprobs_of(logits: torch.Tensor, token: int, count: int) -> Logprobs:
    """Log probabilities of ``token`` and of the ``count`` most probable tokens.

    ``logits``: (vocab,) float32, unadjusted. The formula is ``l - max - log(sum(exp(l - max)))``, in float64
    after the subtraction ``l - max``.
    """
    below = (logits - logits.max()).double()
    values = below - below.exp().sum().log()
    ordered = values.sort(descending=True, stable=True)
    drawn, *best = torch.cat((values[token : token + 1], ordered.values[:count])).tolist()
    return Logprobs(drawn, pack(ordered.indices[:count].tolist()), tuple(best))
