"""A cluster of two hosts, as two places with their own addresses on one machine: prompts on one, answers on the other."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import httpx
import pytest

from alone import Alone
from clusters import UNKNOWN, Cluster, actor_processes, command, start, stream_through_a_kill
from memserve.engine.spec import find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import prepare
from memserve.settings.network import make_key
from test_bus import free_port
from test_model import DEMO

pytestmark = pytest.mark.usefixtures("native_step")
IDS = Tokenizer.load(prepare(find_model(DEMO), "bfloat16").tokenizer).encode(
    "Memory that a program asks for is not always there. The system gives it addresses, and finds a frame for each page when"
    " it is touched for the first time; when there is none left, another page has to go. Which one that should be has been"
    " argued about for sixty years. The oldest is an easy answer, and often a wrong one: what has been used again and again"
    " is old, too. Those who have looked at many programs would rather let go of the page that",
    allow_special=False,
)
MANY = 120
"""Tokens of an answer."""
SILENCE_S = 5.0
"""After so much silence the scheduler declares a member dead."""


@attrs.frozen
class Hosts:
    """Both hosts' ``memserve up``, and the settings with which a third one would be started."""

    first: Cluster
    second: Cluster
    settings: tuple[str, ...]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Both hosts; the second is started before there is anything to join."""
    folder = tmp_path_factory.mktemp("hosts")
    make_key(folder / "key")
    place = f"127.0.0.1:{free_port()}"
    common = (f"cluster.key={folder / 'key'}", "transfer.path=tcp")
    joining = (f"cluster.join={place}", "cluster.address=127.0.0.2", *common)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(start, "two-hosts-second.toml", folder / "second", *joining)
        deadline = time.monotonic() + 20
        while not any("not found yet" in log.read_text() for log in folder.glob("second/*/supervisor.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first = pool.submit(
            start, "two-hosts-first.toml", folder / "first", f"cluster.listen={place}", *common
        )
        both = Hosts(first.result(), second.result(), joining)
    yield both
    for one in (both.second, both.first):
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.wait(timeout=60)
        one.close()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """The right answer to IDS."""
    return Alone().tokens(IDS, MANY)


def test_the_second_host_waits_for_the_first_and_both_know_all(hosts: Hosts) -> None:
    """A host that is started first waits for the scheduler's host, and both list all members."""
    names = {"s0", "s1", "p0", "d0", "frontend-0", "frontend-127-0-0-2-0", "scheduler-0"}
    for one in (hosts.first, hosts.second):
        members = one.members()
        assert {member["id"].partition(".")[0] for member in members} == names
        assert {member["host"] for member in members} == {"127.0.0.1", "127.0.0.2"}
        assert httpx.get(f"{one.url}/health").json()["status"] == "ok"


def test_a_chat_over_two_hosts_has_the_right_tokens(hosts: Hosts, expected: list[int]) -> None:
    """A chat over two hosts has the right tokens, and its second turn finds the first one cached."""
    answer = hosts.first.tokens(IDS, MANY // 2)
    again = hosts.second.complete(IDS + answer, MANY // 2, ignore_eos=True)
    assert answer + again["choices"][0]["token_ids"] == expected
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(IDS) - 16
    finished = hosts.first.lines("request finished")
    assert [one["bytes_to_decode"] > 0 for one in finished] == [True]


def test_a_worker_of_the_second_host_that_is_killed_loses_no_token(hosts: Hosts, expected: list[int]) -> None:
    """A killed worker of the second host is announced by that host at once, and its stream loses no token."""
    assert stream_through_a_kill(hosts.first, IDS, MANY, "d0") == expected
    gone = hosts.first.lines("member gone")
    assert [one["reason"] for one in gone] == ["died"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cluster.key={other}", "does not take this key"),
        ("pool.page_tokens=32", "pool.page_tokens must be the same on all hosts of the cluster: 16 on"),
    ],
)
def test_a_host_that_does_not_belong_is_refused(
    hosts: Hosts, tmp_path: Path, setting: str, said: str
) -> None:
    """A host with another key or other settings ends with the reason."""
    make_key(tmp_path / "other")
    others = ("cluster.address=127.0.0.3", "shard.0.name=s9", "worker.0.shard=s9", "worker.0.name=d9")
    wrong = setting.format(other=tmp_path / "other")
    words = command("two-hosts-second.toml", tmp_path / "logs", *hosts.settings, *others, wrong)
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert said in ended.stderr


def test_a_host_that_vanishes_is_held_for_dead_and_its_requests_go_on(
    hosts: Hosts, expected: list[int]
) -> None:
    """A host that vanishes is declared dead by its silence, and its requests go on with the same tokens."""
    events = hosts.first.stream(IDS, MANY, **UNKNOWN)
    found = next(events)
    killed = time.monotonic()
    supervisor = hosts.second.process.pid
    os.kill(supervisor, signal.SIGSTOP)  # otherwise it, or its actors, could still report something
    for pid in (*actor_processes(hosts.second.logs), supervisor):
        os.kill(pid, signal.SIGKILL)
    helper = threading.Timer(
        0.5, httpx.post, [f"{hosts.first.url}/cluster/p0"], {"json": {"role": "both"}, "timeout": 30}
    )
    helper.start()
    for event in events:
        found = found + event
    took = time.monotonic() - killed
    helper.join()
    assert found == expected
    assert took < SILENCE_S + 10, "far longer than the silence and the rest of the answer"
    hosts.first.wait_idle()
    gone = {one["member"].partition(".")[0] for one in hosts.first.lines() if one.get("reason") == "silent"}
    assert gone == {"d0", "s1", "frontend-127-0-0-2-0"}
