"""What a scheduler knows of its workers' queues, and the first tokens that it predicts from that."""

from __future__ import annotations

import attrs
import pytest

from memserve.actions import Log
from memserve.drawing import Sampling
from memserve.engine.load import StepWatch, load_of
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.sequence import Phase, Sequence
from memserve.identity import ActorId
from memserve.messages import Plan, Request
from memserve.scheduling.cost_model import CostModel
from memserve.sim.clients import Clients
from memserve.sim.layout import fixed
from memserve.sim.run import Run, play
from memserve.sim.workloads import Piece, Session, Turn, shared_documents
from memserve.sim.world import Actor
from memserve.tokens import pack
from placement_world import COSTS, PAGE, World, busy

ME, SHARD = ActorId("p0.1"), ActorId("s0.1")


def arrived(tokens: int, expected: int = 0, fetched: int = 0) -> Sequence:
    """A prompt that has arrived and has no pages yet."""
    plan = Plan(ME, ME, SHARD, ActorId("scheduler-0.1"), source_tokens=fetched, expected_tokens=expected)
    request = Request("r1", 0, ActorId("f.1"), "anne", pack(range(tokens)), tokens, 9, (), Sampling())
    return Sequence(request, plan, request.tokens, Phase.WAITING, 0.0, 1)


@pytest.mark.parametrize(
    ("one", "missing"),
    [
        (arrived(100), 100),
        (arrived(100, expected=80), 20),
        (arrived(100, expected=16, fetched=96), 4),
        (arrived(96, expected=96), 16),
    ],
)
def test_a_prompt_without_pages_counts_as_its_plan_says(one: Sequence, missing: int) -> None:
    """Until a prompt has its pages, its plan says how many of its tokens count as waiting."""
    found = load_of([one], ME, PAGE)
    assert found["waiting_tokens"] == missing
    assert found["waiting_pairs"] == (one.length**2 - (one.length - missing) ** 2) // 2
    one.phase, one.computed = Phase.READY, 48
    assert load_of([one], ME, PAGE)["waiting_tokens"] == one.length - 48, (
        "what was really cached counts, once it is known"
    )


def test_a_step_under_way_ends_when_it_ends() -> None:
    """A load report counts only what is left of the step under way."""
    watch, model = StepWatch(), CostModel(COSTS)
    watch.began(COSTS, BatchPlan((Row(pack(range(64)), 0, tuple(range(4)), None),)), now=10.0)
    whole_s = model.step_s([(64, 0)])
    load = {"waiting_tokens": 200.0, "waiting_pairs": 20_000.0}
    found = watch.under_way(load, 10.0 + 0.75 * whole_s)
    assert found["step_left_s"] == pytest.approx(whole_s / 4)
    assert (found["step_tokens"], found["waiting_tokens"]) == pytest.approx((16, 152))
    assert found["waiting_pairs"] == 20_000 - 64 * 32
    world = World()
    world.report("p0", COSTS, **found)
    worker = world.fleet.workers[ActorId("p0.1")]
    expected = whole_s / 4 + model.queue_s(136, found["waiting_pairs"])
    assert worker.queue_s(world.now) == pytest.approx(expected)
    watch.ended(10.0 + whole_s)
    assert watch.under_way(load, 11.0) == load


def test_a_prompt_behind_a_queue_waits_for_no_other_step() -> None:
    """A prompt behind a queue does not wait for half a step in addition: the queue ends with a step."""
    world = World("w0")
    world.report("w0", COSTS, **busy(0, 5))
    worker = world.fleet.workers[ActorId("w0.1")]
    assert worker.wait_s(world.now) == worker.step_s / 2
    run_s = worker.prefill_s(1600, 0, world.now)
    assert world.place(max_tokens=2).seconds == pytest.approx(worker.step_s / 2 + run_s, rel=0.02)
    begun = worker.queue_s(world.now)
    assert begun == pytest.approx(worker.step_s / 2 + run_s, rel=0.15)
    later = world.place(pack(range(5000, 5256)), 2)
    alone_s = worker.model.prefill_s(256, 0, 6, 4100)
    assert later.seconds == pytest.approx(begun + alone_s, rel=0.05)


def test_first_tokens_come_when_they_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated first tokens of cached prompts come hardly ever earlier than predicted."""
    predicted: dict[str, float] = {}
    plain = Clients._logged

    def logged(clients: Clients, actor: Actor, line: Log) -> None:
        if line.event == "request placed" and line.data["reuse"] == "cached":
            predicted[str(line.data["request"])] = float(str(line.data["predicted_ttft_ms"])) / 1e3
        plain(clients, actor, line)

    monkeypatch.setattr(Clients, "_logged", logged)
    sessions = tuple(shared_documents(sessions=60, share=1, rate=12.0, seed=1))
    clients, _ = play(Run(layout=fixed("3P1D", 4, pages=4000, page_bytes=16 * 820_000), sessions=sessions))
    real = {one.id: one.first_at - one.asked_at for one in clients.calls}
    early = [id for id, seconds in predicted.items() if real[id] < seconds - 0.01]
    assert len(predicted) > 80
    assert len(early) < 0.02 * len(predicted)


def test_a_worker_that_measured_beside_other_programs_is_tried() -> None:
    """Costs that are three times too high keep no worker idle: nothing but its own steps could correct them."""
    layout = fixed("colocated", 2, pages=4000, shared=True)
    first, second = layout.workers
    layout = attrs.evolve(layout, workers=(first, attrs.evolve(second, overrated=3.0)))
    turn = Turn((Piece("prompt", 64),), 40, fresh=True, wait_s=0.2)
    sessions = tuple(Session(f"r{i}", 0.3 * i, (turn,) * 100) for i in range(3))
    clients, _ = play(Run(layout=layout, sessions=sessions))
    tried = [one.asked_at for one in clients.calls if one.prefill.startswith(second.name)]
    assert min(tried) < 35.0
    later = [one for one in clients.calls if one.asked_at > 35.0]
    assert sum(one.prefill.startswith(second.name) for one in later) > 0.3 * len(later)
