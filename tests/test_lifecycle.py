"""What the supervisor decides, without any process."""

from __future__ import annotations

from fake_cluster import resolved
from memserve.processes.lifecycle import (
    ActorSpec,
    RestartPolicy,
    StopSignals,
    describe_end,
    drain_stages,
    roster,
)


def test_restarts_come_later_and_later():
    """The first restart is immediate, and the delay of further ones doubles up to 10 s."""
    policy = RestartPolicy(loop_deaths=1000)

    delays = [policy.died(0.0, now=100.0 * i).delay_s for i in range(8)]
    assert delays == [0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]


def test_health_clears_the_record():
    """An actor that lived for 30 s is restarted at once again."""
    policy = RestartPolicy()
    for i in range(4):
        policy.died(29.9, now=40.0 * i)

    assert policy.died(30.0, now=500.0).delay_s == 0.0


def test_five_deaths_in_thirty_seconds_are_a_loop_reported_once():
    """Five deaths within 30 s are a crash loop, which is reported once."""
    policy = RestartPolicy()

    restarts = [policy.died(0.0, now=7.0 * i) for i in range(7)]
    assert [restart.newly_looping for restart in restarts] == [False] * 4 + [True, False, False]
    assert [restart.delay_s for restart in restarts[4:]] == [10.0] * 3
    assert restarts[6].looping


def test_five_deaths_in_more_time_are_no_loop():
    """Deaths at longer intervals are no crash loop."""
    policy = RestartPolicy()

    assert not any(policy.died(1.0, now=8.0 * i).looping for i in range(10))


def test_an_actor_that_never_comes_up_is_a_loop_however_long_it_tries():
    """An actor that never becomes ready is a crash loop even if its starts take long."""
    policy = RestartPolicy()

    restarts = [policy.died(0.0, now=20.0 * i) for i in range(6)]
    assert [restart.newly_looping for restart in restarts] == [False] * 4 + [True, False]
    assert not policy.died(31.0, now=500.0).looping


def test_a_second_loop_is_reported_again():
    """After a recovery, a new crash loop is reported again."""
    policy = RestartPolicy()
    for i in range(6):
        policy.died(0.0, now=float(i))

    again = [policy.died(40.0 if i == 0 else 0.0, now=100.0 + i).newly_looping for i in range(5)]
    assert again == [False] * 4 + [True]


def test_a_thousand_deaths_do_not_overflow():
    """The delay stays at 10 s after thousands of deaths."""
    policy = RestartPolicy(loop_deaths=5000)

    assert [policy.died(0.0, now=100.0 * i) for i in range(2000)][-1].delay_s == 10.0


def test_each_drain_stage_outlives_those_that_need_it(tmp_path):
    """Actors drain in stages: Frontends, workers, shards, schedulers, so that each has what it needs."""
    stages = drain_stages(roster(resolved(tmp_path, workers=2)))

    assert [[actor.name for actor in stage] for stage in stages] == [
        ["frontend-0"],
        ["w0", "w1"],
        ["s0"],
        ["scheduler-0"],
    ]


def test_drain_stages_that_are_empty_are_left_out():
    """Drain stages without actors are left out."""
    assert drain_stages([ActorSpec("s0", "MemPoolShard")]) == [[ActorSpec("s0", "MemPoolShard")]]


def test_second_signal_stops_but_an_echo_does_not():
    """A second signal stops at once, but not one that comes directly after the first, as `timeout` and `make` send."""
    signals = StopSignals(echo_s=0.5)

    assert [signals.received(now) for now in (10.0, 10.1, 10.6)] == ["drain", "ignore", "stop"]


def test_ends_are_described_in_words():
    """Exit statuses are described in words."""
    assert describe_end(-9) == "was killed by SIGKILL"
    assert describe_end(1) == "ended with status 1"
    assert "shard" in describe_end(3)
    # A real-time signal has no name; the supervisor would end while it says so, and the cluster with it.
    assert describe_end(-35) == "was killed by signal 35"
