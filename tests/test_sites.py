"""Placement of requests where several workers share the cores of a host, or a GPU."""

from __future__ import annotations

import random

import attrs
import pytest

from memserve.costs import GIVE_AFTER_S, Site
from memserve.identity import ActorId
from memserve.scheduling.cost_model import CostModel
from memserve.scheduling.pricing import Cost, Weights
from memserve.tokens import pack
from placement_world import COSTS, DOCUMENT, World, busy, fetching

HOST = Site("host", cores=2, threads=2)
SHARING = attrs.evolve(COSTS, decode_crowding=0.85, prefill_crowding=0.55)
"""As measured on two cores: docs/measurements/2026-11-26-scheduling.md."""


def two_workers(*sites: Site | None, **load: float) -> World:
    """``w0`` with a load and ``w1`` without, on one shard."""
    world = World()
    for name, site, has in zip(("w0@s0", "w1@s0"), sites, (load, {}), strict=True):
        world.report(name, SHARING, site, **has)
    return world


def test_streams_of_one_site_are_put_together_where_answers_are_long() -> None:
    """Streams of one host are placed on one worker: two would share its cores and read the weights twice."""
    short = pack(range(32))
    together, separate = two_workers(HOST, HOST, **busy(0, 5)), two_workers(None, None, **busy(0, 5))
    assert [together.place(short, 300).decode for _ in range(4)] == ["w0.1"] * 4
    assert separate.place(short, 300).decode == "w1.1", "the cores of another machine are free"


def test_streams_that_are_on_both_workers_of_a_site_come_together_again() -> None:
    """A new stream goes to the worker with more streams, so that the other one becomes idle."""
    world = two_workers(HOST, HOST, **busy(0, 5))
    world.report("w1@s0", SHARING, HOST, **busy(0, 1))
    assert world.place(pack(range(32)), 300).decode == "w0.1"


def test_a_queue_is_shared_with_the_other_worker_of_the_site() -> None:
    """A queue of prompts is shared between both workers of a host: one alone uses the cores badly."""
    world = two_workers(HOST, HOST, **busy(2000))
    assert world.place(max_tokens=2).prefill == "w1.1"
    many = [world.place(pack(range(i * 500, i * 500 + 480)), 2).prefill for i in range(8)]
    assert set(many) == {"w0.1", "w1.1"}


def test_streams_are_not_crowded_for_a_prompt_that_gains_little() -> None:
    """A short prompt does not start a second worker beside many streams, unless it would wait long."""
    world = two_workers(HOST, HOST, **busy(0, 10))
    assert world.place(pack(range(8)), 2).prefill == "w0.1"
    world.report("w0@s0", SHARING, HOST, **busy(8000, 10))
    assert world.place(pack(range(8)), 2).prefill == "w1.1", "behind a long queue it gains much"


def test_a_warm_turn_runs_in_a_step_of_many_streams_rather_than_beside_it() -> None:
    """A cached turn joins a step of many streams instead of taking half of the cores, unless others' delay counts little."""
    for others, chosen in ((1.0, "w0.1"), (0.1, "w1.1")):
        world = two_workers(HOST, HOST, **busy(0, 30))
        world.policy = Cost(Weights(others=others))
        world.cache("s0", DOCUMENT)
        assert world.place(DOCUMENT + pack(range(4)), 30).prefill == chosen, "what the setting is for"


def test_times_are_those_beside_busy_neighbours() -> None:
    """Predicted times include the slowdown by busy neighbours, and change as soon as these report."""
    alone, shared = (two_workers(site, HOST, **busy(0)) for site in (None, HOST))
    for world in (alone, shared):
        world.report("w1@s0", SHARING, HOST, **busy(0, 3))
    one, other = (world.fleet.workers[ActorId("w0.1")] for world in (alone, shared))
    assert other.prefill_s(512, 0, 100.0) == pytest.approx(1.55 * one.prefill_s(512, 0, 100.0))
    assert other.streams_crowded() == pytest.approx(1 + 0.85 * 3 / 4), "the third of three has ended by then"
    shared.report("w0@s0", SHARING, HOST, **busy(0, 4))
    neighbour = shared.fleet.workers[ActorId("w1.1")]
    assert neighbour.step_s == pytest.approx(1.85 * neighbour.alone_s), "the new load counts at once"
    shared.fleet.forget(ActorId("w0.1"))
    shared.report("w1@s0", SHARING, HOST, **busy(0, 3))
    assert neighbour.step_s == neighbour.alone_s
    shared.fleet.forget(ActorId("w1.1"))
    assert shared.fleet.sites == {}


def test_sites_of_their_own_change_no_decision() -> None:
    """Workers that share no cores are placed as if they reported no site."""
    decided = []
    for reported in (False, True):
        world, rng = World(policy=fetching(1 / 4e9)), random.Random(7)
        for _ in range(150):
            name = f"w{rng.randrange(6)}"
            site = Site(name, cores=2, threads=2) if reported else None
            world.report(
                f"{name}@s{name[1:]}", SHARING, site, **busy(rng.choice((0, 300, 4000)), rng.randrange(9))
            )
            begin = rng.randrange(0, 40_000, 500)
            choice = world.place(pack(range(begin, begin + rng.choice((64, 900)))), rng.choice((2, 100)))
            decided.append((reported, choice.prefill, choice.decode, choice.seconds, choice.candidates))
            world.now += 0.02
    half = len(decided) // 2
    assert [one[1:] for one in decided[:half]] == [one[1:] for one in decided[half:]]
    assert len({one[1] for one in decided}) == 6


def test_the_busiest_of_a_site_is_looked_at_among_many_hosts() -> None:
    """Among many hosts, busy workers are priced too, not only idle ones beside them."""
    world = World()
    for host in range(8):
        for i in range(2):
            name = f"w{2 * host + i}@s{host}"
            world.report(name, SHARING, Site(f"h{host}", 2, 2), **busy(0, 4 if i == 0 else 0))
    assert int(world.place(pack(range(32)), 300).decode[1:-2]) % 2 == 0


def test_a_prompt_waits_for_the_step_of_a_neighbour_that_has_all_cores() -> None:
    """A worker without work has no core until a neighbour's step ends: its first token is predicted that much later."""
    prompt = pack(range(400))

    def predicted(site: Site | None, rows: float, tokens: float = 0.0) -> float:
        world = two_workers(site, site, **busy(tokens, rows))
        one = world.fleet.workers[ActorId("w1.1")]
        return one.wait_s(world.now) + one.prefill_s(len(prompt) // 4, 0, world.now)

    step_s = CostModel(SHARING).decode_s(10, 5000)
    alone, slower = predicted(HOST, 0), SHARING.crowded(2.0, prompts=True)
    assert predicted(HOST, 10) == pytest.approx(slower * alone + step_s / 2)
    assert predicted(HOST, 0, 64) < slower * alone + 0.05, "a short queue ends with its step"
    assert slower * alone + 0.05 < predicted(HOST, 0, 20_000) < slower * alone + GIVE_AFTER_S
    wide = attrs.evolve(HOST, cores=4)
    assert predicted(wide, 10) == pytest.approx(alone), "its neighbour leaves it enough cores"
    assert predicted(Site("gpu"), 10) == pytest.approx(slower * alone), "a GPU is shared in time"


def test_slices_of_a_site() -> None:
    """Workers with enough cores for all of them are not slowed down."""
    assert Site("a", cores=64, threads=16).slices(3) == 1.0
    assert Site("a", cores=64, threads=16).slices(7) == 2.0
    assert Site("gpu").slices(1) == 2.0
    assert COSTS.crowded(2.0, prompts=True) == 2.0, "shared in time unless something else was measured"
