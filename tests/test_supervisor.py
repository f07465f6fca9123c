"""A supervisor and its actors as real processes; the actors only start, report and die (see fake_cluster.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

import fake_cluster
from memserve.errors import UserError
from memserve.processes.place import Place, find_running, place_path

PATIENCE_S = 20.0


def until(condition: Callable[[], object]) -> float:
    """Wait until the condition holds; returns the seconds that it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + PATIENCE_S, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - begun


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """The process ids of a process's children, zombies included."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for one in lists for word in one.read_text().split()]


def descendants(pid: int) -> list[int]:
    """The process ids of a process's children, of their children, and so on."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


@attrs.define
class Cluster:
    """A running fake cluster."""

    log_dir: Path
    process: subprocess.Popen[str]

    joiners: list[subprocess.Popen[str]] = attrs.field(factory=list)

    @property
    def output(self) -> str:
        return (self.log_dir / "output").read_text()

    def said(self, name: str) -> str:
        """The output of a `memserve join`."""
        return (self.log_dir / f"output-{name}").read_text()

    def join(self, name: str, **behaviour: str) -> subprocess.Popen[str]:
        """Add a worker, as from another terminal."""
        command = [sys.executable, fake_cluster.__file__, "join", str(self.log_dir), json.dumps(behaviour)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (self.log_dir / f"output-{name}").open("w") as output:
            process = subprocess.Popen(
                [*command, name], stdout=output, stderr=output, env=environment, text=True
            )
        self.joiners.append(process)
        return process

    @property
    def notes(self) -> list[list[str]]:
        """What the actors wrote: [word, name, pid]."""
        file = self.log_dir / "notes"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def down(self) -> list[dict[str, str]]:
        """The reports to Frontends about actors that are down, one for each change."""
        file = self.log_dir / "down"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def names(self, word: str) -> list[str]:
        return [name for found, name, _ in self.notes if found == word]

    def pid(self, actor: str) -> int:
        """The process id of the actor's last incarnation."""
        return next(int(pid) for word, name, pid in reversed(self.notes) if word == "ready" and name == actor)

    @property
    def events(self) -> list[dict[str, object]]:
        files = (self.log_dir / "run").glob("supervisor*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    @property
    def pids(self) -> list[int]:
        """The process ids of all actors ever started."""
        return [int(str(line["child_pid"])) for line in self.events if line["event"] == "actor started"]

    def until_ready(self, actors: int = 4) -> None:
        until(lambda: len(self.names("ready")) == actors and "curl" in self.output)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def left(self) -> list[object]:
        """Processes and files that a cluster must not leave behind."""
        return [*filter(alive, self.pids), *place_path(self.log_dir).parent.iterdir()]


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., Cluster]]:
    """A function that starts a fake cluster whose actors behave as given; nothing of it may be left after the test."""
    clusters: list[Cluster] = []
    with tempfile.TemporaryDirectory(prefix="mst") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)

        def started(**behaviour: str) -> Cluster:
            words = {name.replace("_", "-"): word for name, word in behaviour.items()}
            command = [sys.executable, fake_cluster.__file__, "up", str(tmp_path), json.dumps(words)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            with (tmp_path / "output").open("w") as output:
                process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, text=True)
            clusters.append(Cluster(tmp_path, process))
            return clusters[-1]

        yield started
        for cluster in clusters:
            if cluster.process.poll() is None:
                cluster.process.kill()
                cluster.process.wait()
            for joiner in cluster.joiners:
                joiner.wait(PATIENCE_S)
            until(lambda: not cluster.left())  # noqa: B023


def test_life_of_a_cluster(start):
    """A cluster can be found, refuses a second start, takes no CPU while idle, and stops its actors in the right order."""
    cluster = start()
    cluster.until_ready()
    assert find_running(cluster.log_dir)["url"] == "http://127.0.0.1:1"
    with pytest.raises(
        UserError, match=rf"already runs here: pid {cluster.process.pid}, http://127.0.0.1:1, since"
    ):
        Place.claim(cluster.log_dir)
    assert "curl http://127.0.0.1:1/v1/chat/completions" in cluster.output
    # 0.01 where nothing else runs, 0.15 was seen beside other tests; one that polls takes 0.5.
    assert idle_share([cluster.process.pid, *cluster.pids]) < 0.3

    assert cluster.end(signal.SIGINT) == 0
    assert cluster.names("drained") == ["frontend-0", "w0", "s0", "scheduler-0"]
    assert cluster.left() == []
    assert cluster.output.endswith("memserve: stopped\n")


def idle_share(pids: list[int]) -> float:
    """Cores that the processes use while nothing happens, measured over half a second."""

    def used_ns() -> int:
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids)

    time.sleep(0.3)
    before, begun = used_ns(), time.monotonic()
    time.sleep(0.5)
    return (used_ns() - before) / 1e9 / (time.monotonic() - begun)


def test_killed_actor_comes_back_and_its_death_is_announced(start):
    """An actor that was killed is restarted, and the scheduler and the Frontends learn of its death."""
    cluster = start()
    cluster.until_ready()
    killed = cluster.pid("w0")
    os.kill(killed, signal.SIGKILL)

    until(lambda: cluster.names("ready").count("w0") == 2)
    assert [word[:8] for word, name, _ in cluster.notes if name == "scheduler-0"] == ["ready", "died:w0."]
    assert len(list(place_path(cluster.log_dir).glob("w0.*"))) == 1
    assert "w0 was killed by SIGKILL; restarting it" in cluster.output
    until(lambda: len(cluster.down) == 2)
    assert cluster.down == [{"w0": "was killed by SIGKILL and is being restarted"}, {}]
    assert cluster.end() == 0


@pytest.mark.skipif(
    not Path("/proc/thread-self/children").exists(),
    reason="the kernel lists no children (CONFIG_PROC_CHILDREN)",
)
def test_what_a_killed_actor_had_started_ends_with_it(start):
    """Its children, and theirs, become the supervisor's: none runs on, and none stays as a zombie."""
    cluster = start(w0="parent")
    cluster.until_ready()
    worker, others = cluster.pid("w0"), children(cluster.process.pid)
    until(lambda: len(descendants(worker)) == 3)
    started = descendants(worker)
    os.kill(worker, signal.SIGKILL)
    until(lambda: cluster.names("ready").count("w0") == 2)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (worker, *started)))
    assert len(children(cluster.process.pid)) == len(others)
    assert [line["event"] for line in cluster.events].count("orphan ended") == len(started)
    assert cluster.end() == 0


def test_kill_of_the_supervisor_leaves_nothing(start):
    """When the supervisor is killed, its actors end as well; until a stopped one has ended, no successor may start."""
    cluster = start(w0="hung", scheduler_0="blocked")
    cluster.until_ready()
    os.kill(cluster.pid("s0"), signal.SIGSTOP)
    os.kill(cluster.process.pid, signal.SIGKILL)
    cluster.process.wait()
    # A stopped process still holds the place, so that no successor may start; it ends as soon as it continues.
    until(lambda: sum(map(alive, cluster.pids)) == 1)
    with pytest.raises(UserError, match="still shutting down"):
        Place.claim(cluster.log_dir)
    os.kill(cluster.pid("s0"), signal.SIGCONT)

    assert until(lambda: not cluster.left()) < 1.5


def test_actors_that_stand_still_are_replaced(start):
    """Actors that hang are killed and restarted, and no others."""
    cluster, still = start(), ("scheduler-0", "s0")
    cluster.until_ready()
    for actor in still:
        os.kill(cluster.pid(actor), signal.SIGSTOP)

    for actor in still:
        until(lambda: cluster.names("ready").count(actor) == 2)  # noqa: B023
        assert f"{actor} hung and was killed; restarting it" in cluster.output
    assert len(cluster.names("ready")) == 6  # no other actor was restarted
    assert cluster.end() == 0


def test_a_cluster_that_was_stopped_as_a_whole_goes_on(start):
    """After Ctrl-Z and fg of the whole cluster, no actor is taken for hung."""
    cluster = start()
    cluster.until_ready()
    everyone = [cluster.process.pid, *cluster.pids]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(fake_cluster.HUNG_S + 1)
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)

    assert "hung" not in cluster.output
    assert len(cluster.names("ready")) == 4
    assert cluster.end() == 0


def test_actor_that_ignores_the_drain_is_killed(start):
    """An actor that does not finish draining in time is killed, and the shutdown goes on."""
    cluster = start(w0="deaf")
    cluster.until_ready()

    assert cluster.end() == 0
    assert "w0 did not finish within 2 s and is killed" in cluster.output
    assert cluster.names("drained") == ["frontend-0", "s0", "scheduler-0"]


def test_second_signal_stops_at_once(start):
    """A second signal ends the shutdown at once, without waiting for the drain."""
    cluster = start(frontend_0="deaf", w0="hung")
    cluster.until_ready()
    cluster.process.terminate()
    until(lambda: "waiting for frontend-0 to finish, at most 5 s" in cluster.output)
    begun = time.monotonic()

    assert cluster.end() == 0
    assert time.monotonic() - begun < 4.0  # a busy machine takes two seconds; the stage alone would take five
    assert cluster.left() == []


def test_user_error_of_an_actor_ends_the_start(start):
    """A user error of an actor, such as a port in use, ends the start with one sentence."""
    cluster = start(frontend_0="user error")

    assert cluster.process.wait(PATIENCE_S) == 2
    assert cluster.output.splitlines()[1:] == [
        "frontend.port: 80 is taken; choose another with --set frontend.port=8081"
    ]
    assert cluster.left() == []


def test_crashing_actor_is_shown_and_takes_nobody_along(start):
    """An actor that crashes again and again is shown in the output and in /health, while the others go on."""
    cluster = start(w0="crash", s0="restart")
    until(
        lambda: {"ended", "lost"} <= set(cluster.output.split()) and "scheduler-0" in cluster.names("ready")
    )

    assert "  w0 | RuntimeError: the crash of the test" in cluster.output
    assert "s0 lost its shard or was fenced off; restarting it\n  s0 | shard s0 is gone" in cluster.output
    crash = (cluster.log_dir / "run" / "w0.jsonl").read_text()
    assert "actor crashed" in crash
    until(lambda: cluster.down and "again and again" in cluster.down[-1].get("w0", ""))
    assert cluster.down[-1]["w0"] == "ended with status 1 again and again; it is tried every 10 s", (
        "/health must say so"
    )
    first = cluster.pid("frontend-0")
    os.kill(first, signal.SIGKILL)
    until(lambda: cluster.names("ready").count("frontend-0") == 2)
    until(lambda: {"w0", "s0"} <= cluster.down[-1].keys())  # its successor got the whole report
    assert cluster.end() == 0
    assert cluster.names("drained") == ["frontend-0", "scheduler-0"]


def test_signal_during_the_start_ends_it(start):
    """A signal during the start ends it and leaves nothing behind."""
    cluster = start()
    until(lambda: cluster.pids)

    assert cluster.end() == 0
    assert cluster.left() == []


def test_actor_that_a_user_ends_is_replaced(start):
    """An actor that was ended with `kill` drains and is restarted."""
    cluster = start()
    cluster.until_ready()
    os.kill(cluster.pid("w0"), signal.SIGTERM)

    until(lambda: cluster.names("ready").count("w0") == 2)
    assert cluster.names("drained") == ["w0"]
    assert "w0 ended by itself; restarting it" in cluster.output
    assert cluster.end() == 0


# ---- workers that join ---------------------------------------------------------------------------------------


def test_life_of_a_joined_worker(start):
    """A joined worker is restarted after a death, which is announced, and its name is free again once it has left."""
    cluster = start()
    cluster.until_ready()
    joiner = cluster.join("d1")
    until(lambda: "d1 is ready" in cluster.said("d1") and "d1" in cluster.names("ready"))
    assert "d1" in find_running(cluster.log_dir)["resolved"]["joined"]
    os.kill(cluster.pid("d1"), signal.SIGKILL)
    until(lambda: cluster.names("ready").count("d1") == 2)
    until(lambda: [word[:8] for word, name, _ in cluster.notes if name == "scheduler-0"][1:] == ["died:d1."])
    assert "d1 was killed by SIGKILL; restarting it" in cluster.said("d1")
    assert idle_share([cluster.process.pid, joiner.pid]) < 0.02

    joiner.send_signal(signal.SIGINT)
    assert joiner.wait(PATIENCE_S) == 0
    assert cluster.names("drained") == ["d1"]
    assert cluster.said("d1").endswith("memserve: d1 has left\n")
    until(lambda: "memserve: d1 has left" in cluster.output)
    assert find_running(cluster.log_dir)["resolved"]["joined"] == []
    again = cluster.join("d1")
    until(lambda: cluster.names("ready").count("d1") == 3)
    assert cluster.end() == 0
    assert again.wait(PATIENCE_S) == 0


def test_a_cluster_that_drains_takes_its_joined_workers_along(start):
    """When the cluster stops, joined workers drain with the others, before the shard, and their commands end."""
    cluster = start()
    cluster.until_ready()
    joiners = [cluster.join("d1"), cluster.join("d2", d2="deaf")]
    assert cluster.join("d3", d3="user error").wait(PATIENCE_S) == 2
    assert "frontend.port: 80 is taken" in cluster.said("d3"), "not a crash loop, but the reason"
    until(lambda: {"d1", "d2"} <= set(cluster.names("ready")))

    assert cluster.end() == 0
    assert [one.wait(PATIENCE_S) for one in joiners] == [0, 0]
    drained = cluster.names("drained")
    assert sorted(drained[1:3]) == ["d1", "w0"]
    assert drained[:1] + drained[3:] == ["frontend-0", "s0", "scheduler-0"]
    assert "d2 did not finish within 2 s and is killed" in cluster.output
    assert cluster.left() == []


def test_kill_of_either_supervisor_leaves_no_joined_worker(start):
    """A joined worker ends when its own command or the cluster's supervisor is killed, and its death is announced."""
    cluster = start()
    cluster.until_ready()
    first, second = cluster.join("d1", d1="hung"), cluster.join("d2")
    until(lambda: {"d1", "d2"} <= set(cluster.names("ready")))
    worker = cluster.pid("d1")
    first.kill()
    until(lambda: not alive(worker))
    until(lambda: "died:d1." in "".join(word for word, _, _ in cluster.notes))
    until(lambda: "memserve: d1 has left" in cluster.output)

    cluster.process.kill()
    assert second.wait(PATIENCE_S) == 0
    assert "the cluster has ended, and d2 with it" in cluster.said("d2")
    until(lambda: not cluster.left())
