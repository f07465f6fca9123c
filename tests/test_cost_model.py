"""What things cost: steps, prefills in chunks, bytes on their way; and fitting it to what was measured."""

from __future__ import annotations

import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.costs import StepCosts
from memserve.engine.batching import ALONE
from memserve.scheduling.cost_model import CostModel, Link

COSTS = StepCosts(
    dense=((1, 0.010), (8, 0.012), (64, 0.040), (512, 0.400)),
    row_s=1e-4,
    read_s=2e-6,
    pair_s=3e-7,
    chunk_tokens=64,
)
MODEL = CostModel(COSTS)
PRESETS = sorted((Path(__file__).parents[1] / "configs" / "costs").glob("*.toml"))


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(0, 0.010), (1, 0.010), (36, 0.026), (512, 0.4), (1024, 0.81142857)]
)
def test_dense_goes_in_straight_lines(tokens: int, seconds: float) -> None:
    """If it failed, a step between two measured sizes would be mispriced."""
    assert MODEL.batch_s(tokens, 0, 0, 0) == pytest.approx(seconds)


@given(
    tokens=st.integers(1, 3000),
    cached=st.integers(0, 3000),
    streams=st.lists(st.integers(1, 2000), max_size=5),
)
def test_a_prefill_is_the_sum_of_its_steps(tokens: int, cached: int, streams: list[int]) -> None:
    """If it failed, the scheduler's closed form and the engine that the simulator runs step by step would disagree."""
    at = max(0, min(cached, tokens - 1))
    budget = COSTS.chunk_tokens * (1 if streams else ALONE)
    total = 0.0
    beside = [(1, context) for context in streams]
    said = MODEL.prefill_s(tokens, cached, len(streams), sum(streams))
    while at < tokens:
        new = min(budget, tokens - at)
        total += MODEL.step_s([(new, at), *beside])
        at += new
    assert said == pytest.approx(total)


def test_a_step_of_streams_alone() -> None:
    """If it failed, the price of a further stream would be wrong."""
    assert MODEL.decode_s(3, 600) == pytest.approx(MODEL.step_s([(1, 100), (1, 200), (1, 300)]))
    assert MODEL.decode_s(0, 0) == 0.0


def test_scale_stretches_every_step_and_no_transfer() -> None:
    """If it failed, a worker whose cores are shared would be priced as if it were alone."""
    slow = CostModel(COSTS, scale=2.0)
    assert slow.prefill_s(500, 100) == pytest.approx(2 * MODEL.prefill_s(500, 100))
    assert slow.transfer_s(1e6, "mapped") == MODEL.transfer_s(1e6, "mapped")


def test_bytes_wait_for_those_before_them() -> None:
    """If it failed, a busy path would seem free, and every request would take it."""
    model = CostModel(COSTS, links={"shared": Link(0.1), "tcp": Link(0.5, 1e-3)}, swap=Link(0.2, 1e-2))
    assert model.transfer_s(1000, "tcp", queued=2000) == pytest.approx(3.5)
    assert model.handoff_s(0, "tcp", queued=2000) == pytest.approx(0.1)
    assert model.handoff_s(1000, "tcp") == pytest.approx(1.6)
    assert (model.swap_in_s(100), model.swap_in_s(0)) == (pytest.approx(1.2), 0.0)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_is_shipped_loads(path: Path) -> None:
    """If it failed, the simulator could not run a model that this machine cannot."""
    model = CostModel.from_table(tomllib.loads(path.read_text()))
    assert model.steps.token_bytes > 0
    assert model.prefill_s(2000, 1000) < model.prefill_s(2000, 0) < model.prefill_s(4000, 0)


def test_a_wrong_table_is_refused() -> None:
    """If it failed, a mistake in a preset would show as a wrong forecast."""
    with pytest.raises(ValueError, match="growing"):
        CostModel(attrs.evolve(COSTS, dense=((8, 0.1), (8, 0.2))))
    with pytest.raises(TypeError):
        CostModel.from_table({"dense": [[1, 1]], "rows": 1})
