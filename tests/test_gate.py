"""How a worker joins: what is refused and with which words, and what the cluster's supervisor knows of it afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from fake_cluster import resolved
from memserve import cli
from memserve.config import Resolved
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.gate import Gate
from memserve.processes.join import ask_to_join, check_machine, checked, how_hosts_join, log_dir_of
from memserve.processes.lifeline import EventSocket
from memserve.processes.place import Place
from memserve.settings.gpus import Gpu, Gpus
from memserve.settings.sections import ShardConfig, WorkerConfig

D1 = WorkerConfig(name="d1", role="decode", shard="s0", threads=None)


@attrs.define(eq=False)
class Home:
    """Stands for the supervisor behind a gate."""

    resolved: Resolved
    gate: Gate | None = None
    is_open: bool = True
    said: list[str] = attrs.field(factory=list)
    died: list[ActorId] = attrs.field(factory=list)
    connections: list[EventSocket] = attrs.field(factory=list)

    def replace_config(self, resolved: Resolved) -> None:
        """Take the new configuration."""
        self.resolved = resolved

    async def ask_to_join(self, worker: WorkerConfig = D1, cores: int = 1) -> EventSocket:
        """Ask to join, as `memserve join` does."""
        events, claim = await trio.to_thread.run_sync(ask_to_join, self.gate.place.path, worker, cores)
        assert os.path.samestat(os.fstat(claim), os.fstat(self.gate.place.fileno()))
        os.close(claim)
        self.connections.append(events)
        return events


@contextlib.asynccontextmanager
async def gate(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Home]:
    """A gate with such a supervisor behind it."""
    with tempfile.TemporaryDirectory(prefix="mst") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        place = Place.claim(log_dir)
        home = Home(resolved(log_dir))
        home.gate = Gate(
            place,
            lambda: home.resolved,
            home.replace_config,
            home.died.append,
            lambda: home.is_open,
            home.said.append,
        )
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(home.gate.run)
                yield home
                nursery.cancel_scope.cancel()
        finally:
            for one in home.connections:
                one.close()
            place.leave()


async def until(condition) -> None:
    """Wait until the gate's tasks have made the condition true."""
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


async def test_a_guest_from_its_knock_to_its_end(tmp_path, monkeypatch) -> None:
    """A joined worker is in the configuration, its deaths are announced, it can be drained, and its name is free
    afterwards."""
    async with gate(tmp_path, monkeypatch) as home:
        events = await home.ask_to_join(cores=3)
        assert home.resolved.joined == ("d1",)
        assert home.resolved.config.worker[-1] == D1
        assert home.resolved.threads["d1"] == 1, "not more than the cluster may use"
        for number in (1, 2):
            events.send(event="hello", id=f"d1.{number}")
            events.send(event="died", id=f"d1.{number}")
        events.send(event="hello", id="d1.3")
        guest = home.gate.guests["d1"]
        await until(lambda: guest.id == "d1.3")
        guest.ask_to_drain()
        assert await events.receive() == {"event": "drain"}
        events.close()
        await guest.gone.wait()
        assert home.died == ["d1.1", "d1.2", "d1.3"]
        assert (home.resolved.joined, home.gate.guests) == ((), {})
        assert home.resolved == resolved(tmp_path)
        await home.ask_to_join()


@pytest.mark.parametrize("name", ["w0", "s0", "scheduler-7", "frontend-0", "supervisor-d1", "d1"])
async def test_a_name_that_is_taken_may_not_join(tmp_path, monkeypatch, name) -> None:
    """A name that an actor of the cluster has, or could get, is refused with a list of those taken."""
    async with gate(tmp_path, monkeypatch) as home:
        await home.ask_to_join()
        before = home.resolved
        with pytest.raises(UserError) as caught:
            await home.ask_to_join(attrs.evolve(D1, name=name))
        taken = "choose a name other than scheduler-0, s0, w0, d1, frontend-0"
        assert str(caught.value) == f"--name {name} is taken in this cluster: {taken}"
        assert home.resolved == before


async def test_what_else_is_refused(tmp_path, monkeypatch) -> None:
    """An unknown shard, too many workers, and a cluster that is starting or ending are refused."""
    async with gate(tmp_path, monkeypatch) as home:
        with pytest.raises(UserError, match=r"--shard must be one of s0, not 's1'"):
            await home.ask_to_join(attrs.evolve(D1, shard="s1"))
        monkeypatch.setattr("memserve.processes.gate.GUESTS_MAX", 1)
        await home.ask_to_join()
        with pytest.raises(UserError, match="1 workers have joined, and more may not"):
            await home.ask_to_join(attrs.evolve(D1, name="d2"))
        home.is_open = False
        with pytest.raises(UserError, match="the cluster is shutting down"):
            await home.ask_to_join(attrs.evolve(D1, name="d2"))
    with pytest.raises(UserError, match="accepts no worker now: it is starting or ending"):
        ask_to_join(tmp_path, D1, 1)


@pytest.mark.parametrize(
    "words", [b"hello\n", b"{}\n", b'{"worker": "{}", "cores": "1"}\n', b"[1]\n", b'{"event', b""]
)
async def test_what_is_no_request_does_not_get_in(tmp_path, monkeypatch, words) -> None:
    """Invalid data on the supervisor's socket is ignored, and workers can still join."""
    async with gate(tmp_path, monkeypatch) as home:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(str(home.gate.place.path / "supervisor.sock"))
            stranger.send(words)
            await trio.sleep(0.01)
        events = await home.ask_to_join()
        events.send(event="hello")  # without an id
        await until(lambda: not home.gate.guests)


# ---- before the supervisor is asked --------------------------------------------------------------------------


def test_a_worker_as_written(tmp_path) -> None:
    """The options of `memserve join` are checked by the rules of the configuration."""
    cluster = resolved(tmp_path)
    given = {"name": "d1", "role": "decode", "shard": "", "threads": None}
    assert checked(given, cluster) == D1
    with pytest.raises(UserError) as caught:
        checked({**given, "name": "D1", "threads": 0}, cluster)
    assert [line.partition(" must ")[0] for line in str(caught.value).splitlines()] == ["--name", "--threads"]
    two = (ShardConfig(name="s0"), ShardConfig(name="s1"))
    several = attrs.evolve(cluster, config=attrs.evolve(cluster.config, shard=two))
    with pytest.raises(UserError, match="--shard must be one of s0, s1: the cluster has several"):
        checked(given, several)


def test_what_the_machine_must_have(tmp_path) -> None:
    """A worker that needs more cores or GPU memory than there are is refused."""
    cluster = resolved(tmp_path)
    check_machine(D1, cluster, 1)
    with pytest.raises(UserError, match=r"--threads must be at most 2, .* not 3"):
        check_machine(attrs.evolve(D1, threads=3), cluster, 2)
    on_gpu = attrs.evolve(
        cluster,
        config=attrs.evolve(cluster.config, shard=(ShardConfig(name="s0", device="cuda:0"),)),
        gpu_worker_bytes=2 << 30,
    )
    for free, problem in ((3 << 30, ""), (1 << 30, r"needs 2 GiB of cuda:0, and 1 GiB are free")):
        gpus = Gpus((Gpu(0, "u", "H100", free, (9, 0)),))
        with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
            check_machine(D1, on_gpu, 1, lambda gpus=gpus: gpus)
    with pytest.raises(UserError, match="on cuda:0, but no driver"):
        check_machine(D1, on_gpu, 1, lambda: Gpus(problem="no driver"))


def test_which_cluster_is_meant(tmp_path, monkeypatch) -> None:
    """The cluster to join is found by its logging directory, given directly or through a configuration."""
    assert log_dir_of(None, [], None) == Path("logs")
    assert log_dir_of(None, [], tmp_path) == tmp_path
    assert log_dir_of("demo", [f"logging.dir={tmp_path}"], None) == tmp_path
    with pytest.raises(UserError, match="give either --config or --log-dir"):
        log_dir_of("demo", [], tmp_path)
    with pytest.raises(UserError, match="--set requires --config"):
        log_dir_of(None, ["frontend.port=1"], None)


def test_a_cluster_of_another_version_cannot_be_joined(capsys, tmp_path, monkeypatch) -> None:
    """After an update, somebody would get a traceback, and not learn that the cluster must be restarted."""
    monkeypatch.setattr("memserve.processes.join.find_running", lambda log_dir: {"pid": 7, "resolved": {}})
    assert cli.run(["join", "--name", "d1", "--log-dir", str(tmp_path)]) == 2
    assert "was started by another version of memserve: restart it" in capsys.readouterr().err


def test_mistakes_of_the_command_line_exit_2(capsys, tmp_path) -> None:
    """Mistakes in the arguments of `memserve join` exit with status 2 and the reason."""
    for words, said in (
        (["join", "--name", "d1", "--log-dir", str(tmp_path)], "no running memserve logs to"),
        (["join", "tcp://h:1", "--name", "d1"], how_hosts_join("tcp://h:1")),
        (["join"], "--name"),
        (["join", "--name", "d1", "--role", "boss"], "boss"),
    ):
        assert cli.run(words) == 2
        assert said in capsys.readouterr().err
