"""What /health reports, whatever is missing, with the reason."""

from __future__ import annotations

import attrs
import pytest

from memserve.identity import ActorId
from memserve.messages import Cluster, Member
from memserve.scheduling.view import MISSED_S, RECOVERING_S, SILENT_S, ClusterView, Health

GS = ActorId("scheduler-0.1")
ME = Member(ActorId("frontend-0.1"), "Frontend", "e", 1, "ready")


def member(name: str, kind: str, role: str = "", *, state: str = "ready", shard: str = "s0.1") -> Member:
    """A member of incarnation 1, unless ``name`` says another."""
    id = ActorId(name if "." in name else f"{name}.1")
    return Member(id, kind, "e", 1, state, role, ActorId(shard if role else ""))


SHARD = member("s0", "MemPoolShard")
P0, P1 = (member(f"p{i}", "PrefillWorker", "prefill") for i in range(2))
D0, D1 = (member(f"d{i}", "DecodeWorker", "decode") for i in range(2))
SCHEDULER = member("scheduler-0", "GlobalScheduler")
WHOLE = (SCHEDULER, ME, SHARD, P0, P1, D0, D1)


def seen(*members: Member, now: float = 0.0) -> ClusterView:
    """A view of a cluster with these members."""
    view = ClusterView()
    view.heard(Cluster(GS, members), now)
    return view


def without(*missing: Member) -> tuple[Member, ...]:
    """All members but these."""
    return tuple(one for one in WHOLE if one not in missing)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ((), ""),
        ((D0, D1), "no decode worker is ready"),
        ((P0, P1), "no prefill worker is ready"),
        ((P0, P1, D0, D1), "no prefill and no decode worker is ready"),
        ((SHARD,), "no MemPoolShard is ready"),
    ],
)
def test_what_cannot_be_served_is_unavailable(lacking: tuple[Member, ...], reason: str) -> None:
    """Without a ready shard, or a ready worker of one role, the cluster is unavailable, with the reason."""
    status = "unavailable" if reason else "ok"
    assert seen(*without(*lacking)).health(ME, {}, 0.5) == Health(status, reason)


def test_workers_that_cannot_reach_each_other_serve_nothing() -> None:
    """Workers whose shard is missing do not count as ready."""
    far = attrs.evolve(D0, shard=ActorId("s1.1"))
    assert seen(SHARD, P0, far).health(ME, {}, 0.0).reason == "no decode worker is ready"


def test_a_frontend_alone_serves_nothing() -> None:
    """A Frontend is unavailable before it has heard from a scheduler, and while it drains."""
    assert ClusterView().health(ME, {}, 9.0).reason == "no GlobalScheduler has been heard of yet"
    draining = attrs.evolve(ME, state="draining")
    assert seen(*WHOLE).health(draining, {}, 0.0) == Health("unavailable", "frontend-0 is draining")


def test_a_view_that_nobody_renews_is_not_trusted() -> None:
    """A view that no scheduler has renewed for SILENT_S counts as unavailable."""
    view = seen(*WHOLE)
    assert view.health(ME, {}, SILENT_S - 0.1) == Health("ok")
    assert view.health(ME, {}, SILENT_S) == Health(
        "unavailable", "no GlobalScheduler has been heard of for 3 s"
    )


def test_a_death_is_missed_until_the_successor_is_ready() -> None:
    """After a death the cluster is degraded until the successor is ready."""
    view = seen(*WHOLE)
    view.gone((D0.id,), 0.1)
    assert view.health(ME, {}, 0.1) == Health("degraded", "d0 is gone")
    back = member("d0.2", "DecodeWorker", "decode", state="starting")
    view.heard(Cluster(GS, (*without(D0), back)), 1.0)
    assert view.health(ME, {}, 1.0) == Health("degraded", "d0 is starting")
    view.heard(Cluster(GS, (*without(D0), attrs.evolve(back, state="ready"))), 2.0)
    assert view.health(ME, {}, 2.0) == Health("ok")


def test_who_was_drained_is_not_missed() -> None:
    """A worker that drained and left does not make the cluster degraded."""
    view = seen(*without(D0), attrs.evolve(D0, state="draining"))
    assert view.health(ME, {}, 0.0) == Health("ok")
    for now in (0.1, 1.1):  # deaths are announced repeatedly
        view.gone((D0.id,), now)
        assert view.health(ME, {}, now) == Health("ok")


def test_who_left_for_good_is_not_missed_for_ever() -> None:
    """A worker that does not come back counts as missing for MISSED_S only."""
    view = seen(*WHOLE)
    view.gone((D0.id,), 0.1)
    view.heard(Cluster(GS, without(D0)), MISSED_S)
    assert view.health(ME, {}, MISSED_S).status == "degraded"
    assert view.health(ME, {}, MISSED_S + 0.1) == Health("ok")


def test_a_death_that_is_announced_late_is_not_missed() -> None:
    """A death that is announced when the successor is already there changes nothing."""
    view = seen(*without(D0), member("d0.2", "DecodeWorker", "decode"))
    view.gone((D0.id,), 0.1)
    assert view.health(ME, {}, 0.0) == Health("ok")


def test_the_supervisors_word_comes_before_the_schedulers() -> None:
    """What the supervisor reports of an actor is shown at once, before the scheduler knows."""
    view = seen(*WHOLE)
    down = {"d1": "was killed by SIGKILL and is being restarted"}
    assert view.health(ME, down, 0.0) == Health("degraded", "d1 was killed by SIGKILL and is being restarted")
    down["d0"] = "ended with status 1 again and again; it is tried every 10 s"
    view.gone((D0.id, D1.id), 0.1)
    found = view.health(ME, down, 0.0)
    assert found.status == "unavailable"
    assert found.reason == f"no decode worker is ready; d1 {down['d1']}; d0 {down['d0']}"


def test_two_schedulers_make_one_view_and_an_old_one_is_forgotten() -> None:
    """The views of two schedulers are merged, and that of a dead one is dropped."""
    view = seen(SHARD, P0)
    assert view.heard(Cluster(ActorId("scheduler-1.1"), (SHARD, D0)), 0.0) == []
    assert view.health(ME, {}, 0.0) == Health("ok")
    assert view.heard(Cluster(ActorId("scheduler-0.2"), (SHARD,)), 0.1) == [GS]
    assert {one.id for one in view.members()} == {SHARD.id, D0.id}


COLLECTING = Health("degraded", "a scheduler that has just started is still collecting reports")
GS2 = ActorId("scheduler-0.2")


@pytest.mark.parametrize("announced", [False, True])
def test_a_scheduler_s_successor_that_knows_nobody_yet_takes_nobody_away(announced: bool) -> None:
    """While a restarted scheduler collects reports, the cluster is degraded for a while and not unavailable."""
    view = seen(*WHOLE)
    if announced:
        view.gone((GS,), 1.0)
        assert view.health(ME, {}, 1.0) == attrs.evolve(
            COLLECTING, reason=f"scheduler-0 is gone; {COLLECTING.reason}"
        )
    view.heard(Cluster(GS2, (attrs.evolve(SCHEDULER, id=GS2),)), 1.0)
    assert view.health(ME, {}, 1.0 + RECOVERING_S - 0.1) == COLLECTING
    assert view.health(ME, {}, 1.0 + RECOVERING_S) == Health("unavailable", "no MemPoolShard is ready")
    view.heard(Cluster(GS2, (SHARD, P0, D0)), 3.0)
    assert view.health(ME, {}, 3.0) == Health("ok")


def test_an_actor_that_died_with_the_scheduler_is_not_there() -> None:
    """An actor that died together with the scheduler is not counted as present."""
    view = seen(*WHOLE)
    view.heard(Cluster(GS2, ()), 1.0)
    down = {"s0": "was killed by SIGKILL and is being restarted"}
    assert view.health(ME, down, 1.0).status == "unavailable"
    starting = member("s0.2", "MemPoolShard", state="starting")
    view.heard(Cluster(GS2, (starting,)), 1.1)
    assert view.health(ME, {}, 1.1) == Health("unavailable", "no MemPoolShard is ready; s0 is starting")
    view.gone((SHARD.id,), 1.2)
    view.heard(Cluster(ActorId("scheduler-0.3"), ()), 1.2)
    assert view.health(ME, {}, 1.2).reason.startswith("no MemPoolShard is ready")


def test_a_scheduler_that_restarts_twice_takes_nobody_away_either() -> None:
    """A scheduler that restarts twice in a row leaves the cluster degraded as well."""
    view = seen(*WHOLE)
    view.heard(Cluster(GS2, ()), 1.0)
    view.heard(Cluster(ActorId("scheduler-0.3"), ()), 2.0)
    assert view.health(ME, {}, 2.5) == COLLECTING


def test_who_died_is_expected_and_who_left_is_not() -> None:
    """An order to drain would count as obeyed although its worker died."""
    view = seen(*without(D1), attrs.evolve(D1, state="draining"))
    view.gone((D0.id, D1.id), 1.0)
    assert (view.expects("d0", 1.0), view.expects("d1", 1.0)) == (True, False)
    assert not view.expects("d0", 1.0 + MISSED_S)


def test_who_has_not_reported_to_a_new_scheduler_yet_is_there() -> None:
    """`memserve drain` would say that its worker has left, or that there is no such worker, and status show half a cluster."""
    view = seen(*WHOLE)
    view.gone((D1.id,), 1.0)
    view.heard(Cluster(GS2, (attrs.evolve(SCHEDULER, id=GS2), D0)), 2.0)
    assert {one.id for one in view.everyone(2.0)} == {GS2, ME.id, SHARD.id, P0.id, P1.id, D0.id}
    assert {one.id for one in view.everyone(2.0 + RECOVERING_S)} == {GS2, D0.id}
