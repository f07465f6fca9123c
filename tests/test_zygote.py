"""A zygote and the processes that it forks. (With real actors: test_supervisor.py and test_up.py.)"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from clusters import running
from memserve.processes import zygote as module
from memserve.processes.orphans import BEGUN_BY
from memserve.processes.place import Place
from memserve.processes.zygote import Zygote, end, serve


def argv(runtime_dir: Path, modules: list[str], orders_fd: int) -> list[str]:
    return [sys.executable, __file__, str(runtime_dir), str(orders_fd), *modules]


def be_actor(name: str, lifeline: int) -> int:
    """Send a line about this process through the lifeline, wait for one, and end as the name says."""
    with socket.socket(fileno=lifeline) as events:
        found = {
            "pid": os.getpid(),
            "descriptors": sorted(int(entry) for entry in os.listdir("/proc/self/fd"))[:-1],
            "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
            "at_sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        }
        print(f"output of {name}", flush=True)
        events.send(json.dumps(found).encode())
        events.recv(1)
    return int(name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="mst") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        claimed = Place.claim(tmp_path)
        yield claimed
        claimed.leave()
    ctypes.CDLL(None).prctl(module.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)  # other tests' orphans are not ours


@asynccontextmanager
async def forked(zygote: Zygote, name: str):
    """An actor's process, and what it reported."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = await zygote.fork(name, theirs)
        ours.settimeout(10)
        yield process, json.loads(await trio.to_thread.run_sync(ours.recv, 4096))
        process.kill()
        await process.wait()
        await process.stdout.aclose()


async def test_a_forked_process_is_a_child_of_this_one(place):
    """Its pid, parent, title, output and exit status are those of a process that was spawned here."""
    async with Zygote(place, argv=argv) as zygote, forked(zygote, "7") as (process, found):
        assert found["pid"] == process.pid
        assert parent_of(Path(f"/proc/{process.pid}")) == os.getpid()
        assert found["title"] == f"memserve 7 {place.path}"
        assert found["at_sigterm"]
        lifeline_and_claim = 2
        assert len(found["descriptors"]) == 3 + lifeline_and_claim
        assert await process.stdout.receive_some() == b"output of 7\n"
    assert process.returncode in (7, -signal.SIGKILL)


async def test_ends_are_reported_as_those_of_spawned_processes(place):
    """An exit status is positive, a signal negative; a kill after the end does nothing."""
    async with Zygote(place, argv=argv) as zygote:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = await zygote.fork("7", theirs)
            ours.send(b".")
            assert await process.wait() == process.returncode == 7
        process.kill()
        await process.stdout.aclose()
        async with forked(zygote, "7") as (killed, _):
            killed.kill()
            assert await killed.wait() == -signal.SIGKILL


async def test_actors_outlive_their_zygote_and_the_next_has_another(place):
    """A zygote killed or stopped by hand costs the cluster nothing, and only time at the next restart."""
    async with Zygote(place, argv=argv) as zygote, forked(zygote, "1") as (first, _):
        os.kill(zygote._process.pid, signal.SIGKILL)
        await zygote._process.wait()
        async with forked(zygote, "2") as (second, _):
            assert alive(first.pid)
            assert alive(second.pid)


async def test_a_zygote_that_hangs_is_replaced(place, monkeypatch):
    """An order that a hanging zygote does not answer fails; the next one has another zygote."""
    monkeypatch.setattr(module, "FORK_S", 3.0)
    monkeypatch.setattr(module, "END_S", 0.1)
    async with Zygote(place, argv=argv) as zygote:
        stopped = zygote._process.pid
        os.kill(stopped, signal.SIGSTOP)
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(OSError, match="the zygote does not answer"):
            await zygote.fork("1", theirs)
        assert not alive(stopped)
        async with forked(zygote, "1"):
            assert zygote._process.pid != stopped


async def test_an_order_that_was_perhaps_followed_is_not_repeated(place):
    """A zygote that dies after it has forked leaves an actor, which ends with its lifeline; it gets no twin there."""
    dies = "import os, socket, sys, time; order = socket.socket(fileno=int(sys.argv[1])); socket.recv_fds(order, 9, 2)"
    orders = []

    def counted(_dir: Path, _modules: list[str], orders_fd: int) -> list[str]:
        orders.append(orders_fd)
        return [sys.executable, "-c", dies, str(orders_fd)]

    async with Zygote(place, argv=counted) as zygote:
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(OSError, match="the zygote does not answer"):
            await zygote.fork("1", theirs)
        assert len(orders) == 1


@pytest.mark.skipif(
    not Path("/proc/thread-self/children").exists(),
    reason="the kernel lists no children (CONFIG_PROC_CHILDREN)",
)
async def test_only_what_actors_left_is_ended_as_such(place):
    """Children of this process, actors that run and the zygote itself are no orphans, nor is what others left."""
    older = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220
    try:
        async with Zygote(place, argv=argv) as zygote, forked(zygote, "1") as (actor, _):
            parent = ["sh", "-c", "sleep 60 >/dev/null & echo $!"]  # it ends before its child
            begun_by = {**os.environ, BEGUN_BY: str(place.path)}
            orphan, foreign = (
                int(subprocess.check_output(parent, stderr=subprocess.DEVNULL, env=env).split()[0])  # noqa: ASYNC221
                for env in (begun_by, {**begun_by, BEGUN_BY: "another"})
            )
            await zygote.end_orphans()
            assert not alive(orphan)
            assert all(map(alive, (older.pid, actor.pid, zygote._process.pid, foreign)))
            os.kill(foreign, signal.SIGKILL)
            with trio.fail_after(10):
                while alive(foreign):  # what has ended is waited for, whoever began it
                    await zygote.end_orphans()
                    await trio.sleep(0.01)
            assert older.poll() is actor.returncode is zygote._process.returncode is None
    finally:
        older.kill()
        older.wait()


async def test_a_zygote_ends_with_its_supervisor(place):
    """A zygote ends by itself when its orders' socket is closed, as the kernel does for a supervisor that was killed."""
    async with Zygote(place, argv=argv) as zygote:
        zygote._orders.close()
        with trio.fail_after(10):
            assert await zygote._process.wait() == 0


def test_a_real_zygote_has_one_thread(tmp_path):
    """A fork copies only the thread that forks: locks that others hold would stay locked in the actor."""
    for dtype in ("bfloat16", "float32"):  # the second imports torch, too
        with running("demo.toml", tmp_path / dtype, f"model.dtype={dtype}") as cluster:
            zygotes = [
                entry for entry in Path("/proc").glob("[0-9]*")
                if parent_of(entry) == cluster.process.pid and b"memserve zygote" in (entry / "cmdline").read_bytes()
            ]  # fmt: skip
            assert len(zygotes) == 1
            status = (zygotes[0] / "status").read_text()
            assert "\nThreads:\t1\n" in status
        until_gone(zygotes[0])


def alive(pid: int) -> bool:
    """Whether a process runs, or has not been waited for."""
    return Path(f"/proc/{pid}").exists()


def parent_of(entry: Path) -> int:
    """The parent of a process of /proc; 0 if the process is gone."""
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def until_gone(entry: Path) -> None:
    deadline = time.monotonic() + 5
    while entry.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


if __name__ == "__main__":
    actor, lifeline_fd = serve(sys.argv[1], sys.argv[3:], int(sys.argv[2]))
    end(be_actor(actor, lifeline_fd))
