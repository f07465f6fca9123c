"""Adjustments of logits for tests, and a reference implementation that applies them one token at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from memserve.drawing import Adjustments, Sampling
from memserve.engine.plans import Past, Row
from memserve.engine.sampling import draw
from memserve.tokens import pack, unpack


def adjustments(bias: dict[int, float] | None = None, **rest: float) -> Adjustments:
    """Adjustments from a map of token to bias, as a request gives it, and other fields."""
    given = bias or {}
    return Adjustments(pack(given), np.array(list(given.values()), "<f4").tobytes(), **rest)


def some_adjustments(generator: random.Random, vocab: int) -> tuple[Adjustments, Past]:
    """Random adjustments that cover the edge cases: empty lists, tokens in several lists, repeated tokens."""

    def some(most: int) -> list[int]:
        favourite = generator.randrange(vocab)
        tokens = [
            generator.choice((favourite, generator.randrange(vocab)))
            for _ in range(generator.randrange(most))
        ]
        return generator.choice(([], tokens))

    bias = {token: generator.choice((-100, 100, generator.gauss(0, 3))) for token in some(40)}
    forbidden = some(vocab)[: vocab // 2]
    how = adjustments(
        bias,
        repetition=generator.choice((1.0, 1.1, 0.7, generator.uniform(0.5, 2))),
        frequency=generator.choice((0.0, 0.3, -0.2, generator.uniform(-2, 2))),
        presence=generator.choice((0.0, 1.7, -0.4, generator.uniform(-2, 2))),
    )
    return how, Past(
        pack(some(60)),
        pack(some(300)),
        pack(set(forbidden)),
        generator.choice((b"", some_allowed(generator, vocab))),
    )


def some_allowed(generator: random.Random, vocab: int) -> bytes:
    """A bit for each token, about half of them set; the unused bits of the last byte are random too."""
    return generator.randbytes(-(-vocab // 8))


def by_definition(logits: torch.Tensor, how: Adjustments, past: Past) -> torch.Tensor:
    """The adjusted logits of one row, (vocab,) float32, computed as the documentation defines them."""
    single, found = np.float32, []
    bias = dict(zip(unpack(how.biased), np.frombuffer(how.bias, "<f4"), strict=True))
    output, seen = list(unpack(past.output)), set(unpack(past.prompt + past.output))
    forbidden = set(unpack(past.forbidden))
    for token, logit in enumerate(logits.numpy()):
        logit = logit + bias.get(token, single(0))
        if token in seen:
            logit = logit / single(how.repetition) if logit > 0 else logit * single(how.repetition)
        if times := output.count(token):
            logit = logit - single(how.frequency) * single(times)
            logit = logit - single(how.presence)
        allowed = not past.allowed or past.allowed[token // 8] >> token % 8 & 1
        found.append(logit if allowed and token not in forbidden else -np.inf)
    return torch.from_numpy(np.array(found, np.float32))


def past_of(
    how: Sampling | None, tokens: Sequence[int], prompt_tokens: int, ends: Sequence[int] = ()
) -> Past | None:
    """The past of a row that draws after ``tokens``; None if it has no adjustments."""
    if how is None or how.adjust is None:
        return None
    early = len(tokens) - prompt_tokens < how.adjust.min_tokens
    forbidden, allowed = pack(ends if early else ()), how.adjust.allowed
    return Past(pack(tokens[:prompt_tokens]), pack(tokens[prompt_tokens:]), forbidden, allowed)


def mask_of(tokens: Sequence[int], vocab: int) -> bytes:
    """A bit mask of the vocabulary with these tokens' bits set."""
    return sum(1 << token for token in {*tokens}).to_bytes(-(-vocab // 8), "little")


def expected(logits: torch.Tensor, row: Row) -> int:
    """The token that a row must draw from its logits, (vocab,) float32."""
    assert row.sample is not None
    if row.past is not None and row.sample.adjust is not None:
        logits = by_definition(logits, row.sample.adjust, row.past)
    (token,) = draw(logits[None], [row.sample], [row.end])
    return token
