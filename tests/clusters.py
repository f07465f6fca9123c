"""Real clusters for tests: ``memserve up`` as a user runs it, on a free port, with temporary logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

ROOT = Path(__file__).parent.parent
SMALL = "256MiB"
"""Memory of a host shard: a whole GiB would add seconds to each start of a cluster, and no test needs it."""
UNKNOWN = {"cache_salt": "a request whose answer the pool does not know"}
"""Sent with a request that was made before: otherwise speculation could end its answer before a test kills a worker."""
READY_S = 120.0
"""Longest start in seconds: CI machines are slow, and the first start converts the weights."""


@attrs.define
class Cluster:
    """A running ``memserve up``."""

    process: subprocess.Popen[str]
    url: str
    logs: Path

    def complete(self, prompt: list[int] | str, max_tokens: int, **more: Any) -> dict[str, Any]:
        """Request one completion, greedy and with token ids; the answer's JSON."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            **more,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def tokens(self, prompt: list[int], max_tokens: int, **more: Any) -> list[int]:
        """The ``max_tokens`` generated ids; end tokens do not end the answer."""
        ids: list[int] = self.complete(prompt, max_tokens, ignore_eos=True, **more)["choices"][0]["token_ids"]
        return ids

    def stream(self, prompt: list[int], max_tokens: int, **more: Any) -> Iterator[list[int]]:
        """The ids of a streamed answer, event by event; stop iterating to disconnect as a client does."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        body |= {"return_token_ids": True, **more}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        yield choice.get("token_ids") or []

    def members(self) -> list[dict[str, Any]]:
        """The cluster's members, as ``memserve status`` shows them."""
        found = httpx.get(f"{self.url}/cluster").json()
        members: list[dict[str, Any]] = found["members"] if isinstance(found, dict) else found
        return members

    def pid(self, name: str) -> int:
        """Process id of the latest incarnation of an actor."""
        return [one["pid"] for one in self.members() if one["id"].startswith(f"{name}.")][-1]

    def close(self) -> None:
        """Close the pipe to the process."""
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_idle(self) -> dict[str, float]:
        """Wait until no page is leased, then return the shard's load. Fails after 20 s."""
        deadline = time.monotonic() + 20
        while True:
            shard = next(one["load"] for one in self.members() if one["kind"] == "MemPoolShard")
            if shard.get("pages_leased") == 0 and shard.get("leases") == 0:
                return shard
            assert time.monotonic() < deadline, f"pages still leased: {shard}"
            time.sleep(0.1)

    def wait_healthy(self) -> None:
        """Wait until the cluster serves, for example after a restart. Fails after a minute."""
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The log lines of the latest run: those of ``event``, or all."""
        files = sorted(max(self.logs.iterdir()).glob("*.jsonl"))
        # Tests look again and again while they wait: a line of another event is not read.
        found = (
            json.loads(line) for file in files for line in file.read_text().splitlines() if event in line
        )
        return [line for line in found if event in ("", line["event"])]


def command(config: str, logs: Path, *settings: str) -> list[str]:
    """The command line of ``memserve up`` with ``settings``; later ones win.

    Contexts are short and host shards small unless ``settings`` say otherwise.
    """
    shards = tomllib.loads((ROOT / "configs" / config).read_text())["shard"]
    small = [f"shard.{i}.memory={SMALL}" for i, shard in enumerate(shards) if "device" not in shard]
    given = ["frontend.port=0", f"logging.dir={logs}", "model.max_context=2048", *small, *settings]
    overrides = [word for one in given for word in ("--set", one)]
    return [sys.executable, "-m", "memserve", "up", "-c", str(ROOT / "configs" / config), *overrides]


def start(config: str, logs: Path, *settings: str) -> Cluster:
    """Start a cluster and wait until it reports its address. Fails if it ends first, or after READY_S."""
    process = subprocess.Popen(
        command(config, logs, *settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    assert process.stdout is not None
    too_late = threading.Timer(READY_S, process.terminate)
    too_late.start()
    for line in process.stdout:
        said.append(line)
        found = re.search(r"ready in .* at (http://\S+?);", line)
        if found:
            too_late.cancel()
            return Cluster(process, found[1], logs)
    too_late.cancel()
    raise AssertionError(f"memserve up ended with {process.wait()}: {''.join(said)}")


@contextmanager
def running(config: str, logs: Path, *settings: str) -> Iterator[Cluster]:
    """A cluster for a ``with`` block; SIGTERM ends it, and it must exit within a minute."""
    cluster = start(config, logs, *settings)
    try:
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.process.send_signal(signal.SIGTERM)
            cluster.process.wait(timeout=60)
        cluster.close()


def stream_through_a_kill(cluster: Cluster, ids: list[int], many: int, name: str) -> list[int]:
    """The ids of a stream during which the actor ``name`` is killed, after the first event."""
    victim = cluster.pid(name)
    events: Iterator[list[int]] = cluster.stream(ids, many, **UNKNOWN)
    found = next(events)
    os.kill(victim, signal.SIGKILL)
    for event in events:
        found = found + event
    return found


def actor_processes(logs: Path) -> list[int]:
    """Pids of the actors of the cluster that logs into ``logs``, and of its zygotes, found by their titles."""
    from memserve.processes.place import place_path

    runtime = str(place_path(logs))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(os.fsencode(runtime) in word for word in words):
                found.append(int(entry.name))
    return found
