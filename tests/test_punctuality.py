"""The margin that deadlines need beyond predictions: as large as the lateness so far, and no larger."""

from __future__ import annotations

import random

import pytest

from memserve.scheduling.punctuality import FIXED_S, KEPT, SHARE_KEPT_S, SHARE_MAX, Punctuality, margin_s


def late_of(punctuality: Punctuality, lateness: list[float], predicted_s: float = 0.75) -> float:
    """The share of first tokens that come later than prediction and margin, if they are late by so many seconds."""
    late = 0
    for seconds in lateness:
        late += seconds > margin_s(punctuality.share(0.0), predicted_s)
        punctuality.saw(predicted_s, predicted_s + seconds, 0.0)
    return late / len(lateness)


def test_nearly_all_first_tokens_are_within_the_margin() -> None:
    """The margin covers the share KEPT of first tokens, and not more."""
    rng, punctuality = random.Random(1), Punctuality()
    late_of(punctuality, [rng.gauss(0.1, 0.05) for _ in range(500)])
    late = late_of(punctuality, [rng.gauss(0.1, 0.05) for _ in range(5000)])
    assert late == pytest.approx(1 - KEPT, abs=0.01)


def test_predictions_that_hold_need_no_margin() -> None:
    """The margin disappears when predictions hold."""
    punctuality = Punctuality()
    late_of(punctuality, [0.2] * 20)
    assert punctuality.share(0.0) > 0.1
    late_of(punctuality, [-0.01] * 1000)
    assert punctuality.share(0.0) == 0.0


def test_a_worker_that_stood_still_costs_a_bounded_margin() -> None:
    """The margin is limited, and one long pause changes it little."""
    punctuality = Punctuality()
    late_of(punctuality, [600.0] * 1000)
    assert punctuality.share(0.0) == SHARE_MAX
    punctuality = Punctuality()
    late_of(punctuality, [600.0])
    assert margin_s(punctuality.share(0.0), 1.0) < 0.05


def test_a_margin_is_more_than_a_share_of_short_predictions() -> None:
    """The margin has a fixed part too: short prompts also wait for the end of a step."""
    assert margin_s(0.1, 0.0) == pytest.approx(0.1 * FIXED_S)
    assert margin_s(0.1, 1.0) == pytest.approx(0.1 * (1.0 + FIXED_S))


def test_lateness_is_forgotten_while_nobody_comes() -> None:
    """If it were not, a deadline could be refused for ever: the share shrinks only with first tokens in time."""
    punctuality = Punctuality()
    late_of(punctuality, [600.0] * 1000)
    assert punctuality.share(SHARE_KEPT_S) == SHARE_MAX
    assert punctuality.share(SHARE_KEPT_S + 60.0) < 0.02
    punctuality.saw(1.0, 1.0, SHARE_KEPT_S + 60.0)
    assert punctuality.share(SHARE_KEPT_S + 60.0) < 0.02
