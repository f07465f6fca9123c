"""Real clusters for tests: ``memserve up`` as a user runs it, on a free port, logging into a temporary directory."""

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
"""Of a shard on the host: filling a whole GiB costs each start of a cluster seconds, and no test needs as much."""
READY_S = 120.0
"""Generous: CI machines are slow and converting the weights is part of the first start."""


@attrs.define
class Cluster:
    """A running ``memserve up``."""

    process: subprocess.Popen[str]
    url: str
    logs: Path

    def complete(self, prompt: list[int] | str, max_tokens: int, **more: Any) -> dict[str, Any]:
        """One whole /v1/completions answer: greedy, with token ids."""
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
        """The generated ids, whatever they are."""
        ids: list[int] = self.complete(prompt, max_tokens, ignore_eos=True, **more)["choices"][0]["token_ids"]
        return ids

    def stream(self, prompt: list[int], max_tokens: int, **more: Any) -> Iterator[list[int]]:
        """The ids of a streamed answer, event by event; stop iterating to leave as a client does."""
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
        """What ``memserve status`` shows."""
        found = httpx.get(f"{self.url}/cluster").json()
        members: list[dict[str, Any]] = found["members"] if isinstance(found, dict) else found
        return members

    def pid(self, name: str) -> int:
        """Process id of the newest incarnation of an actor."""
        return [one["pid"] for one in self.members() if one["id"].startswith(f"{name}.")][-1]

    def close(self) -> None:
        """Let go of the pipe."""
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_idle(self) -> dict[str, float]:
        """Wait until no page is leased; the shard's load then. Fails after 20 s."""
        deadline = time.monotonic() + 20
        while True:
            shard = next(one["load"] for one in self.members() if one["kind"] == "MemPoolShard")
            if shard.get("pages_leased") == 0 and shard.get("leases") == 0:
                return shard
            assert time.monotonic() < deadline, f"pages still leased: {shard}"
            time.sleep(0.1)

    def wait_healthy(self) -> None:
        """Wait until it serves again after a restart. Fails after a minute."""
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def lines(self) -> list[dict[str, Any]]:
        """Every log line of the run."""
        run = max(self.logs.iterdir())
        return [
            json.loads(line) for file in sorted(run.glob("*.jsonl")) for line in file.read_text().splitlines()
        ]


def command(config: str, logs: Path, *settings: str) -> list[str]:
    """``memserve up`` with settings, of which later ones count. Texts are short and shards small unless they say otherwise."""
    shards = tomllib.loads((ROOT / "configs" / config).read_text())["shard"]
    small = [f"shard.{i}.memory={SMALL}" for i, shard in enumerate(shards) if "device" not in shard]
    given = ["frontend.port=0", f"logging.dir={logs}", "model.max_context=2048", *small, *settings]
    overrides = [word for one in given for word in ("--set", one)]
    return [sys.executable, "-m", "memserve", "up", "-c", str(ROOT / "configs" / config), *overrides]


def start(config: str, logs: Path, *settings: str) -> Cluster:
    """Start and wait until it says where it serves."""
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
    """A cluster for a ``with`` block; ended by SIGTERM, and nothing of it may be left."""
    cluster = start(config, logs, *settings)
    try:
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.process.send_signal(signal.SIGTERM)
            cluster.process.wait(timeout=60)
        cluster.close()


def stream_through_a_kill(cluster: Cluster, ids: list[int], many: int, name: str) -> list[int]:
    """A stream whose worker is killed in its middle."""
    events: Iterator[list[int]] = cluster.stream(ids, many)
    found = next(events)
    os.kill(cluster.pid(name), signal.SIGKILL)
    for event in events:
        found = found + event
    return found


def actor_processes(logs: Path) -> list[int]:
    """Pids of all actors of the cluster that logs there, by their command lines."""
    from memserve.processes.place import place_path

    runtime = str(place_path(logs))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(runtime) in words:
                found.append(int(entry.name))
    return found
