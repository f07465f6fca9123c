"""The cost model: the seconds of steps, chunked prefills and transfers, and fitting them to measurements."""

from __future__ import annotations

import errno
import math
import os
import random
import time
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.costs import StepCosts
from memserve.engine.batching import ALONE
from memserve.engine.calibration import (
    BUDGET_S,
    PATIENCE_S,
    TimeStep,
    calibrated,
    cases,
    crowding,
    measure,
    patient,
)
from memserve.engine.cpu_budget import threads_had
from memserve.engine.load import StepWatch, swap_least
from memserve.engine.plans import BatchPlan, Row, Score
from memserve.identity import ActorId
from memserve.messages import Cluster, Member
from memserve.scheduling.cost_fit import HALF_S, KEPT_S, PROVEN_STEPS, Drift, Rows, Sample, fit_steps
from memserve.scheduling.cost_model import CostModel, LinkModel
from memserve.scheduling.joining import AT_WORK_S, JoiningCore
from memserve.tokens import pack

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
    """Costs between and beyond the measured sizes follow straight lines."""
    assert MODEL.batch_s(tokens, 0, 0, 0) == pytest.approx(seconds)


@given(
    tokens=st.integers(1, 3000),
    cached=st.integers(0, 3000),
    streams=st.lists(st.integers(1, 2000), max_size=5),
)
def test_a_prefill_is_the_sum_of_its_steps(tokens: int, cached: int, streams: list[int]) -> None:
    """The closed form for a prefill equals the sum of its steps, which is what the simulator runs."""
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
    """The cost of a decode step depends on the number of streams and the sum of their contexts."""
    assert MODEL.decode_s(3, 600) == pytest.approx(MODEL.step_s([(1, 100), (1, 200), (1, 300)]))
    assert MODEL.decode_s(0, 0) == 0.0


def test_scale_stretches_every_step_and_no_transfer() -> None:
    """A worker's scale multiplies the cost of its steps and leaves transfers as they are."""
    slow = CostModel(COSTS, scale=2.0)
    assert slow.prefill_s(500, 100) == pytest.approx(2 * MODEL.prefill_s(500, 100))
    assert slow.swap_in_s(1e6) == MODEL.swap_in_s(1e6) and slow.handoff_s == MODEL.handoff_s


def test_handoffs_and_swaps() -> None:
    """A handoff costs its fixed part, and a swap its fixed part and a part for each byte."""
    model = CostModel(COSTS, links={"shared": LinkModel(0.1)}, swap=LinkModel(0.2, 1e-2))
    assert model.handoff_s == 0.1
    assert (model.swap_in_s(100), model.swap_in_s(0)) == (pytest.approx(1.2), 0.0)


def test_from_where_a_swap_in_pays() -> None:
    """At the break-even length a swap-in takes as long as computing; where bytes are slower there is no such length."""
    steps = StepCosts(((1, 0.01), (512, 0.512)), chunk_tokens=256, token_bytes=1000)
    model = CostModel(steps, swap=LinkModel(0.02, 1e-7))
    tokens = model.swap_break_even()
    assert model.swap_in_s(tokens * 1000) == pytest.approx(tokens * 0.001)
    assert CostModel(steps, swap=LinkModel(0.02, 1e-6)).swap_break_even() == math.inf
    assert swap_least(steps, 100) == 2 and swap_least(None, 100) == 0


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_is_shipped_loads(path: Path) -> None:
    """Every cost preset that is shipped loads and gives plausible prices."""
    model = CostModel.from_table(tomllib.loads(path.read_text()))
    assert model.steps.token_bytes > 0
    assert model.prefill_s(2000, 1000) < model.prefill_s(2000, 0) < model.prefill_s(4000, 0)


def test_a_wrong_table_is_refused() -> None:
    """A cost table whose sizes do not grow, or with unknown keys, is refused."""
    with pytest.raises(ValueError, match="growing"):
        CostModel(attrs.evolve(COSTS, dense=((8, 0.1), (8, 0.2))))
    with pytest.raises(TypeError):
        CostModel.from_table({"dense": [[1, 1]], "rows": 1})
    for wrong in (
        {"row_s": "x"}, {"row_s": -1.0}, {"dense": [[1, math.nan]]}, {"chunk_tokens": 0}, {"links": 3},
        {"links": {"tcp": {"byte_s": math.inf}}}, {"swap": {"fixed_s": -1}},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            CostModel.from_table({"dense": [[1, 1]], **wrong})


# ---- fitting -------------------------------------------------------------------------------------------------

KNOTS = (1, 8, 64, 512)


def sampled(costs: StepCosts, rng: random.Random, number: int, noise: float) -> list[Sample]:
    """Steps of all kinds with these costs, with relative errors of up to ``noise``."""
    model = CostModel(costs)
    shapes = []
    for _ in range(number):
        streams = [(1, rng.randrange(1, 2000)) for _ in range(rng.choice((0, 1, 2, 7, 30)))]
        prompts = (
            [(rng.randrange(1, 450), rng.randrange(0, 1500))] if not streams or rng.random() < 0.5 else []
        )
        shapes.append([*prompts, *streams])
    return [Sample(one, model.step_s(one) * (1 + rng.uniform(-noise, noise))) for one in shapes]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_fit_finds_the_costs_that_made_the_samples(noise: float) -> None:
    """Fitting samples finds the costs that made them, also if the samples are noisy."""
    rng = random.Random(3)
    found = fit_steps(sampled(COSTS, rng, 60, noise), KNOTS, 64, 7)
    assert (found.chunk_tokens, found.token_bytes) == (64, 7)
    if not noise:
        assert found.pair_s == pytest.approx(COSTS.pair_s, rel=1e-3)
        assert found.read_s == pytest.approx(COSTS.read_s, rel=1e-3)
        assert [one for _, one in found.dense] == pytest.approx([one for _, one in COSTS.dense], rel=1e-3)
    fresh = sampled(COSTS, random.Random(4), 200, 0.0)
    model = CostModel(found)
    errors = [abs(model.step_s(one.rows) / one.seconds - 1) for one in fresh]
    assert sum(errors) / len(errors) < (0.001 if not noise else 0.03)


def test_no_figure_is_below_zero() -> None:
    """No fitted figure is negative, and costs grow with the size of a step: a longer prompt must not be cheaper."""
    rng = random.Random(5)
    costs = attrs.evolve(COSTS, row_s=0.0, read_s=0.0)
    found = fit_steps(sampled(costs, rng, 40, 0.3), KNOTS, 64, 0)
    assert min(found.row_s, found.read_s, found.pair_s, *(one for _, one in found.dense)) >= 0
    seconds = [one for _, one in found.dense]
    assert seconds == sorted(seconds)
    with pytest.raises(ValueError, match="too few to fit"):
        fit_steps(sampled(costs, rng, 5, 0.0), KNOTS, 64, 0)


def test_drift_follows_slowly_and_shrugs_at_outliers() -> None:
    """The scale of a worker follows a lasting change of speed, moves little at outliers and is limited to 16."""
    drift = Drift()
    drift.saw(0.01, 10.0, 0.0)
    assert 1.0 < drift.scale(0.0) < 1.02
    for _ in range(400):
        drift.saw(0.01, 0.02, 0.0)
    assert drift.scale(0.0) == pytest.approx(2.0, rel=0.02)
    for _ in range(20_000):
        drift.saw(0.01, 1e9, 0.0)
    assert drift.scale(0.0) == pytest.approx(16.0)
    drift.saw(0.0, 1.0, 0.0)
    assert drift.scale(0.0) == pytest.approx(16.0)


def at_work(drift: Drift, factor: float, steps: int, now: float) -> float:
    """Run ``steps`` steps that take ``factor`` times as long as by the figures; the time then."""
    for _ in range(steps):
        now += 0.01 * factor
        drift.saw(0.01, 0.01 * factor, now)
    return now


def test_that_steps_were_slow_is_forgotten_while_there_are_none() -> None:
    """Where slow steps keep requests away, nothing else could show that they are fast again."""
    drift = Drift()
    now = at_work(drift, 3.0, 400, 0.0)
    assert drift.scale(now + KEPT_S) == pytest.approx(3.0, rel=0.05)
    assert drift.scale(now + KEPT_S + HALF_S) == pytest.approx(3.0**0.5, rel=0.05)
    assert drift.scale(now + 600.0) == pytest.approx(1.0)
    now = at_work(drift, 3.0, 40, now + 600.0)
    assert drift.scale(now) > 2.0, "it takes fewer steps to learn it again"
    now = at_work(drift, 0.5, 400, now)
    assert drift.scale(now + 600.0) == pytest.approx(0.5, rel=0.05), "that they are fast is no reason to wait"


def test_rough_figures_are_taken_to_be_too_high_until_steps_prove_them() -> None:
    """A worker that measured beside other programs looks slow, and would get no request to correct that."""
    drift = Drift()
    drift.begin(rough=True, now=100.0)
    assert drift.scale(100.0 + KEPT_S) == 1.0
    assert drift.scale(100.0 + 30.0) < 1 / 3
    now = at_work(drift, 1 / 3, 40, 130.0)
    assert drift.scale(now) == pytest.approx(1 / 3, rel=0.1)
    now = at_work(drift, 1.0, 2 * PROVEN_STEPS, now)
    assert drift.scale(now) == pytest.approx(1.0, rel=0.1)
    assert drift.scale(now + 600.0) == pytest.approx(drift.scale(now))


# ---- calibration -----------------------------------------------------------------------------------------------


def test_measuring_finds_an_engine_of_known_costs() -> None:
    """Calibration finds the costs and the number of threads of an engine with known costs."""
    costs = attrs.evolve(COSTS, dense=((1, 0.010), (8, 0.012), (64, 0.040), (128, 0.100)))
    model = CostModel(costs)
    found, threads = measure(lambda rows: (model.step_s(rows), 2), 64, 32, 512, 9)
    assert (threads, found.token_bytes, found.chunk_tokens) == (2, 9, 64)
    fitted = CostModel(found)
    for rows in ([(1, 300)], [(1, 30)] * 5, [(100, 0)], [(64, 400), (1, 200), (1, 100)], [(128, 0)]):
        assert fitted.step_s(rows) == pytest.approx(model.step_s(rows), rel=0.02)


def test_measuring_finds_what_crowding_costs() -> None:
    """Calibration finds how much slower decode and prefill steps are on part of the threads."""
    costs = attrs.evolve(COSTS, decode_crowding=0.0, prefill_crowding=0.0, chunk_tokens=64)

    def on(threads: int) -> TimeStep:
        shares = {1: (0.8, 0.5), 2: (0.0, 0.0)}[threads]
        return lambda rows: (0.01 * (1.0 + shares[len(rows) == 1]), threads)

    found = crowding(costs, on(2), on(1), 512)
    assert (found.decode_crowding, found.prefill_crowding) == pytest.approx((0.8, 0.5))
    assert attrs.evolve(found, decode_crowding=0.0, prefill_crowding=0.0) == costs
    assert crowding(COSTS, on(1), on(1), 512) is None, "nothing to measure without more threads"
    assert crowding(COSTS, on(2), lambda rows: (0.01, 0), 512) is None, "other programs had the cores"


@pytest.mark.parametrize(
    "more", [{"score": Score(pack([0]), 1)}, {"draft_most": 8}], ids=["scored", "forced"]
)
def test_a_step_that_does_more_than_was_foreseen_is_no_drift(more: dict[str, Any]) -> None:
    """Steps whose work cannot be predicted, such as scoring a prompt or forced tokens, do not change the worker's scale."""
    watch, row = StepWatch(), Row(pack([0] * 64), 0, tuple(range(8)), None)
    plain, longer = BatchPlan((row,)), BatchPlan((attrs.evolve(row, **more),))
    seconds = CostModel(COSTS).step_s([(64, 0)])
    for at in range(200):
        watch.began(COSTS, longer, float(at))
        watch.ended(at + 2 * seconds)
    assert watch.gauges(COSTS, 300.0)["step_cost_scale"] == 1.0
    watch.began(COSTS, plain, 300.0)
    watch.ended(300.0 + 2 * seconds)
    assert watch.gauges(COSTS, 300.0)["step_cost_scale"] > 1.0


def test_a_step_without_all_of_its_threads_is_tried_again() -> None:
    """Calibration repeats a step that lacked threads, up to PATIENCE_S in all: other workers may be loading."""
    had, slept = iter([1, 1, 2, 2, *[1] * 1000]), []
    run = patient(lambda rows: (0.01, next(had)), 2, slept.append)
    assert run(((1, 16),)) == (0.01, 2)
    assert len(slept) == 2
    assert run(((1, 16),)) == (0.01, 2)
    assert run(((1, 16),)) == (0.01, 1)  # for good: it serves with what there is
    assert 0.9 * PATIENCE_S < sum(slept) + 0.01 * len(slept) < PATIENCE_S + 0.1
    assert run(((1, 16),)) == (0.01, 1)


def test_a_measurement_is_made_once_and_kept_if_it_had_its_threads(tmp_path: Path) -> None:
    """A measurement is stored and reused; one made with too few threads is reused for a while only."""
    calls = []

    def measuring(threads: int):
        calls.append(threads)
        return COSTS, threads

    name: dict[str, object] = {"model": "m"}
    few = attrs.evolve(COSTS, rough=True)
    assert calibrated(tmp_path, name, lambda: measuring(1), 2) == few
    assert calibrated(tmp_path, name, lambda: measuring(5), 2) == few
    (rough,) = tmp_path.glob("*.rough")
    os.utime(rough, (0, 0))
    assert calibrated(tmp_path, name, lambda: measuring(2), 2) == COSTS
    assert calibrated(tmp_path, name, lambda: measuring(3), 2) == COSTS
    assert calibrated(tmp_path, {"model": "other"}, lambda: measuring(4), 2) == COSTS
    assert calls == [1, 2, 4]


def test_figures_from_a_busy_machine_serve_for_a_while(tmp_path: Path) -> None:
    """If they were remembered for good, later clusters would place requests by costs twice too high."""
    slow, name = attrs.evolve(COSTS.scaled(2.0), rough=True), {"model": "m"}
    assert calibrated(tmp_path, name, lambda: (slow, threads_had(1, 0.02, 0.02)), 1) == slow
    assert calibrated(tmp_path, name, lambda: pytest.fail("measured"), 1) == slow
    later = time.time() + 3600.0  # as if the clock had been wrong then
    os.utime(next(tmp_path.glob("*.rough")), (later, later))
    measured = []
    calibrated(tmp_path, name, lambda: (measured.append(1) or slow, 0), 1)
    assert measured
    os.utime(next(tmp_path.glob("*.rough")), (0, 0))
    assert calibrated(tmp_path, name, lambda: (COSTS, threads_had(1, 0.02, 0.001)), 1) == COSTS
    assert calibrated(tmp_path, name, lambda: pytest.fail("measured"), 1) == COSTS


def test_rough_figures_give_way_to_those_of_a_worker_that_begins_meanwhile(tmp_path: Path) -> None:
    """If they did not, a worker that joins beside a busy one would look slow, and never get a request."""
    at_work = iter([None, COSTS])
    found = calibrated(tmp_path, {"model": "m"}, lambda: (COSTS.scaled(3.0), 0), 2, lambda: next(at_work))
    assert found == COSTS and not list(tmp_path.glob("*.rough"))


def test_of_a_disturbed_step_and_another_the_other_counts() -> None:
    """A step beside a busy program takes longer; a repeat without one is what the engine costs."""
    runs = iter(range(10**6))

    def run(rows: Rows) -> tuple[float, int]:
        disturbed = next(runs) % 2
        return MODEL.step_s(rows) * (0.5 + disturbed), 2 if disturbed else 0

    found, threads = measure(run, 64, 32, 512, 9)
    assert threads == 2
    assert CostModel(found).step_s([(64, 0)]) == pytest.approx(1.5 * MODEL.step_s([(64, 0)]), rel=0.05)
    assert measure(lambda rows: (MODEL.step_s(rows), 0), 64, 32, 512, 9)[1] == 0


def test_a_full_disk_keeps_no_worker_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a worker that dies while the disk is full would not come back."""

    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert calibrated(tmp_path, {"model": "m"}, lambda: (COSTS, 2), 2) == COSTS
    assert [one.name for one in tmp_path.iterdir()] == ["costs.lock"]


def test_figures_in_a_cache_that_is_read_only_serve(tmp_path: Path) -> None:
    """If it failed, no worker would start from an image that brings its cache along."""
    name: dict[str, object] = {"model": "m"}
    calibrated(tmp_path, name, lambda: (COSTS, 2), 2)
    (tmp_path / "costs.lock").unlink()
    (
        tmp_path / "costs.lock"
    ).mkdir()  # cannot be opened, as in a read-only folder; root may write to any other
    assert calibrated(tmp_path, name, lambda: pytest.fail("measured"), 2) == COSTS
    assert calibrated(tmp_path, {"model": "other"}, lambda: (COSTS, 2), 2) == COSTS


def test_nothing_is_measured_beside_streams(tmp_path: Path) -> None:
    """A worker that joins under load takes the costs of another worker, unless it has good ones of its own."""
    like = attrs.evolve(COSTS, row_s=7.0)

    def measuring():
        raise AssertionError("measured")

    assert calibrated(tmp_path, {"model": "m"}, measuring, 2, lambda: like) == like
    assert calibrated(tmp_path, {"model": "m"}, lambda: (COSTS, 1), 2).rough, "nothing was remembered"
    assert calibrated(tmp_path, {"model": "m"}, measuring, 2, lambda: like) == like, (
        "not what may be from such steps"
    )
    os.utime(next(tmp_path.glob("*.rough")), (0, 0))
    assert calibrated(tmp_path, {"model": "m"}, lambda: (COSTS, 2), 2) == COSTS
    assert calibrated(tmp_path, {"model": "m"}, measuring, 2, lambda: like) == COSTS, "its own are better"


@pytest.mark.parametrize(
    ("load", "shard", "taken"), [(1.0, "s0.1", True), (0.0, "s0.1", False), (1.0, "s1.1", False)]
)
def test_whose_figures_a_joining_worker_takes(load: float, shard: str, taken: bool) -> None:
    """A joining worker takes costs only from a busy worker on its own shard, corrected as that one corrects them."""
    core = JoiningCore(ActorId("d1.1"), "s0")
    worker = Member(ActorId("d0.1"), "DecodeWorker", "", 1, "ready", "decode", ActorId(shard))
    worker = attrs.evolve(worker, load={"requests_running": load, "step_cost_scale": 0.5}, costs=COSTS)
    home = Member(ActorId("s0.1"), "MemPoolShard", "", 1, "ready")
    core.receive(ActorId("scheduler-0.1"), Cluster(ActorId("scheduler-0.1"), (home, worker)), 0.0)
    assert core.found == home.id
    assert core.at_work == (COSTS.scaled(0.5) if taken else None)
    core.receive(ActorId("scheduler-0.1"), Cluster(ActorId("scheduler-0.1"), ()), 1.0)
    core.advance(AT_WORK_S - 0.1)
    assert core.at_work == (COSTS.scaled(0.5) if taken else None), "between two requests it is no other"
    core.advance(AT_WORK_S)
    assert (core.found, core.at_work, core.deadline) == (home.id, None, float("inf"))


@pytest.mark.parametrize(
    ("chunk", "rows", "context"), [(1, 1, 16), (16, 4, 64), (4096, 64, 16), (256, 32, 1024)]
)
def test_the_smallest_engines_are_measured_too(chunk: int, rows: int, context: int) -> None:
    """Calibration works with any chunk size, number of rows and context, and stays within the context."""
    found, _ = measure(lambda shape: (MODEL.step_s(shape), 1), chunk, rows, context, 1)
    assert CostModel(found).decode_s(1, context // 2) == pytest.approx(
        MODEL.decode_s(1, context // 2), rel=0.1
    )
    assert all(new + before <= context for case in cases(chunk, rows, context) for new, before in case)


@pytest.mark.parametrize("wall", [1.0, 2.0, 4.0])
def test_what_prompts_cost_is_measured_before_all_batches_of_streams(
    monkeypatch: pytest.MonkeyPatch, wall: float
) -> None:
    """On a busy machine the time is up before all sizes are measured. With no prompt among them, prompts would cost
    nothing by the last line of the table, which is level while a step takes as long as reading the weights."""
    costs = attrs.evolve(COSTS, dense=((1, 0.024), (32, 0.026), (512, 0.3)))
    model, now = CostModel(costs), [0.0]
    monkeypatch.setattr("memserve.engine.calibration.time.monotonic", lambda: now[0])

    def run(shape: Rows) -> tuple[float, int]:
        seconds = model.step_s(shape)
        now[0] += wall * seconds
        return seconds, 1

    fitted = CostModel(measure(run, 256, 32, 1024, 9)[0])
    assert now[0] < 2 * BUDGET_S
    for shape in ([(512, 0)], [(200, 0)], [(256, 700)]):
        assert fitted.step_s(shape) == pytest.approx(model.step_s(shape), rel=0.3), shape
    for shape in ([(1, 500)], [(1, 500)] * 8):
        assert fitted.step_s(shape) == pytest.approx(model.step_s(shape), rel=0.1), shape


def test_an_engine_that_is_slower_than_the_budget_still_gives_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine too slow for the time budget is still measured at two sizes, which give a line."""
    now = [0.0]
    monkeypatch.setattr("memserve.engine.calibration.time.monotonic", lambda: now[0])

    def slow(shape: Rows) -> tuple[float, int]:
        now[0] += 5.0 * MODEL.step_s(shape) / MODEL.step_s([(1, 16)])
        return MODEL.step_s(shape), 1

    fitted = CostModel(measure(slow, 64, 32, 512, 9)[0])
    assert fitted.step_s([(16, 0)]) == pytest.approx(MODEL.step_s([(16, 0)]), rel=0.1)
