"""A supervisor and its actors on a machine that has run short of something: room on a disk, descriptors, a reader."""

from __future__ import annotations

import json
import os
import resource
import signal

import pytest

import test_supervisor
from test_supervisor import PATIENCE_S, alive, until

start = test_supervisor.start


def test_a_reader_that_stands_still_stops_no_supervisor(start, tmp_path):
    """As a terminal after Ctrl-S. An actor that died would not be restarted until somebody looks."""
    (tmp_path / "output").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "output")
    reading = os.open(tmp_path / "output", os.O_RDONLY | os.O_NONBLOCK)
    cluster = start()
    until(lambda: len(cluster.names("ready")) == 4)
    filling = os.open(tmp_path / "output", os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(filling, b"x" * 4096)
    os.kill(cluster.pid("w0"), signal.SIGKILL)
    until(lambda: cluster.names("ready").count("w0") == 2)
    os.kill(cluster.pid("w0"), signal.SIGKILL)
    until(lambda: cluster.names("ready").count("w0") == 3)
    assert cluster.end() == 0
    os.close(filling)
    os.close(reading)


def test_an_actor_comes_back_without_its_log(start):
    """A disk that becomes read-only after weeks would keep every actor that dies from coming back."""
    cluster = start()
    cluster.until_ready()
    log = cluster.log_dir / "run" / "w0.jsonl"
    log.unlink()
    log.mkdir()  # cannot be opened, as on such a disk; root may write to any other file
    os.kill(cluster.pid("w0"), signal.SIGKILL)
    until(lambda: cluster.names("ready").count("w0") == 2)
    log.rmdir()
    assert cluster.end() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["actor drained"]


def test_a_full_disk_ends_no_cluster(start):
    """Its state could not be written, and the supervisor would die of that: every stream with it."""
    cluster = start(w0="deaf")
    cluster.until_ready()
    unlimited = resource.prlimit(cluster.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(cluster.process.pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
    assert cluster.join("d1").wait(PATIENCE_S) == 2
    assert "cluster.json cannot be written: File too large; make room" in cluster.said("d1")

    cluster.process.terminate()
    until(lambda: "frontend-0" in cluster.names("drained") or cluster.process.poll() is not None)
    assert cluster.process.poll() is None
    resource.prlimit(cluster.process.pid, resource.RLIMIT_FSIZE, unlimited)  # its output is a file, too
    assert cluster.process.wait(PATIENCE_S) == 0
    assert cluster.names("drained") == ["frontend-0", "s0", "scheduler-0"]


def test_a_supervisor_without_descriptors_ends_no_cluster(start):
    """An actor that dies meanwhile is restarted when there are some again, and the others go on."""
    cluster = start()
    cluster.until_ready()
    pid, limits = cluster.process.pid, resource.prlimit(cluster.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    os.kill(cluster.pid("w0"), signal.SIGKILL)
    until(lambda: "w0 | [Errno 24]" in cluster.output or not alive(pid))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    until(lambda: cluster.names("ready").count("w0") == 2)
    assert len(cluster.names("ready")) == 5
    assert cluster.end() == 0
