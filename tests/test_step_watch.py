"""How a worker corrects its step costs as it works: for steps of streams, for those with prompts, and beside others."""

from __future__ import annotations

import attrs
import pytest

from memserve.costs import Site
from memserve.engine.load import StepWatch
from memserve.engine.plans import BatchPlan, Row
from memserve.identity import ActorId
from memserve.scheduling.cost_model import CostModel
from memserve.tokens import pack
from placement_world import World, busy
from test_cost_model import COSTS, MODEL


def test_waiting_for_a_neighbours_step_is_no_drift() -> None:
    """A step that had to wait for cores took no longer than measured; with more workers than cores, crowding has it."""
    site = Site("host", cores=2, threads=2)
    plan, seconds = BatchPlan((Row(pack([0]), 0, tuple(range(8)), None),)), MODEL.step_s([(1, 0)])
    for neighbours, drifts in ((1.0, False), (2.0, True)):
        watch, crowded = StepWatch(), COSTS.crowded(site.slices(neighbours), prompts=False)
        for at in range(200):
            watch.began(COSTS, plan, float(at))
            watch.ended(at + crowded * seconds + 0.01, site, neighbours, waited_s=0.01)
        assert (watch.gauges(COSTS, 200.0)["step_cost_scale"] > 1.01) == drifts


def test_figures_of_a_wrong_shape_are_corrected_for_prompts_and_for_streams() -> None:
    """On a busy machine short steps are disturbed more than long ones. One scale for both kinds, which steps of streams
    decide because they are many, would make prompts look as many times too short as streams looked too long."""
    rough = attrs.evolve(COSTS, dense=((1, 0.060), (8, 0.060), (64, 0.080), (512, 0.600)))
    watch, at = StepWatch(), 0.0
    for number in range(4_000):
        streams = [(1, 500)] * 4
        rows = [(64, 0), *streams] if number % 20 == 0 else streams
        plan = BatchPlan(tuple(Row(pack([0] * new), start, (), None) for new, start in rows))
        watch.began(rough, plan, at)
        at += MODEL.step_s(rows)
        watch.ended(at)
    world = World()
    world.report("w0", rough, **busy(0, 4), **watch.gauges(rough, at))
    worker = world.fleet.workers[ActorId("w0.1")]
    assert worker.step_s == pytest.approx(MODEL.decode_s(4, 2000), rel=0.02)
    assert worker.prefill_s(64, 0, world.now) == pytest.approx(MODEL.prefill_s(64, 0, 4, 2000), rel=0.02)


def test_a_kind_of_steps_that_was_not_seen_drifts_as_the_other() -> None:
    """Prompts count as as slow as the streams until they are seen, and a worker without streams tells what it sees."""
    prompt = BatchPlan((Row(pack([0] * 64), 0, (), None),))
    stream = BatchPlan((Row(pack([0]), 64, (), None),))
    for plan, rows in ((prompt, [(64, 0)]), (stream, [(1, 64)])):
        watch = StepWatch()
        for at in range(400):
            watch.began(COSTS, plan, float(at))
            watch.ended(at + 2 * MODEL.step_s(rows))
        gauges = watch.gauges(COSTS, 400.0)
        assert gauges["step_cost_scale"] == pytest.approx(2.0, rel=0.02)
        assert gauges["prompt_cost_scale"] == pytest.approx(2.0, rel=0.02)


def test_a_step_beside_a_neighbour_is_no_drift() -> None:
    """A step slowed down by a neighbour on the host does not change the worker's scale; without a neighbour it does."""
    costs = attrs.evolve(COSTS, decode_crowding=0.8, prefill_crowding=0.5)
    site = Site("host", cores=2, threads=2)
    for tokens, crowded in ((1, 1.8), (64, 1.5)):
        watch, plan = StepWatch(), BatchPlan((Row(pack([0] * tokens), 0, tuple(range(8)), None),))
        seconds = CostModel(costs).step_s([(tokens, 0)]) * crowded
        for at in range(200):
            watch.began(costs, plan, float(at))
            watch.ended(at + seconds, site, neighbours=1)
        assert watch.gauges(costs, 200.0)["step_cost_scale"] == pytest.approx(1.0)
        for at in range(400):
            watch.began(costs, plan, float(at))
            watch.ended(at + seconds, site, neighbours=0)
        assert watch.gauges(costs, 400.0)["step_cost_scale"] == pytest.approx(crowded, rel=0.01)


def test_drafts_are_part_of_the_prediction() -> None:
    """Draft tokens are part of a step's predicted cost, so that speculation does not change the worker's scale. Each
    has a draw, as a row has, but the context is read once for its whole row."""
    watch = StepWatch()
    plan = BatchPlan((Row(pack([0]), 1_000, tuple(range(8)), None, draft=pack([1, 2, 3])),))
    seconds = MODEL.batch_s(4, 4, 1_000, 1_000.5 + 3 * 1_002.5)
    assert seconds < MODEL.step_s([(1, 1_000)] * 4) - 2.9e3 * COSTS.read_s
    for at in range(200):
        watch.began(COSTS, plan, float(at))
        watch.ended(at + seconds)
    assert watch.gauges(COSTS, 300.0)["step_cost_scale"] == pytest.approx(1.0)
