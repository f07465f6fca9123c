"""Draws: their distribution, their determinism, and the edge cases of the settings."""

from __future__ import annotations

import pytest
import torch

from memserve.drawing import Sampling
from memserve.engine.sampling import draw, uniform

VOCAB = 1000


def _logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _by_definition(logits: torch.Tensor, how: Sampling, u: float) -> int:
    """The draw as the documentation defines it, one token at a time."""
    weights = ((logits - logits.max()).double() / how.temperature).exp().tolist()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    least = how.min_p * weights[order[0]]
    order = [token for token in order if weights[token] >= least][: how.top_k or len(order)]
    mass = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += weights[token]
        if how.top_p < 1 and reached >= how.top_p * mass:
            break
    target, passed = u * reached, 0.0
    for token in kept:
        passed += weights[token]
        if passed > target:
            return token
    return kept[-1]


def test_uniform_is_pinned() -> None:
    """The random numbers are fixed for ever: resumed streams and GPU kernels depend on them."""
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # SplitMix64's first output from seed 0
    assert [uniform(0, 1), uniform(1, 0), uniform(-1, 7)] == [
        0.43152799704850997,
        0.7497482413580301,
        0.7741445495399422,
    ]
    assert uniform(2**64 - 1, 7) == uniform(-1, 7)


def test_uniform_is_uniform_and_uncorrelated() -> None:
    """Numbers of neighbouring seeds and positions are uniform and not correlated."""
    grid = torch.tensor([[uniform(seed, position) for position in range(400)] for seed in range(50)])

    assert float(grid.min()) >= 0 and float(grid.max()) < 1
    assert abs(float(grid.mean()) - 0.5) < 0.01
    assert abs(float(grid.var()) - 1 / 12) < 0.005
    assert float(torch.corrcoef(grid).fill_diagonal_(0).abs().max()) < 0.25
    counts = torch.histc(grid, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-square, 19 degrees of freedom, p < 0.001


@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=5.0),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=2.0, top_k=700),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=4.0, top_p=0.95),
        Sampling(temperature=3.0, top_k=400, top_p=0.9),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=2.0, min_p=0.05),
        Sampling(temperature=8.0, min_p=0.3, top_p=0.7),
        Sampling(temperature=9.0, min_p=0.5, top_k=3),
        Sampling(temperature=1.0, min_p=1.0),
    ],
)
def test_draws_equal_the_definition(how: Sampling) -> None:
    """Draws equal the definition for every combination of settings."""
    logits = _logits(1)
    for position in range(60):
        [token] = draw(logits, [how], [position])
        assert token == _by_definition(logits[0], how, uniform(how.seed, position))


def test_equal_logits_are_ordered_by_id() -> None:
    """Tokens with equal logits are ordered by id, so that draws do not differ between machines."""
    logits = torch.zeros(1, VOCAB)
    for position in range(50):
        [token] = draw(logits, [Sampling()], [position])
        assert token == int(uniform(0, position) * VOCAB)
    assert draw(logits, [Sampling(top_k=10)], [3]) == [int(uniform(0, 3) * 10)]


def test_frequencies_follow_the_probabilities() -> None:
    """Over many positions, tokens are drawn as often as their probabilities say."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    expected = logits.softmax(-1)[0]
    drawn = torch.tensor([draw(logits, [Sampling(seed=11)], [position])[0] for position in range(4000)])

    assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, expected, atol=0.025)


def test_rows_of_a_batch_do_not_influence_each_other() -> None:
    """The draw of a row does not depend on the other rows of its batch."""
    logits = _logits(5)
    settings = [
        Sampling(temperature=0.0),
        Sampling(seed=3),
        Sampling(temperature=0.7, top_k=20, seed=3),
        Sampling(top_p=0.8),
        Sampling(temperature=1.0, top_k=1),
    ]
    together = draw(logits, settings, [4, 9, 2, 0, 5])
    alone = [
        draw(logits[row : row + 1], [how], [position])[0]
        for row, (how, position) in enumerate(zip(settings, [4, 9, 2, 0, 5], strict=True))
    ]

    assert together == alone
    assert together[0] == int(logits[0].argmax())
    assert together[4] == int(logits[4].argmax())


def test_greedy_takes_the_lowest_of_equals() -> None:
    """A greedy draw takes the lowest id among the largest logits."""
    logits = torch.zeros(1, 50_000)
    logits[0, [7, 49_000]] = 1.0

    assert draw(logits, [Sampling(temperature=0.0)], [0]) == [7]


def test_logits_that_are_not_numbers_are_refused() -> None:
    """NaN logits raise an error that names the row."""
    logits = torch.zeros(2, 8)
    logits[1, 3] = float("nan")

    with pytest.raises(FloatingPointError, match="row 1"):
        draw(logits, [Sampling(), Sampling()], [0, 0])
