"""Draws the next token of each row from its logits.

A draw uses one uniform number that is a function of (seed, position) alone, so a stream resumed by another
worker continues with the very tokens it would have had. :mod:`memserve.engine.adjusting` adjusts the logits
before the draw. ``uniform`` uses 64-bit integer arithmetic that other kernels can repeat exactly, as
``kernels/native/sampling.hpp`` does. Nothing at module level imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memserve.drawing import Sampling

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
HEAD = 256
"""Most draws fall among this many most probable tokens, so the whole vocabulary need not be sorted."""
WIDE = 4096
"""Nearly all other draws fall among so many: the most for which torch sorts many rows in one kernel on a GPU."""
ELSEWHERE = -1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), equal on every machine: ``mix(mix(seed) + (position + 1) * gamma)``, top 53 bits.

    ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); all arithmetic is modulo
    2**64. The seed is mixed first because users choose small neighbouring seeds, whose streams must not be
    shifted copies of each other.
    """
    return (_mix(_mix(seed & _MASK) + (position + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def draw(logits: torch.Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """Draw one token per row. ``logits``: (rows, vocab) float32; ``positions``: those of the drawn tokens.

    Raises FloatingPointError, naming the row, when a row's largest logit is not finite.
    """
    best, ids = logits.max(dim=-1)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).nonzero()[0, 0])
        raise FloatingPointError(f"row {row}: the largest logit is {float(best[row])}")
    tokens: list[int] = ids.tolist()
    for row, (how, position) in enumerate(zip(settings, positions, strict=True)):
        if not how.greedy:
            tokens[row] = _draw_one(logits[row], how, uniform(how.seed, position))
    return tokens


def draws(
    logits: torch.Tensor, settings: Sequence[Sampling], positions: Sequence[int], head: int = HEAD
) -> torch.Tensor:
    """The draws of :func:`draw`, made on the logits' device without waiting for it: (rows,) int64.

    ``logits``: (rows, vocab) float32. A row gets ``ELSEWHERE`` where its token is not among the ``head`` most
    probable ones; then only a larger ``head``, or :func:`draw`, finds it.
    """
    import numpy as np
    import torch

    from memserve.kernels.sending import sent

    us = [uniform(how.seed, position) for how, position in zip(settings, positions, strict=True)]
    vocab = logits.shape[1]
    columns = sent(
        np.array(
            [
                [how.temperature or 1.0, min(how.top_k or vocab, vocab), how.top_p, u, how.reach, how.greedy]
                for how, u in zip(settings, us, strict=True)
            ]
        ),
        logits.device,
    )
    temperature, top_k, top_p, u, least, greedy = columns[:, :, None].unbind(1)
    bounded = any(how.min_p > 0 for how in settings)
    tokens, found = _draw_near(logits, temperature, top_k, top_p, u, least if bounded else None, head)
    answer = torch.where(found, tokens, ELSEWHERE)
    if any(how.greedy for how in settings):
        answer = torch.where(greedy[:, 0] > 0, logits.max(dim=-1).indices, answer)
    return answer


def _draw_near(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    u: torch.Tensor,
    least: torch.Tensor | None,
    head: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_draw_one`` for all rows at once, on their ``head`` most probable tokens.

    Parameters are (rows, 1) float64. ``least``: :attr:`~memserve.drawing.Sampling.reach` of each row, or None where no row has a min_p.
    Returns (rows,) tokens, and (rows,) flags that say whether each is the answer.
    """
    import torch

    below = logits - logits.max(dim=-1, keepdim=True).values
    weights = (below / temperature).exp_()  # float64, as the temperatures are
    vocab = weights.shape[1]
    limit = top_k
    if least is not None:
        limit = torch.minimum(top_k, (below >= least).sum(-1, keepdim=True).double())
    # Weights rise with logits, and selecting float32 takes a GPU half the passes over half the bytes.
    ids = below.topk(min(head, vocab), dim=-1, sorted=False).indices.sort(dim=-1).values
    order = weights.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ordered, ids = order.values, ids.gather(1, order.indices)
    # Ties with the smallest weight of a partial selection are left out: topk selects among them arbitrarily.
    whole = ordered.shape[1] == vocab
    known = torch.full_like(limit, vocab) if whole else (ordered > ordered[:, -1:]).sum(-1, keepdim=True)
    complete = known >= limit
    taken = torch.where(complete, limit, known.double())
    inside = torch.arange(ordered.shape[1], device=ordered.device) < taken
    ordered = ordered * inside
    sums = ordered.cumsum(-1)
    mass = torch.where(complete, ordered.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
    reached = ((sums < top_p * mass) & inside).sum(-1, keepdim=True)
    cut = top_p < 1.0
    last = torch.where(cut, reached, taken.long() - 1).clamp(max=taken.long() - 1).clamp(min=0)
    beyond = cut & (reached == taken) & ~complete
    mass = torch.where(cut, sums.gather(1, last), mass)
    found = ((sums <= u * mass) & inside).sum(-1, keepdim=True)
    beyond |= (found == taken) & ~complete | (~complete & (limit < vocab))
    return ids.gather(1, torch.minimum(found, last))[:, 0], ~beyond[:, 0]


def _draw_one(logits: torch.Tensor, how: Sampling, u: float) -> int:
    """Inverse of the cumulative distribution over tokens by falling probability, then rising id.

    The filters apply in vLLM's order. min_p keeps tokens within :attr:`~memserve.drawing.Sampling.reach` of the most probable one. top_k
    keeps that many of them. top_p keeps the fewest of those that reach that share of their total probability.
    The draw is among the kept tokens, in proportion to their probabilities. Sums are float64, so that 50,000
    small terms keep their order.
    """
    below = (logits - logits.max()).double()  # (vocab,)
    weights = (below / how.temperature).exp()
    vocab = len(weights)
    limit = min(how.top_k or vocab, vocab)
    if how.min_p > 0:
        limit = min(limit, int((below >= how.reach).sum()))
    for count in (min(HEAD, vocab), vocab):
        ordered, ids = _most_probable(weights, count)
        complete = len(ordered) >= limit
        if complete or limit == vocab:
            mass = float((ordered[:limit] if complete else weights).sum())
            found = _choose(ordered[:limit], mass, complete, how.top_p, u)
            if found is not None:
                return int(ids[found])
    raise AssertionError("a draw over the whole vocabulary found nothing")


def _most_probable(weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``count`` largest weights in falling order, equal ones by rising id, and their ids.

    Ties with the smallest weight of a partial selection are left out: topk selects among them arbitrarily.
    """
    if count == len(weights):
        everything = weights.sort(descending=True, stable=True)
        return everything.values, everything.indices
    values, ids = weights.topk(count, sorted=False)
    ids = ids[values > values.min()].sort().values
    order = weights[ids].sort(descending=True, stable=True)
    return order.values, ids[order.indices]


def _choose(ordered: torch.Tensor, mass: float, complete: bool, top_p: float, u: float) -> int | None:
    """Index in ``ordered`` of the drawn token, or None when it lies beyond ``ordered``.

    ``mass``: total weight of all candidates; ``complete``: whether ``ordered`` holds them all.
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
