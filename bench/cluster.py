"""Measure the costs and the speed of a whole cluster on this machine: ``make bench-cluster``.

Starts ``memserve up`` on a free port and measures from outside: time until ready, CPU of the idle cluster,
memory by actor and of each further worker, TTFT of a prompt whose long prefix is cold and then warm, one
stream alone, and many at once. Latencies are medians of several rounds; the client runs on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

ROOT = Path(__file__).parent.parent
IDLE_S = 10.0
ROUNDS = 5
PREFIX_TOKENS = 1500
STREAMS = 64
CLIENT = httpx.Client(timeout=300, limits=httpx.Limits(max_connections=STREAMS))
"""The HTTP client of all requests: making one takes as long as a warm request."""


@attrs.frozen
class Running:
    """A started cluster."""

    url: str
    ready_s: float

    def members(self) -> list[dict[str, Any]]:
        """Every actor, as ``memserve status`` reports it."""
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/cluster").json()["members"]
        return found


UP = (sys.executable, "-m", "memserve", "up")


@contextmanager
def cluster(config: str, *settings: str, up: Sequence[str] = UP) -> Iterator[Running]:
    """Run ``memserve up`` with a configuration of this project.

    Ends the program, saying why, if the cluster does not start.

    ``up``: the command that starts it. Drafts are off unless ``settings`` say otherwise: answers to the
    random words of most benchmarks repeat themselves, so a benchmark would measure little but speculative
    decoding.
    """
    with tempfile.TemporaryDirectory() as logs:
        ours = ("frontend.port=0", f"logging.dir={logs}", "batch.draft=0")
        overrides = [f"--set={one}" for one in (*ours, *settings)]
        began = time.monotonic()
        command = [*up, "-c", str(ROOT / "configs" / config), *overrides]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield Running(_url(process.stdout, config), time.monotonic() - began)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def _url(output: Iterable[str], config: str) -> str:
    """The URL that ``memserve up`` prints. Its other lines go to stderr, where its errors are."""
    for line in output:
        if found := re.search(r"at (http://\S+?);", line):
            return found[1]
        print(line, end="", file=sys.stderr)
    sys.exit(f"memserve up -c configs/{config} ended before it was ready: see above")


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that the processes have used."""
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in pids]
    return sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """Resident memory without shared memory (the arena), and the proportional set size, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = sum(int(kib) for kib in re.findall(r"Rss(?:Anon|File):\s+(\d+)", status))
    proportional = int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])  # type: ignore[index]
    return {"rss_without_arena": resident / 1024, "pss": proportional / 1024}


def stream(url: str, prompt: list[int], max_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the end of the answer, and the number of cached prompt tokens."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began, first, cached = time.perf_counter(), 0.0, 0
    with CLIENT.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line[6:]).get("usage")
                cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
    return first, time.perf_counter() - began, cached


def idle(running: Running) -> dict[str, float]:
    """CPU used by all processes while there are no requests, in percent of one core."""
    pids = [one["pid"] for one in running.members()]
    time.sleep(2)
    before = cpu_s(pids)
    time.sleep(IDLE_S)
    return {"idle_cpu_percent": (cpu_s(pids) - before) / IDLE_S * 100}


def prefix(running: Running) -> dict[str, float]:
    """TTFT with a shared prefix that is new, and with one that is cached."""
    cold, warm = [], []
    for i in range(ROUNDS):
        shared = [(i * 7919 + k * 31) % 40_000 + 20 for k in range(PREFIX_TOKENS)]
        cold.append(stream(running.url, [*shared, *range(100, 108)], 1)[0])
        first, _, cached = stream(running.url, [*shared, *range(200, 208)], 1)
        assert cached >= PREFIX_TOKENS // 16 * 16, cached
        warm.append(first)
    cold_ms, warm_ms = statistics.median(cold) * 1e3, statistics.median(warm) * 1e3
    return {"ttft_cold_ms": cold_ms, "ttft_warm_ms": warm_ms, "cold_over_warm": cold_ms / warm_ms}


def throughput(running: Running) -> dict[str, float]:
    """Decode rate of one stream, and the output rate of many at once with their prompts included."""
    alone = []
    for _ in range(ROUNDS):
        first, last, _ = stream(running.url, list(range(100, 120)), 64)
        alone.append(63 / (last - first))
    began = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        done = list(pool.map(lambda i: stream(running.url, [i + 20, *range(300, 330)], 32), range(STREAMS)))
    took = time.perf_counter() - began
    return {
        "one_stream_tok_s": statistics.median(alone),
        f"{STREAMS}_streams_tok_s": STREAMS * 32 / took,
        f"{STREAMS}_streams_ttft_p50_ms": statistics.median(first for first, _, _ in done) * 1e3,
    }


def measure() -> dict[str, Any]:
    """All figures of a run."""
    found: dict[str, Any] = {}
    with cluster("demo.toml") as running:
        found["ready_s"] = running.ready_s
        found |= idle(running)
        found["memory_mib"] = {
            one["id"].rpartition(".")[0]: memory_mib(one["pid"]) for one in running.members()
        }
        found |= prefix(running)
        found |= throughput(running)
    found |= one_more_worker()
    return found


def one_more_worker() -> dict[str, float]:
    """Memory of each further worker, from the sum of all actors' PSS, which counts shared pages once."""
    sums = []
    for config in ("demo.toml", "2p2d.toml"):  # two workers, four workers, on one shard of one size
        with cluster(config, "shard.0.memory=1GiB") as running:
            stream(running.url, list(range(100, 300)), 8)
            sums.append(sum(memory_mib(one["pid"])["pss"] for one in running.members()))
    return {"a_further_worker_pss_mib": (sums[1] - sums[0]) / 2}


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    found = measure()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    print(f"{machine}; {ROUNDS} rounds, medians")
    for name, value in found.items():
        if isinstance(value, dict):
            for actor, figures in value.items():
                print(
                    f"{name:<28} {actor:<12} " + "  ".join(f"{key} {one:.0f}" for key, one in figures.items())
                )
        else:
            print(f"{name:<28} {value:.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
