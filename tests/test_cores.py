"""The budget of cores between real processes, some of which are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memserve.costs import GIVE_AFTER_S
from memserve.engine.cpu_budget import Cores, Outsiders, waited_s

Start = Callable[[int, str], "subprocess.Popen[str]"]

CHILD = """if True:
    import sys, time
    from pathlib import Path
    from memserve.engine.cpu_budget import Cores, Outsiders
    cores = Cores(Path(sys.argv[1]), 2, 2, int(sys.argv[2]))
    {what}
"""
HOLD_FOR_EVER = "with cores.hold() as k: print(k, flush=True); time.sleep(60)"
LOOP = """
    steps = 0
    end = time.monotonic() + 1.5
    print(0, flush=True)
    while time.monotonic() < end:
        with cores.hold():
            time.sleep(0.01)
        steps += 1
    print(steps, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function that starts a worker process in a slot; its output is left unread."""
    children = []

    def run(slot: int, what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD.format(what=what), str(tmp_path / "cores"), str(slot)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate()


def _line(child: subprocess.Popen[str]) -> int:
    assert child.stdout is not None
    return int(child.stdout.readline())


def test_a_lone_worker_takes_every_core(tmp_path: Path) -> None:
    """The only busy worker gets all cores."""
    mine, idle = Cores(tmp_path / "c", 4, 4, 0), Cores(tmp_path / "c", 4, 4, 1)
    idle.busy(True)
    idle.busy(False)

    with mine.hold() as held:
        assert held == 4


def test_busy_workers_share_evenly(tmp_path: Path) -> None:
    """Busy workers get equal shares, and no more threads run than there are cores."""
    workers = [Cores(tmp_path / "c", 8, 8, slot) for slot in range(3)]
    for worker in workers:
        worker.busy(True)

    with workers[0].hold() as a, workers[1].hold() as b, workers[2].hold() as c:
        assert (a, b, c) == (2, 2, 2)
    workers[2].busy(False)
    with workers[0].hold() as a, workers[1].hold() as b:
        assert (a, b) == (4, 4)


def test_a_worker_takes_no_more_than_it_wants(tmp_path: Path) -> None:
    """The threads setting of a worker is an upper limit."""
    with Cores(tmp_path / "c", 4, 3, 0).hold() as held:
        assert held == 3


def test_a_step_takes_what_is_left(tmp_path: Path) -> None:
    """A worker that becomes busy during another's step gets the cores that are left."""
    first, second = Cores(tmp_path / "c", 3, 2, 0), Cores(tmp_path / "c", 3, 3, 1)
    with first.hold() as a, second.hold() as b:
        assert (a, b) == (2, 1)


def test_cores_come_back_after_an_error(tmp_path: Path) -> None:
    """A step that fails gives its cores back."""
    mine = Cores(tmp_path / "c", 2, 2, 0)
    with pytest.raises(ZeroDivisionError), mine.hold():
        raise ZeroDivisionError
    with mine.hold() as held:
        assert held == 2


def test_a_slot_belongs_to_one_worker(tmp_path: Path) -> None:
    """Two workers cannot use one slot."""
    first = Cores(tmp_path / "c", 2, 2, 5)
    first.busy(True)
    with pytest.raises(RuntimeError, match="slot 5 is another worker's"):
        Cores(tmp_path / "c", 2, 2, 5).busy(True)


def test_who_comes_during_a_long_step_gets_a_core_of_it(start: Start, tmp_path: Path) -> None:
    """A worker that waits gets a core of another's long step, which takes it back when it is free again."""
    mine = Cores(tmp_path / "cores", 2, 2, 0)
    with mine.hold() as held:
        assert (held, mine.regroup(held)) == (2, 2)
        child = start(
            1,
            "with cores.hold() as k: print(k, flush=True); time.sleep(0.3)\n    cores.busy(False); print(0, flush=True); time.sleep(60)",
        )
        began = time.monotonic()
        while (threads := mine.regroup(2)) == 2:
            time.sleep(0.005)
        assert threads == 1 and time.monotonic() - began > GIVE_AFTER_S, "the core was given up too early"
        assert _line(child) == 1, "it had to wait for the end of this step"
        assert _line(child) == 0
        assert mine.regroup(1) == 2, "what it left stays unused"
    assert 0 < mine.neighbours < 1
    with mine.hold() as held:
        assert held == 2


def test_regrouping_takes_nothing_from_others(tmp_path: Path) -> None:
    """A step that regroups takes only free cores."""
    first, second = Cores(tmp_path / "c", 3, 3, 0), Cores(tmp_path / "c", 3, 1, 1)
    with second.hold(), first.hold() as held:
        assert (held, first.regroup(held)) == (1, 1)
        second.busy(False)  # it has no work any more, but still a core
        assert first.regroup(1) == 2


def test_kill_9_in_a_step_gives_the_cores_back(start: Start, tmp_path: Path) -> None:
    """The cores of a killed worker become free."""
    child = start(1, HOLD_FOR_EVER)
    assert _line(child) == 2
    mine = Cores(tmp_path / "cores", 2, 2, 0)
    mine.busy(True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with mine.hold() as held:
        assert held == 2


def test_waiting_ends_when_a_core_comes_free(start: Start, tmp_path: Path) -> None:
    """A step waits until a core is free, and no longer."""
    child = start(1, "with cores.hold() as k: print(k, flush=True); time.sleep(0.5)")
    assert _line(child) == 2
    began = time.monotonic()
    with Cores(tmp_path / "cores", 2, 2, 0).hold() as held:
        assert held >= 1
    assert 0.2 < time.monotonic() - began < 5


def test_a_stopped_holder_does_not_stop_the_others(start: Start, tmp_path: Path) -> None:
    """A stopped process that holds all cores does not block the others: after a while they run with one thread."""
    child = start(1, HOLD_FOR_EVER)
    assert _line(child) == 2
    child.send_signal(signal.SIGSTOP)
    with Cores(tmp_path / "cores", 2, 2, 0, patience_s=0.2).hold() as held:
        assert held == 1


def test_three_workers_on_two_cores_all_advance(start: Start) -> None:
    """Three workers on two cores all make progress at similar rates."""
    children = [start(slot, LOOP) for slot in range(3)]
    for child in children:
        _line(child)
    steps = [_line(child) for child in children]

    assert min(steps) > 0.25 * max(steps), steps


def test_cores_that_outsiders_use_are_left_to_them(tmp_path: Path) -> None:
    """Cores that other programs use for a while are left to them, and taken back afterwards."""
    outside, now = 3, 0.0
    got: list[int] = []
    outsiders = Outsiders(lambda: f"1.0 1.0 1.0 {got[-1] + outside}/99 1", lambda: now)
    mine = Cores(tmp_path / "cores", 4, 4, 0, outsiders=outsiders)
    for step in range(200):
        outside = 3 if step < 100 else 0
        now += 0.01
        with mine.hold() as threads:  # a worker's own threads are no outsiders
            got.append(threads)
    assert got[0] == 4  # one sample is not enough
    assert got[99] == 1  # three outsiders besides this thread
    assert got[-1] == 4


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) != os.cpu_count(), reason="runs on a part of the host's cores"
)
def test_a_busy_process_is_noticed() -> None:
    """A real busy process is noticed in the kernel's figures."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        outsiders = Outsiders()
        deadline = time.monotonic() + 10
        while outsiders.cores == 0:
            assert time.monotonic() < deadline
            outsiders.sample(workers=1)
            time.sleep(0.01)
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="the kernel counts no waits (CONFIG_SCHED_INFO)"
)
def test_the_wait_for_cores_is_noticed(tmp_path: Path) -> None:
    """A thread that shares one core with another process waits about half of the time; alone, hardly ever."""
    pin = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    measured = (
        pin
        + """if True:
        import time; from memserve.engine.cpu_budget import threads_had, waited_s
        began, waited = time.monotonic(), waited_s()
        while (took := time.monotonic() - began) < 0.5: pass
        print(threads_had(1, took, waited_s() - waited))
    """
    )
    with subprocess.Popen([sys.executable, "-c", pin + "while True: pass"]) as busy:
        try:
            found = subprocess.check_output([sys.executable, "-c", measured], text=True)
        finally:
            busy.kill()
    assert int(found) == 0
    assert waited_s(tmp_path) == 0.0  # a kernel without these figures


def test_workers_that_share_cores_have_one_key_and_see_each_other_at_work(tmp_path: Path) -> None:
    """Workers that share cores have the same key, and each sees whether the other is busy."""
    mine, near, far = (Cores(tmp_path / name, 2, 2) for name in ("c", "c", "d"))
    assert mine.key == near.key != far.key
    assert str(tmp_path) not in mine.key
    near.busy(True)
    far.busy(True)
    with mine.hold() as held:
        assert (held, mine.neighbours) == (1, 1)
    near.busy(False)
    assert mine.look() == 0
    assert near.look() == 1, "the other one is still busy"
