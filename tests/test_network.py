"""What a host of several needs: a private key, its own address, and the same model as all others."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from memserve import cli
from memserve.actions import Send
from memserve.errors import ConfigError, UserError
from memserve.identity import ActorId
from memserve.messages import Ended, Gone, Load, Member, Refused
from memserve.scheduling.cost_model import LINKS
from memserve.scheduling.fleet import Fleet
from memserve.scheduling.policies import RoundRobin
from memserve.scheduling.pricing import Cost, Weights
from memserve.scheduling.scheduler import SchedulerCore
from memserve.settings.configfile import load
from memserve.settings.network import HostNetwork, find_network, make_key, own_address, read_key
from memserve.settings.sections import ClusterConfig

MODEL = '[model]\npath = "m.gguf"\n'
TERMS = {"model.path": "content 1", "pool.page_tokens": "16"}
HEAD = "10.0.0.1"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A new key."""
    make_key(tmp_path / "key")
    return tmp_path / "key"


def test_a_key_is_private_and_never_overwritten(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new key is readable by its owner only, is never overwritten, and is refused if others can read it."""
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert cli.run(["key", str(key)]) == 2
    assert "exists" in capsys.readouterr().err
    keys = read_key(key)
    assert keys.secret in key.read_text() and keys.secret not in repr(keys)
    key.chmod(0o640)
    with pytest.raises(UserError, match="mode 0640, must have owner"):
        read_key(key)


def test_a_key_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    """An empty file would stay, be taken for a key, and never be overwritten."""
    shell = f"ulimit -f 0; exec {sys.executable} -m memserve key {tmp_path}/key"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"{tmp_path}/key cannot be written: File too large\n")
    assert not (tmp_path / "key").exists()


def test_a_file_that_is_no_key_is_called_so(tmp_path: Path) -> None:
    """A missing or wrong key file is refused with a clear error."""
    with pytest.raises(UserError, match=r"does not exist: make it on one host with `memserve key"):
        read_key(tmp_path / "key")
    (tmp_path / "key").touch(mode=0o600)
    for text in ("", "memserve-cluster-key short\n", "memserve-cluster-key " + "\xff" * 40):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UserError, match="does not contain a cluster's key"):
            read_key(tmp_path / "key")


def test_both_hosts_find_their_place(key: Path) -> None:
    """Both hosts find their addresses: the scheduler's is fixed, and the system chooses the ports of the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = f"localhost:{port}"
    keys = read_key(key)
    first = find_network(ClusterConfig(listen=place, key=str(key)))
    second = find_network(ClusterConfig(join=place, address="127.0.0.2", key=str(key)))
    assert first is not None and second is not None
    assert first == HostNetwork(first.address, first.head, False, keys) and first.suffix == ""
    assert second == HostNetwork("127.0.0.2", first.head, True, keys) and second.suffix == "-127-0-0-2"
    assert second.inbox == "tcp://127.0.0.2:*"
    assert HostNetwork("fd00::2", "", True, keys).inbox == "tcp://[fd00::2]:*"


def test_an_address_must_be_this_machines_and_its_port_free() -> None:
    """An address that is not this machine's, or whose port is in use, is refused with the setting's name."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cluster.listen: port \d+ of 127.0.0.1 is in use already"):
            own_address("127.0.0.1", "cluster.listen", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"192.0.2.1 is not an address of this machine"):
        own_address("192.0.2.1", "cluster.address")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cluster]\nkey = 'k'", "cluster must have listen, on the host of the scheduler, or join, on the others"),
        ("[cluster]\nlisten = '10.0.0.1'\nkey = 'k'", "cluster.listen must be HOST:PORT"),
        ("[cluster]\nlisten = '0.0.0.0:7'\nkey = 'k'", "cluster.listen must be HOST:PORT"),
        ("[cluster]\nlisten = '[::1]:70000'\nkey = 'k'", "cluster.listen must be HOST:PORT"),
        ("[cluster]\nlisten = '[fd00::1]:7070'", "cluster.key is required"),
        ("[cluster]\nlisten = 'a:1'\njoin = 'b:1'\nkey = 'k'", "cluster.join must be left out where listen is set"),
        ("[cluster]\njoin = 'a:1'\nkey = 'k'", "cluster.address is required with join"),
        ("[cluster]\nlisten = 'a:1'\naddress = 'a'\nkey = 'k'", "cluster.address must be left out without join"),
        (
            "[cluster]\njoin = 'a:1'\naddress = 'b'\nkey = 'k'\n[scheduler]\npolicy = 'cost'",
            'scheduler must be left out with cluster.join: the scheduler is at "a:1"',
        ),
        ("[cluster]\nlisten = 'a:1'\nkey = 'k'\n[scheduler]\ncount = 2", "scheduler.count must be 1 with [cluster]"),
        ("[cluster]\nlisten = 'a:1'\nkey = 'k'\n[transfer]\npath = 'mapped'", "transfer.path must be auto, tcp or"),
    ],
)  # fmt: skip
def test_a_wrong_cluster_table_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    """A wrong [cluster] table is refused with what is wrong."""
    (tmp_path / "c.toml").write_text(MODEL + text)
    with pytest.raises(ConfigError) as wrong:
        load(str(tmp_path / "c.toml"))
    assert said in str(wrong.value)


def test_a_host_of_several_may_have_one_side_only(tmp_path: Path) -> None:
    """A host of a cluster may have prefill or decode workers only."""
    (tmp_path / "c.toml").write_text(
        MODEL + "[[worker]]\nname = 'p0'\nrole = 'prefill'\n[cluster]\nlisten = 'a:1'\nkey = 'k'"
    )
    assert [one.role for one in load(str(tmp_path / "c.toml")).worker] == ["prefill"]


def test_pages_between_hosts_are_priced_as_they_go() -> None:
    """Transfers between hosts are priced by the network, those within a host by the local path."""
    cost, fleet = Cost(Weights(path="mapped", far_path="tcp")), Fleet()
    for name, host in (("s0", HEAD), ("s1", HEAD), ("s2", "10.0.0.2")):
        fleet.heard(Member(ActorId(f"{name}.1"), "MemPoolShard", "", 1, "ready", host=host), 0.0)
    assert cost.link(fleet, ActorId("s0.1"), ActorId("s1.1")) == LINKS["mapped"]
    assert cost.link(fleet, ActorId("s0.1"), ActorId("s2.1")) == LINKS["tcp"]


# ---- the scheduler -------------------------------------------------------------------------------------------


def member(name: str, host: str, incarnation: int = 1) -> Member:
    """A worker that reports."""
    return Member(
        ActorId(f"{name}.{incarnation}"), "DecodeWorker", f"tcp://{host}:1", 1, "ready", "both", host=host
    )


@pytest.fixture
def core() -> SchedulerCore:
    """The scheduler of a cluster of several hosts, which has heard from a worker of its own host."""
    me = Member(ActorId("scheduler-0.1"), "GlobalScheduler", "tcp://10.0.0.1:7070", 1, "ready", host=HEAD)
    core = SchedulerCore(me, "round_robin", RoundRobin())
    core.terms = TERMS
    core.receive(ActorId("w0.1"), Load(member("w0", HEAD), TERMS), 0.0)
    core.take()
    return core


def answers(core: SchedulerCore, one: Member, terms: dict[str, str], now: float = 1.0) -> list[str]:
    """The reasons for which a newcomer is refused."""
    core.receive(one.id, Load(one, terms), now)
    sent = [action.message for action in core.take() if isinstance(action, Send) and action.to == one.id]
    return [message.reason for message in sent if isinstance(message, Refused)]


def test_who_has_another_model_is_refused_before_anything_is_placed_on_it(core: SchedulerCore) -> None:
    """A worker with another model is refused and never becomes a member."""
    other = TERMS | {"model.path": "content 2"}
    (reason,) = answers(core, member("w1", "10.0.0.2"), other)
    assert (
        reason
        == "model.path must be the same on all hosts of the cluster: content 1 on the scheduler's, not content 2"
    )
    assert ActorId("w1.1") not in core.membership.members
    assert answers(core, member("w1", "10.0.0.2"), TERMS) == []
    assert ActorId("w1.1") in core.membership.members


def test_a_host_that_is_refused_leaves_no_connection(core: SchedulerCore) -> None:
    """One that is started again each second would take the scheduler's last socket, and newcomers could not be answered."""
    refused = member("w1", "10.0.0.2")
    core.receive(refused.id, Load(refused, TERMS | {"model.path": "content 2"}), 1.0)
    sent = [one for one in core.take() if isinstance(one, Send) and isinstance(one.message, Refused)]
    assert [(one.to, one.last) for one in sent] == [(refused.id, True)]


def test_a_name_belongs_to_the_host_that_has_it(core: SchedulerCore) -> None:
    """A name that an actor of another host has is refused; a successor on the same host is accepted."""
    (reason,) = answers(core, member("w0", "10.0.0.2", incarnation=5), TERMS)
    assert reason == "the name w0 is taken by an actor of the host 10.0.0.1: choose another on 10.0.0.2"
    assert answers(core, member("w0", HEAD, incarnation=2), TERMS) == []
    assert [one for one in core.membership.members if one.startswith("w0.")] == ["w0.2"]


def test_a_death_that_is_passed_on_is_announced_at_once(core: SchedulerCore) -> None:
    """A death that a shard of another host reports is announced at once."""
    answers(core, member("w1", "10.0.0.2"), TERMS)
    core.receive(ActorId("s1.1"), Ended((ActorId("w1.1"),)), 2.0)
    announced = [
        action for action in core.take() if isinstance(action, Send) and isinstance(action.message, Gone)
    ]
    assert Send(ActorId("w0.1"), Gone((ActorId("w1.1"),))) in announced
    assert ActorId("w1.1") not in core.membership.members
