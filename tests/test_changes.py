"""Workers that change while they run, to another role or to draining: in the core, in virtual time, and as processes."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from clusters import running
from memory_cluster import baseline, generate, memory_cluster, reference
from memserve.errors import RequestFailed
from memserve.identity import ActorId, actor_name
from memserve.messages import Change, Member
from memserve.scheduling.changes import HAND, SCHEDULER, changed, find_worker, in_force
from memserve.scheduling.roles import Roles

SHARD = Member(ActorId("s0.1"), "MemPoolShard", "ipc://s", 1, "ready")
DRAIN = Change(drain=True)


def worker(name: str, role: str, state: str = "ready") -> Member:
    """A worker on the shard."""
    return Member(ActorId(f"{name}.1"), "DecodeWorker", "ipc://w", 1, state, role, SHARD.id)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("p9", DRAIN, "worker_not_found"),
        ("s0", DRAIN, "worker_not_found"),
        ("p1", DRAIN, "worker_not_ready"),
        ("p0", DRAIN, "no_pair_left"),
        ("p0", Change("decode"), "no_pair_left"),
        ("d0", Change("prefill"), None),
        ("p0", Change("both"), None),
        ("p1", Change("prefill"), "worker_not_ready"),
    ],
)
def test_what_may_be_changed(name, change, code):
    """A change is refused for unknown workers, for those not ready, and if no prefill and decode pair would be left."""
    everyone = [SHARD, worker("p0", "prefill"), worker("p1", "prefill", "starting")]
    everyone += [worker("d0", "decode"), worker("d1", "decode")]
    if code is None:
        assert find_worker(name, change, everyone).id == f"{name}.1"
        return
    with pytest.raises(RequestFailed) as caught:
        find_worker(name, change, everyone)
    assert caught.value.code == code


def test_in_force():
    """A change counts as in force once the worker reports it, or has left after a drain."""
    before = worker("d0", "decode")
    assert not in_force("d0", Change("both"), [before])
    assert in_force("d0", Change("both"), [attrs.evolve(before, role="both", role_by=HAND)])
    assert in_force("d0", DRAIN, [attrs.evolve(before, state="draining")])
    assert in_force("d0", DRAIN, [])
    assert not in_force("d0", DRAIN, [], expected=True)
    assert not in_force("d0", DRAIN, [attrs.evolve(before, id=ActorId("d0.2"))])
    assert not in_force("d0", Change("both"), [])


def test_who_gives_a_role_and_who_takes_it_back():
    """A role set by hand overrides the scheduler's until it is given back with ``auto``."""
    configured = attrs.evolve(worker("d0", "decode"), role_configured="decode")
    by_scheduler = changed(configured, Change("both", by=SCHEDULER))
    assert (by_scheduler.role, by_scheduler.role_by) == ("both", SCHEDULER)
    by_hand = changed(by_scheduler, Change("prefill"))
    assert (by_hand.role, by_hand.role_by) == ("prefill", HAND)
    assert changed(by_hand, Change("both", by=SCHEDULER)) == by_hand
    assert changed(by_hand, Change("auto")) == configured
    assert changed(by_hand, DRAIN) == attrs.evolve(by_hand, state="draining")


def asked(roles: Roles, member: Member, now: float) -> Change | None:
    """The change that a worker is asked for when its heartbeat arrives."""
    sends = roles.heard(member, now)
    return sends[0].message if sends else None


def test_a_role_is_given_again_to_the_next_incarnation():
    """The next incarnation of a worker is asked for the role that was set by hand, again and again until it has it."""
    before = attrs.evolve(worker("d0", "decode"), role_configured="decode")
    given, again = changed(before, Change("prefill")), attrs.evolve(before, id=ActorId("d0.2"))
    roles = Roles()
    assert asked(roles, before, 0.0) is None
    assert asked(roles, given, 1.0) is None
    assert asked(roles, attrs.evolve(again, state="starting"), 2.0) is None
    assert roles.seen(again).role_wanted == "prefill"
    assert asked(roles, again, 3.0) == Change("prefill")
    assert asked(roles, again, 3.5) is None, "it needs a moment"
    assert asked(roles, again, 4.1) == Change("prefill"), "the first may be lost"
    taken = changed(again, Change("prefill"))
    assert asked(roles, taken, 5.0) is None
    assert roles.seen(taken) == taken


def test_a_role_that_was_given_back_is_not_given_again():
    """A role is forgotten when it was given back, when the worker drains, or when its configuration changed."""
    before = attrs.evolve(worker("d0", "decode"), role_configured="decode")
    given = changed(before, Change("prefill"))
    roles = Roles()
    for end in (
        before,
        attrs.evolve(given, state="draining"),
        attrs.evolve(worker("d0", "both"), role_configured="both", id=ActorId("d0.2")),
    ):
        roles.heard(given, 0.0)
        assert asked(roles, end, 1.0) is None
        assert asked(roles, attrs.evolve(before, id=ActorId("d0.3")), 9.0) is None


def test_a_scheduler_that_restarts_learns_the_wishes_from_the_workers():
    """A restarted scheduler learns from workers which roles were set by hand."""
    given = changed(attrs.evolve(worker("d0", "decode"), role_configured="decode"), Change("both"))
    roles = Roles()
    assert asked(roles, given, 0.0) is None
    again = attrs.evolve(worker("d0", "decode"), role_configured="decode", id=ActorId("d0.2"))
    assert asked(roles, again, 1.0) == Change("both")


async def test_a_role_survives_the_worker(autojump_clock: MockClock) -> None:
    """A role set by hand is kept when its worker is killed and restarted."""
    async with memory_cluster(("p0", "prefill"), ("d0", "decode"), ("d1", "decode")) as (cluster, frontend):
        await frontend.change("d1", Change("prefill"))
        cluster.kill("d1")
        await cluster.worker("d1", "decode")
        with trio.fail_after(5):
            while {actor_name(one.id): one.role for one in frontend.cluster()}.get("d1") != "prefill":
                await trio.sleep(0.01)
        await frontend.change("d1", Change("auto"))
        await trio.sleep(3.0)
        assert {actor_name(one.id): one.role for one in frontend.cluster()}["d1"] == "decode"


async def test_roles_change_under_load(autojump_clock: MockClock) -> None:
    """Roles change under load without losing, repeating or changing a request."""
    pd2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
    async with memory_cluster(*pd2) as (cluster, frontend):
        results: dict[int, list[int]] = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.02)
            results[i] = await generate(frontend, [i + 5] * (20 + i), 30, seed=i)

        async with trio.open_nursery() as nursery:
            for i in range(40):
                nursery.start_soon(one, i)
            for name, role in (("d1", "prefill"), ("p1", "decode"), ("p0", "both"), ("d1", "both")):
                await trio.sleep(0.15)
                await frontend.change(name, Change(role))
                assert {actor_name(one.id): one.role for one in frontend.cluster()}[name] == role
        assert results == {i: reference([i + 5] * (20 + i), 30, seed=i) for i in range(40)}
        assert cluster.actors["frontend-0"].core.counters.get("resubmissions_total", 0) == 0
        assert cluster.actors["p1"].core.gauges()["handoffs_taken_total"] > 0
        await baseline(cluster)


@pytest.mark.parametrize("name", ["p1", "d1"])
async def test_a_drained_worker_gets_no_request_and_loses_none(autojump_clock: MockClock, name: str) -> None:
    """A drained worker gets no new request, becomes idle, and no request is lost."""
    pd2 = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
    async with memory_cluster(*pd2) as (cluster, frontend):
        results: dict[int, list[int]] = {}

        async def one(i: int) -> None:
            await trio.sleep(i * 0.02)
            results[i] = await generate(frontend, [i + 5] * 30, 20, seed=i)

        async with trio.open_nursery() as nursery:
            for i in range(60):
                nursery.start_soon(one, i)
            await trio.sleep(0.3)
            await frontend.change(name, DRAIN)
            core = cluster.actors[name].core
            with trio.fail_after(1.0):
                while not core.idle:
                    await trio.sleep(0.01)
            taken = core.gauges()["steps_total"]
            await trio.sleep(0.3)  # the load goes on, on the others
            assert (core.idle, core.gauges()["steps_total"]) == (True, taken)
            assert len(results) < 60
            cluster.kill(name)
        assert results == {i: reference([i + 5] * 30, 20, seed=i) for i in range(60)}
        await baseline(cluster)


async def test_a_worker_that_dies_before_it_drains_is_drained_when_it_is_back(
    autojump_clock: MockClock,
) -> None:
    """`memserve drain` of a worker that hangs would say that it has left, and its supervisor start another one."""
    async with memory_cluster(("p0", "prefill"), ("d0", "decode"), ("d1", "decode")) as (cluster, frontend):
        cluster.pause("d1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(frontend.change, "d1", DRAIN)
            await trio.sleep(7.0)
            assert "d1" not in {actor_name(one.id) for one in frontend.cluster()}
            cluster.actors.pop("d1", None)
            await cluster.worker("d1", "decode")
        states = {actor_name(one.id): one.state for one in frontend.cluster()}
        assert states["d1"] == "draining"


def test_role_and_drain_of_processes(tmp_path: Path) -> None:
    """`memserve role` and `memserve drain` work on real processes without losing requests; a drained one is not
    restarted."""

    def memserve(*words: str) -> str:
        command = [sys.executable, "-m", "memserve", *words, "--log-dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    threads = [f"worker.{i}.threads=1" for i in range(4)]
    with running("2p2d.toml", tmp_path, *threads) as cluster, ThreadPoolExecutor(6) as pool:
        deadline = (
            time.monotonic() + 120
        )  # one pair is enough to serve, and a slow machine starts the rest later
        while [one["state"] for one in cluster.members() if one["role"]] != ["ready"] * 4:
            assert time.monotonic() < deadline, cluster.members()
            time.sleep(0.2)
        prompts = [[i + 300, *range(50, 90)] for i in range(6)]
        undisturbed = list(pool.map(lambda prompt: cluster.tokens(prompt, 24), prompts))
        again = [pool.submit(cluster.tokens, prompt, 24) for prompt in prompts for _ in range(3)]
        assert "d1 has the role prefill" in memserve("role", "d1", "prefill")
        assert "p0 has left" in memserve("drain", "p0")
        assert [one.result() for one in again] == [tokens for tokens in undisturbed for _ in range(3)]
        shown = memserve("status")
        assert "DecodeWorker prefill by hand" in " ".join(shown.split())
        assert not [line for line in shown.splitlines() if line.startswith("p0 ")]
        (left,) = cluster.lines("actor left")
        assert left["returncode"] == 0
        time.sleep(1.0)  # a restart would come after 0.2 s
        started = [line for line in cluster.lines("actor started") if line["child"] == "p0"]
        assert len(started) == 1
        cluster.wait_idle()
        assert cluster.tokens(prompts[0], 24) == undisturbed[0]
