"""An actor's side of its lifeline, and how its process ends (with the supervisor: test_supervisor.py)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
import trio
import trio.testing

from memserve.actions import Kill
from memserve.actors.mempool_shard import fence
from memserve.engine.spec import find_model
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.kernels import memory
from memserve.processes.actor import RestartNeeded, _explain, raise_descriptor_limit
from memserve.processes.lifecycle import BEAT_S, STATUS_CRASHED
from memserve.processes.lifeline import DIED_MESSAGES, EventSocket, Lifeline
from test_gguf import DEMO

NO_MEMORY = (
    "There is too little memory: 0 MiB are available on this machine. "
    "Set a smaller [[shard]] memory or fewer [[worker]]s, or stop something else.\n"
)


@pytest.fixture
def ends():
    """Both ends of a lifeline: a raw socket, and the actor's side."""
    raw, theirs = socket.socketpair()
    with raw, theirs:
        yield raw, EventSocket(theirs)


async def test_events_arrive_whole_however_they_are_cut(ends):
    """Events are received whole, also if their bytes arrive in pieces."""
    raw, events = ends
    raw.send(b'{"event": "drain"}\n{"event": "di')
    assert await events.receive() == {"event": "drain"}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check_next, events, {"event": "died", "id": "w0.1"})
        await trio.testing.wait_all_tasks_blocked()
        raw.send(b'ed", "id": "w0.1"}\n')


async def check_next(events: EventSocket, expected: dict[str, str] | None) -> None:
    assert await events.receive() == expected


@pytest.mark.parametrize("cut", [b"", b'{"event": "dr'])
async def test_end_of_file_is_the_end(ends, cut):
    """The end of the connection is reported as the end, also within an event, and sending fails from then on."""
    raw, events = ends
    raw.send(cut or b'{"event": "drain"}\n')
    raw.close()
    if not cut:
        assert await events.receive() is not None

    assert await events.receive() is None
    assert not events.send(event="ready")


async def test_endless_line_is_the_end(ends):
    """A line without end is treated as the end of the connection instead of filling the memory."""
    raw, events = ends
    raw.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"x" * (1 << 20))
        assert await events.receive() is None
        nursery.cancel_scope.cancel()


async def test_send_never_blocks(ends):
    """Sending to a peer that does not read fails instead of blocking."""
    _, events = ends

    lines = 0
    while events.send(event="died", id="w0.1"):
        lines += 1
    assert lines > 100
    raw = ends[0]
    assert raw.recv(1 << 24).endswith(b'"w0.1"}\n')


async def test_lifeline_passes_on_what_the_supervisor_sends(ends):
    """The lifeline passes on deaths, up to a limit, the drain, and the supervisor's end."""
    raw, events = ends
    lifeline = Lifeline(ActorId("scheduler-0.1"), events)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lifeline.listen)
        died = [b'{"event": "died", "id": "w%d.1"}\n' % i for i in range(DIED_MESSAGES + 50)]
        raw.send(b"".join(died) + b'{"event": "drain"}\n')
        await lifeline.drain.wait()
        assert not lifeline.gone.is_set()
        raw.close()

    assert lifeline.gone.is_set()
    assert lifeline.died.receive_nowait() == "w0.1"
    assert lifeline.died.statistics().current_buffer_used == DIED_MESSAGES - 1


async def test_an_actor_goes_on_to_report_after_its_supervisor_was_stopped(
    ends, autojump_clock: trio.testing.MockClock
):
    """Its buffer is full after ten minutes: all actors would fall silent for good, and be killed as hung when it goes on."""
    raw, events = ends
    while events.send(event="alive"):
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Lifeline(ActorId("w0.1"), events).beat)
        await trio.sleep(2 * BEAT_S)
        while raw.recv(1 << 20).endswith(b"\n") and select.select([raw], [], [], 0)[0]:
            pass
        await trio.sleep(2 * BEAT_S)
        assert select.select([raw], [], [], 0)[0]
        nursery.cancel_scope.cancel()


def test_ready_is_reported_once(ends):
    """An actor reports once that it is ready."""
    raw, events = ends
    lifeline = Lifeline(ActorId("w0.1"), events)

    lifeline.ready()
    lifeline.ready()
    assert raw.recv(1000) == b'{"event": "ready", "id": "w0.1"}\n'


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("the port is taken"), 2, "the port is taken\n"),
        (
            ExceptionGroup("", [ExceptionGroup("", [UserError("the port is taken")])]),
            2,
            "the port is taken\n",
        ),
        (ExceptionGroup("", [RestartNeeded("s0 is gone"), RestartNeeded("s0 is gone")]), 3, "s0 is gone\n"),
        (ExceptionGroup("", [UserError("no"), KeyError("bug")]), 1, "KeyError: 'bug'"),
        (ValueError("bug"), 1, "ValueError: bug\n"),
        (ExceptionGroup("", [MemoryError("the native step")]), 2, NO_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: (Cannot allocate memory)"), 2, NO_MEMORY),
    ],
)
def test_exit_status_says_how_an_actor_failed(error, status, text, capsys, monkeypatch):
    """User errors, restarts, lack of memory and bugs have different exit statuses and texts."""
    monkeypatch.setattr(memory, "memory_available", lambda: 0)  # else it changes between two calls
    assert _explain(error) == status
    shown = capsys.readouterr().err
    assert text in shown if status == STATUS_CRASHED else text == shown


def test_actor_of_an_ended_cluster_does_not_start():
    """An actor whose cluster has ended does not start."""
    code = "import sys; from memserve.processes.actor import run_actor; sys.exit(run_actor(*sys.argv[1:3], int(sys.argv[3])))"
    with tempfile.TemporaryDirectory() as empty:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, "-c", code, "w0", empty, str(theirs.fileno())]
            done = subprocess.run(command, pass_fds=[theirs.fileno()], env=environment(), check=False)
    assert done.returncode == STATUS_CRASHED


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


PREPARE = "import sys; from memserve.processes.actor import prepare_weights; sys.exit(prepare_weights(*sys.argv[1:]))"


def prepare(path, **more):
    """Run the command that prepares the weights, to its end, with an open lifeline."""
    command = [sys.executable, "-c", PREPARE, str(path), "bfloat16", "bfloat16"]
    read, write = os.pipe()
    done = subprocess.run(
        command, stdin=read, env=environment() | more, capture_output=True, text=True, check=False
    )
    os.close(read)
    os.close(write)
    return done


def test_an_actor_may_open_what_its_system_allows():
    """With the usual limit of 1,024, as many clients as frontend.max_requests allows would be too many."""
    code = (
        "import resource; from memserve.processes.actor import raise_descriptor_limit\n"
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))\n"
        "raise_descriptor_limit()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shard_with_many_connections_fences_a_worker_off():
    """It would end with "descriptor out of range", and all of its pages with it."""
    title = (
        "import setproctitle, time; setproctitle.setproctitle('memserve w0 here'); print(); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-u", "-c", title], stdout=subprocess.PIPE)
    assert worker.stdout is not None and worker.stdout.readline()
    worker.send_signal(signal.SIGSTOP)
    raise_descriptor_limit()
    with contextlib.ExitStack() as held:
        for _ in range(1_024):
            held.callback(os.close, os.dup(0))
        fence(Kill(ActorId("w0.1"), worker.pid))
    assert worker.wait(10) == -signal.SIGKILL
    worker.stdout.close()


def test_weights_are_ready_without_a_compiler():
    """Weights are prepared without a C++ compiler."""
    done = prepare(find_model(DEMO), CXX="/nonexistent/g++")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_weights_that_cannot_be_used_are_a_user_error(tmp_path):
    """A wrong model path is a user error."""
    done = prepare(tmp_path / "absent.gguf")
    assert done.returncode == 2, done.stderr
    assert "absent.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shell_s_limit_is_named_and_not_the_machine():
    """Memory that `ulimit -v` limits is reported as that limit, not as too small a machine."""
    code = (
        "import resource; from memserve.processes.actor import _explain; from memserve.kernels.arena import Arena\n"
        "words = open('/proc/self/statm').read().split(); used = int(words[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try: Arena.create('s0.1', 1 << 17, 1 << 10)\n"
        "except Exception as error: raise SystemExit(_explain(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "MiB of addresses (ulimit -v)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_weights_are_given_up_with_the_supervisor(tmp_path):
    """Preparing weights ends when the supervisor ends."""
    waiting = tmp_path / "never-written.gguf"
    os.mkfifo(waiting)
    command = [sys.executable, "-c", PREPARE, str(waiting), "bfloat16", "bfloat16"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment(), stderr=subprocess.DEVNULL
    ) as child:
        child.stdin.close()
        assert child.wait(10) == 1


def test_supervisor_and_actor_processes_start_without_torch():
    """The supervisor imports neither torch nor numpy."""
    code = "import sys, memserve.supervisor; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
