"""The runtime directory: one cluster at a time, private, and nothing left behind."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.place import Place, PlaceGone, find_running, place_path


@pytest.fixture
def log_dir(tmp_path, monkeypatch):
    """A logging directory whose runtime directory is in a short temporary directory."""
    with tempfile.TemporaryDirectory(prefix="mst") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        yield tmp_path
        assert not list(Path(base).iterdir())


def vanish(place: Place) -> None:
    """Close the files of a place, as the kernel does when a process is killed."""
    for fd in (place._roll_fd, place._claim_fd):
        if fd is not None:
            os.close(fd)
    place._roll_fd, place._claim_fd = -1, None


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def info(pid: int, state: str = "ready") -> dict[str, object]:
    return {"pid": pid, "state": state, "url": "http://h:1", "started_at": "2026-01-02T03:04:05+00:00"}


def test_place_is_private(log_dir):
    """The runtime directory and its files can be read by their owner only."""
    place = Place.claim(log_dir)
    place.write_info(info(1))

    assert stat.S_IMODE(place.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((place.path / "cluster.json").stat().st_mode) == 0o600
    place.leave()
    assert not place.path.exists()


def test_second_claim_names_what_runs_here(log_dir):
    """A second claim is refused with pid, address and start of the cluster that runs."""
    place = Place.claim(log_dir)
    place.write_info(info(os.getpid()))

    with pytest.raises(UserError) as caught:
        Place.claim(log_dir)
    place.leave()

    for part in (
        str(os.getpid()),
        "http://h:1",
        "2026-01-02T03:04:05",
        f"kill {os.getpid()}",
        "[logging] dir",
    ):
        assert part in str(caught.value)


def test_claim_during_shutdown_says_so(log_dir):
    """A claim while a cluster is shutting down is refused with that reason."""
    place = Place.claim(log_dir)
    for left in (None, info(dead_pid()), info(os.getpid(), state="draining")):
        if left:
            place.write_info(left)

        said = "memserve here is still shutting down" if left else "is starting or still shutting down here"
        with pytest.raises(UserError, match=said):
            Place.claim(log_dir)
    place.leave()


def test_other_log_dirs_are_other_places(log_dir):
    """Different logging directories have different runtime directories."""
    one, two = Place.claim(log_dir / "a"), Place.claim(log_dir / "b")

    assert one.path != two.path
    one.leave()
    two.leave()


def test_symlinked_log_dir_is_the_same_place(log_dir):
    """A symbolic link to a logging directory has the same runtime directory."""
    (log_dir / "real").mkdir()
    (log_dir / "link").symlink_to("real")

    assert place_path(log_dir / "link") == place_path(log_dir / "real")


def test_claim_after_everything_was_killed_clears_the_place(log_dir):
    """After all processes were killed, a new claim succeeds and removes what they left."""
    dead = Place.claim(log_dir)
    dead.write_info(info(1))
    dead.socket_path("w0.00000000.sock").touch()
    vanish(dead)

    place = Place.claim(log_dir)
    assert [path.name for path in place.path.iterdir()] == ["roll"]
    place.leave()


def test_claim_lives_as_long_as_any_process_that_inherited_it(log_dir):
    """The claim lasts until the last process that inherited it has ended."""
    place = Place.claim(log_dir)
    wait_for_input = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(wait_for_input, stdin=subprocess.PIPE, pass_fds=[place.fileno()]):
        vanish(place)
        with pytest.raises(UserError):
            Place.claim(log_dir)
    Place.claim(log_dir).leave()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_last_to_leave_removes_everything(log_dir, order):
    """The last process to leave removes all files, in any order and also those of a killed one."""
    supervisor = Place.claim(log_dir)
    supervisor.write_info(info(1))
    everyone = [supervisor, *(Place.join(supervisor.path) for _ in range(3))]
    supervisor.socket_path("killed.00000000.sock").touch()
    vanish(everyone[order[1]])

    for i in (order[0], order[2]):
        everyone[i].leave()
        assert (supervisor.path / "cluster.json").exists()
    everyone[order[3]].leave()
    assert not supervisor.path.exists()


def test_leave_removes_own_sockets_only(log_dir):
    """An actor that leaves removes its own sockets only."""
    place = Place.claim(log_dir)
    actor = Place.join(place.path)
    for name in ("w0.0000000a.sock", "w0.0000000a.arena", "w0.sock", "w0.0000000b.sock", "w00.sock"):
        place.socket_path(name).touch()

    actor.leave(ActorId("w0.0000000a"))
    assert {path.name for path in place.path.glob("w*")} == {"w0.0000000b.sock", "w00.sock"}
    place.leave()


def test_joining_an_ended_cluster_is_refused(log_dir):
    """Joining the directory of an ended cluster is refused."""
    place = Place.claim(log_dir)
    place.leave()

    with pytest.raises(PlaceGone):
        Place.join(place.path)


def test_find_running_is_none_without_a_living_supervisor(log_dir):
    """A cluster is found only while its supervisor lives."""
    assert find_running(log_dir) is None
    place = Place.claim(log_dir)
    place.write_info(info(os.getpid()))
    assert find_running(log_dir) == info(os.getpid())
    place.write_info(info(dead_pid()))
    assert find_running(log_dir) is None
    place.leave()
    assert find_running(log_dir) is None


def test_a_cluster_is_found_from_another_environment(log_dir, monkeypatch):
    """A service has no XDG_RUNTIME_DIR and a login has one: `memserve status` would find nothing, `up` start a second one."""
    with tempfile.TemporaryDirectory(prefix="mst") as base:
        login = os.environ["XDG_RUNTIME_DIR"]
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.setattr(tempfile, "tempdir", base)
        place = Place.claim(log_dir)
        place.write_info(info(os.getpid()))
        monkeypatch.setenv("XDG_RUNTIME_DIR", login)
        assert find_running(log_dir)["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"already runs here: pid {os.getpid()}"):
            Place.claim(log_dir)
        place.leave()
        assert find_running(log_dir) is None
        Place.claim(log_dir).leave()


def test_looking_does_not_disturb_a_claim(log_dir):
    """Looking for a cluster never makes a claim fail."""
    place = Place.claim(log_dir)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            find_running(log_dir)

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(50):
        place.leave()
        place = Place.claim(log_dir)
    stop.set()
    looker.join()
    place.leave()


def test_at_most_one_of_many_claims_wins(log_dir):
    """Of many claims at the same time at most one holds."""
    holders, most, wins = 0, 0, 0
    lock = threading.Lock()

    def contend() -> None:
        nonlocal holders, most, wins
        for _ in range(20):
            try:
                place = Place.claim(log_dir)
            except UserError:
                continue
            with lock:
                holders, wins = holders + 1, wins + 1
                most = max(most, holders)
            with lock:
                holders -= 1
            place.leave()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert wins > 20


def test_place_open_to_others_is_refused(log_dir):
    """A runtime directory that others can enter is refused."""
    place_path(log_dir).mkdir(mode=0o755)

    with pytest.raises(UserError, match=r"not private.*0755.*0700"):
        Place.claim(log_dir)
    place_path(log_dir).rmdir()


def test_place_that_is_a_link_is_refused(log_dir):
    """A runtime directory that is a symbolic link is refused."""
    place_path(log_dir).symlink_to(log_dir)

    with pytest.raises(UserError, match="not a directory of this user"):
        Place.claim(log_dir)
    place_path(log_dir).unlink()


def test_long_runtime_directory_is_passed_over(log_dir, monkeypatch):
    """A runtime directory too long for socket paths is not used."""
    (log_dir / ("x" * 80)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(log_dir / ("x" * 80)))

    path = place_path(log_dir)
    assert len(str(path / f"{'n' * 32}.12345678.arena")) <= 107


def test_endpoint_names_the_socket_or_says_that_it_is_too_long(log_dir):
    """An endpoint names the actor's socket, or is refused if the actor's name is too long."""
    place = Place.claim(log_dir)

    assert place.endpoint("w0.0000000a") == f"ipc://{place.path}/w0.0000000a.sock"
    with pytest.raises(UserError, match="shorten the actor's name"):
        place.endpoint("n" * 100)
    place.leave()
