"""Adjustments of logits on torch: their arithmetic to the bit, and that they touch nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from adjustments import adjustments, by_definition, some_adjustments
from memserve.drawing import Sampling
from memserve.engine.adjusting import adjusted, logprobs_of
from memserve.engine.plans import Past, Row
from memserve.tokens import pack, unpack

VOCAB = 500


def _logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _row(how: Sampling, past: Past | None) -> Row:
    return Row(pack([1]), 0, (0,), how, past)


@pytest.mark.parametrize("vocab", [2, 9, VOCAB])
def test_adjusted_logits_are_the_definitions_to_the_bit(vocab: int) -> None:
    """An engine that rounds otherwise would draw other tokens for a stream that comes from another."""
    generator = random.Random(vocab)
    for turn in range(60):
        logits = _logits(1, vocab, turn)
        how, past = some_adjustments(generator, vocab)
        found = adjusted(logits, [_row(Sampling(adjust=how), past)])
        assert torch.equal(found[0], by_definition(logits[0], how, past)), (how, past)


def test_every_adjustment_shows() -> None:
    """The definition above and the code could agree to do nothing."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 3.0]])
    past = Past(prompt=pack([0, 1]), output=pack([2, 2, 0]), forbidden=pack([4]))
    how = adjustments({3: 7.0}, repetition=2.0, frequency=0.5, presence=0.25)
    found = adjusted(logits, [_row(Sampling(adjust=how), past)])[0].tolist()
    # 2/2 - 0.5 - 0.25;  -2*2;  1/2 - 2*0.5 - 0.25;  0.5 + 7;  never
    assert found == [0.25, -4.0, -0.75, 7.5, float("-inf")]


def test_other_rows_and_the_models_logits_stay_as_they_are() -> None:
    """A row's penalties would change its neighbours' answers, or the log probabilities that it is told."""
    logits = _logits(3)
    before = logits.clone()
    how = adjustments({5: 100.0}, presence=1.0)
    rows = [_row(Sampling(), None), _row(Sampling(adjust=how), Past(b"", pack([7]))), _row(Sampling(), None)]
    found = adjusted(logits, rows)

    assert torch.equal(logits, before)
    assert torch.equal(found[::2], before[::2])
    assert sorted((found[1] != before[1]).nonzero()[:, 0].tolist()) == [5, 7]
    assert adjusted(logits, [rows[0], rows[2], rows[0]]) is logits  # rows without adjustments pay for none


def test_log_probabilities_are_those_of_the_softmax() -> None:
    """A client that ranks answers by them would rank by something else."""
    logits = _logits(1)[0].round()  # with ties
    exact = logits.double().log_softmax(-1)
    for token in (0, 17, int(logits.argmax())):
        found = logprobs_of(logits, token, 20)
        ids = list(unpack(found.ids))
        assert found.drawn == pytest.approx(float(exact[token]))
        assert found.values == pytest.approx([float(exact[i]) for i in ids])
        assert ids == sorted(range(VOCAB), key=lambda i: (-float(logits[i]), i))[:20]
    assert logprobs_of(logits, 3, 0).values == ()
