"""Each actor is killed and stopped under load, as a real process: no stream loses, repeats or changes a token.

The rounds share one cluster, which has to recover from each. `make test` runs those that no other test has; all of them
take three to five minutes on two cores: `make kill-matrix`. Whether the phase of a request matters is tested
exhaustively in virtual time (test_cluster.py); here the operating system, ZeroMQ and the supervisor take part.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

import attrs
import httpx
import pytest

from clusters import Cluster, running
from memserve.engine.checkpoint import read_spec
from memserve.engine.spec import find_model
from memserve.kernels.native_build import why_not
from test_model import DEMO, prompt

STREAMS = 8
STAGGER_S = 0.12
"""Time between the starts of two streams, so that they are in different phases when the signal is sent."""
PATIENCE_S = 120.0
VOCAB = 40_000
PHASES = {
    "request received": "queued",
    "request placed": "queued",
    "request planned": "queued",
    "prefill started": "prefilling",
    "prefill finished": "handing over",
    "first token": "handing over",
    "handed over": "handing over",
    "decode started": "decoding",
    "decode finished": "retiring",
    "request finished": "retiring",
}
"""What a request is doing after its last event."""
VICTIMS = ("p0", "d0", "scheduler-0", "s0", "frontend-1")
ALL = [(victim, how) for victim in VICTIMS for how in (signal.SIGKILL, signal.SIGSTOP)]
FEW = [("scheduler-0", signal.SIGSTOP), ("s0", signal.SIGKILL), ("frontend-1", signal.SIGKILL)]
WHOLE = os.environ.get("MEMSERVE_KILL_MATRIX") == "all"
ROUNDS = ALL if WHOLE else FEW
LAYOUT = "2p2d.toml" if WHOLE else "demo.toml"
"""FEW kills no worker, so a second pair would only add the time of their starts, also after their shard's death."""
met: Counter[str] = Counter()
"""Phases in which requests were when an actor was killed or stopped, over all rounds."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One scheduler, one shard, two Frontends and one or two pairs of workers, with a dtype whose tokens are exact on
    this machine."""
    exact = "bfloat16" if why_not(read_spec(find_model(DEMO)), "bfloat16") is None else "float32"
    with socket.socket() as free:  # both Frontends on one port, which 0 would not give
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (
        f"frontend.port={port}",
        f"model.dtype={exact}",
        "frontend.count=2",
        "batch.chunk_tokens=64",
        "model.max_context=1024",
    )
    with running(LAYOUT, tmp_path_factory.mktemp("matrix"), *settings) as started:
        yield started


@attrs.define
class Stream:
    """One client, and what it received."""

    ids: list[int]
    body: dict[str, Any]
    tokens: list[int] = attrs.field(factory=list)
    broken: str = ""
    """Its connection ended before its answer."""

    def follow(self, cluster: Cluster) -> None:
        """Send the request and collect the tokens of its answer."""
        try:
            for event in cluster.stream(self.ids, 48, **self.body):
                self.tokens += event
        except httpx.TransportError as error:
            self.broken = repr(error)


def streams(salt: int) -> list[Stream]:
    """Clients with prompts that no earlier round has cached, greedy and seeded in turn."""
    ways = ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.95, "seed": 11})
    return [Stream(prompt(40 + 50 * i, 100 * salt + i, VOCAB), dict(ways[i % 2])) for i in range(STREAMS)]


def play(cluster: Cluster, clients: list[Stream], blow: Any) -> None:
    """Start the clients one after another, call ``blow`` when three quarters have started, and wait for all of them."""
    threads = [threading.Thread(target=one.follow, args=(cluster,)) for one in clients]
    for i, thread in enumerate(threads):
        if i == len(threads) * 3 // 4:
            blow()
        thread.start()
        time.sleep(STAGGER_S)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a stream never ended"


def note_phases(cluster: Cluster, at: datetime) -> None:
    """Count what each open request was doing at that moment, according to the logs."""
    last: dict[str, str] = {}
    for line in sorted(cluster.lines(), key=lambda line: line["ts"]):
        if line["event"] in PHASES and datetime.fromisoformat(line["ts"]) <= at:
            last[line["request"]] = line["event"]
    met.update(PHASES[event] for event in last.values() if event != "request finished")


def undisturbed(cluster: Cluster, client: Stream) -> list[int]:
    """The tokens of the same request while nobody dies."""
    return cluster.tokens(client.ids, 48, **client.body)


@attrs.define
class HealthLog:
    """What /health answers during a round: each change."""

    cluster: Cluster
    said: list[tuple[int, str, str]] = attrs.field(factory=list)
    """HTTP status, status and reason."""
    _over: threading.Event = attrs.field(factory=threading.Event)

    def follow(self) -> None:
        """Ask again and again until the round ends; a Frontend that has died cannot answer."""
        address = urlsplit(self.cluster.url).netloc
        while not self._over.wait(0.05):
            with suppress(OSError, HTTPException), closing(HTTPConnection(address, timeout=2.0)) as frontend:
                frontend.request("GET", "/health")
                answer = frontend.getresponse()
                found = json.loads(answer.read())
                now = (answer.status, found["status"], found.get("reason", ""))
                if self.said[-1:] != [now]:
                    self.said.append(now)

    def end(self) -> None:
        """Wait until all is well again, and check that each answer had the right status code, and a reason where one is
        due."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self.said and self.said[-1] == (200, "ok", "")):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        self._over.set()
        for code, status, reason in self.said:
            assert code == (503 if status == "unavailable" else 200), self.said
            assert bool(reason) is (status != "ok"), self.said


def complete(cluster: Cluster) -> None:
    """Wait until every actor is ready: one that is starting would be taken for hung only after minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while httpx.get(f"{cluster.url}/health").json()["status"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def missed(cluster: Cluster, victim: str, pid: int) -> None:
    """Wait until the victim has a successor: a stopped one without a stream is replaced only after the streams are over."""
    deadline = time.monotonic() + PATIENCE_S
    while (
        pid in (now := [one["pid"] for one in cluster.members() if one["id"].startswith(f"{victim}.")])
        or not now
    ):
        assert time.monotonic() < deadline, f"{victim} was never replaced"
        time.sleep(0.1)


def recovered(cluster: Cluster) -> None:
    """Wait until the cluster serves again and no page is leased."""
    cluster.wait_healthy()
    cluster.wait_idle()


@pytest.mark.parametrize(("victim", "how"), ROUNDS, ids=[f"{victim}-{how.name}" for victim, how in ROUNDS])
def test_no_token_is_lost(cluster: Cluster, victim: str, how: signal.Signals) -> None:
    """Whichever actor is killed or stopped, each stream goes on with the tokens that it would have had."""
    clients = streams(salt=sum(map(ord, victim)) + int(how))
    complete(cluster)
    pid, struck, health = cluster.pid(victim), [], HealthLog(cluster)
    threading.Thread(target=health.follow, daemon=True).start()

    def blow() -> None:
        struck.append(datetime.now(UTC))
        os.kill(pid, how)

    play(cluster, clients, blow)
    note_phases(cluster, struck[0])
    missed(cluster, victim, pid)
    recovered(cluster)
    health.end()
    ways = [
        f"{victim} {end} and is being restarted" for end in ("was killed by SIGKILL", "hung and was killed")
    ]
    if not victim.startswith(("scheduler", "frontend")):  # they are back sooner than /health is asked again
        assert any(way in reason for _, _, reason in health.said for way in ways), health.said
    if victim == "s0":
        assert any(code == 503 for code, _, _ in health.said), "nothing can be served without its only shard"
    if not victim.startswith("frontend"):
        assert [one.broken for one in clients] == [""] * STREAMS
    whole = [one for one in clients if not one.broken]
    assert [one.tokens for one in whole] == [undisturbed(cluster, one) for one in whole]
    assert cluster.pid(victim) != pid
    assert pid not in [one["pid"] for one in cluster.members()]


@pytest.mark.skipif(
    not WHOLE, reason="left to `make kill-matrix`; in virtual time, test_sim.py pauses every actor"
)
@pytest.mark.parametrize(("victim", "seconds"), [("scheduler-0", 7.0)])
def test_who_wakes_in_time_harms_nobody(cluster: Cluster, victim: str, seconds: float) -> None:
    """A scheduler that was stopped for longer than others may be silent declares nobody dead on waking."""
    clients, pid = streams(salt=int(seconds)), cluster.pid(victim)
    known = {one["pid"] for one in cluster.members()}

    def blow() -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()

    play(cluster, clients, blow)
    recovered(cluster)
    assert [one.broken for one in clients] == [""] * STREAMS
    assert [one.tokens for one in clients] == [undisturbed(cluster, one) for one in clients]
    assert {one["pid"] for one in cluster.members()} == known


def test_the_rounds_met_requests_before_and_after_their_first_token() -> None:
    """The rounds caught requests before and after their first token; the shorter phases are in test_cluster.py."""
    assert met["decoding"] and met["queued"] + met["prefilling"], met
