"""Adjustments of logits for tests, and what they mean, one token at a time."""

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
    """Of a map of biases, as a request writes it."""
    given = bias or {}
    return Adjustments(pack(given), np.array(list(given.values()), "<f4").tobytes(), **rest)


def some_adjustments(generator: random.Random, vocab: int) -> tuple[Adjustments, Past]:
    """Adjustments with every edge among them: none of a kind, tokens in all of the lists, tokens many times."""

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
    """A bit for each token, about half of them set, and of the rest of the last byte any."""
    return generator.randbytes(-(-vocab // 8))


def by_definition(logits: torch.Tensor, how: Adjustments, past: Past) -> torch.Tensor:
    """The adjusted logits of one row, (vocab,) float32, as the documentation words them."""
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
    """What a row that draws after ``tokens`` needs."""
    if how is None or how.adjust is None:
        return None
    early = len(tokens) - prompt_tokens < how.adjust.min_tokens
    return Past(pack(tokens[:prompt_tokens]), pack(tokens[prompt_tokens:]), pack(ends if early else ()))


def expected(logits: torch.Tensor, row: Row) -> int:
    """The token of a row whose logits, (vocab,) float32, are known."""
    assert row.sample is not None
    if row.past is not None and row.sample.adjust is not None:
        logits = by_definition(logits, row.sample.adjust, row.past)
    (token,) = draw(logits[None], [row.sample], [row.end])
    return token
