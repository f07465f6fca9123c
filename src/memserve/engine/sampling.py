"""Draws the next token of each row from its logits.

A draw uses one uniform number that is a function of (seed, position) alone, so that a stream resumed by another
worker continues with the very tokens it would have had. ``uniform`` is integer arithmetic on 64 bits, for other
kernels to repeat exactly, as ``kernels/native/sampling.hpp`` does; nothing at module level imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memserve.messages import Sampling

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_HEAD = 256
"""Most draws fall within this many most probable tokens, which saves sorting the whole vocabulary."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same on every machine: ``mix(mix(seed) + (position + 1) * gamma)``, top 53 bits.

    ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), all arithmetic modulo 2**64. The
    seed is mixed first because users choose small neighbouring seeds, whose streams must not be shifted copies.
    """
    return (_mix(_mix(seed & _MASK) + (position + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def draw(logits: torch.Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token per row. ``logits``: (rows, vocab) float32; ``positions``: of the tokens drawn.

    Raises FloatingPointError, naming the row, when logits are not numbers.
    """
    best, ids = logits.max(dim=-1)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).nonzero()[0, 0])
        raise FloatingPointError(f"row {row}: the largest logit is {float(best[row])}")
    tokens: list[int] = ids.tolist()
    for row, (how, position) in enumerate(zip(settings, positions, strict=True)):
        if how.temperature > 0 and how.top_k != 1:
            tokens[row] = _draw_one(logits[row], how, uniform(how.seed, position))
    return tokens


def _draw_one(logits: torch.Tensor, how: Sampling, u: float) -> int:
    """Inverse of the cumulative distribution over tokens by falling probability, then rising id.

    top_k keeps that many tokens; top_p the fewest of those that reach that share of their probability; the draw is
    among the kept ones in proportion. Sums are float64, so that 50,000 small terms keep their order.
    """
    weights = ((logits - logits.max()).double() / how.temperature).exp()  # (vocab,)
    vocab = len(weights)
    limit = min(how.top_k or vocab, vocab)
    for count in (min(_HEAD, vocab), vocab):
        ordered, ids = _most_probable(weights, count)
        complete = len(ordered) >= limit
        if complete or not how.top_k:
            mass = float((ordered[:limit] if complete else weights).sum())
            found = _choose(ordered[:limit], mass, complete, how.top_p, u)
            if found is not None:
                return int(ids[found])
    raise AssertionError("a draw over the whole vocabulary found nothing")


def _most_probable(weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``count`` largest weights in falling order, equal ones by rising id, and their ids.

    What equals the smallest of a partial selection is left out: which of those were selected is arbitrary.
    """
    if count == len(weights):
        everything = weights.sort(descending=True, stable=True)
        return everything.values, everything.indices
    values, ids = weights.topk(count, sorted=False)
    ids = ids[values > values.min()].sort().values
    order = weights[ids].sort(descending=True, stable=True)
    return order.values, ids[order.indices]


def _choose(ordered: torch.Tensor, mass: float, complete: bool, top_p: float, u: float) -> int | None:
    """Index in ``ordered`` of the token drawn, or None when the answer lies beyond it.

    ``mass`` is the weight of all candidates; ``complete`` says that ``ordered`` holds them all.
    """
    sums = ordered.cumsum(0)
    last = len(sums) - 1
    if top_p < 1.0:
        last = int((sums < top_p * mass).sum())  # the token that reaches the share is kept
        if last == len(sums) and not complete:
            return None
        last = min(last, len(sums) - 1)
        mass = float(sums[last])
    found = int((sums <= u * mass).sum())
    if found == len(sums) and not complete:
        return None
    return min(found, last)
