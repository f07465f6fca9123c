"""A worker that joins a running cluster from another terminal under load: real processes, the real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clusters import Cluster, running

PATIENCE_S = 90.0
NEW = 16
PAUSE_S = 0.2
"""Between an answer and the client's next request: without pauses, a worker that starts would get no cores."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for other processes."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def working(cluster: Cluster, name: str) -> int | None:
    """The process id of a worker that has generated tokens, or None."""
    members = [one for one in cluster.members() if one["id"].startswith(f"{name}.")]
    return next((one["pid"] for one in members if one["load"].get("generated_tokens_total")), None)


def test_a_worker_joins_under_load_dies_and_leaves(tmp_path: Path) -> None:
    """A joined worker gets requests, returns after kill -9, and leaves without costing a token."""
    join = [sys.executable, "-m", "memserve", "join", "--name", "d1", "--log-dir", str(tmp_path)]
    with running("colocated.toml", tmp_path, "worker.0.threads=1") as cluster, ThreadPoolExecutor(3) as pool:
        prompts = [[i + 300, *range(50, 90)] for i in range(3)]
        undisturbed = list(pool.map(lambda prompt: cluster.tokens(prompt, NEW), prompts))
        enough, wrong, served = threading.Event(), [], []

        def ask(i: int) -> None:
            while not enough.is_set():
                tokens = cluster.tokens(prompts[i], NEW)
                served.append(i)
                if tokens != undisturbed[i]:
                    wrong.append((i, tokens))
                enough.wait(PAUSE_S)

        load = [pool.submit(ask, i) for i in range(3)]
        joiner = subprocess.Popen(join, stdout=subprocess.DEVNULL)
        try:
            until(lambda: working(cluster, "d1"), "it took no request")
            killed = working(cluster, "d1")
            os.kill(killed, signal.SIGKILL)
            until(lambda: working(cluster, "d1") not in (None, killed), "its successor took no request")
            joiner.send_signal(signal.SIGINT)
            assert joiner.wait(PATIENCE_S) == 0
        finally:
            enough.set()
            joiner.kill()
            joiner.wait()
        for one in load:
            one.result()
        assert wrong == []
        assert set(served) == set(range(3))
        assert [one for one in cluster.members() if one["id"].startswith("d1.")] == []
        resubmitted = [line["reason"] for line in cluster.lines("request resubmitted")]
        assert not [reason for reason in resubmitted if "d1" not in reason], (
            "only its SIGKILL may cost a retry"
        )
        cluster.wait_idle()
        assert cluster.tokens(prompts[0], NEW) == undisturbed[0]
