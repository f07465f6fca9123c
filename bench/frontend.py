"""Measure the cost and capacity of the control plane alone: ``make bench-frontend``.

The cluster is whole (one Frontend or two, GlobalScheduler, MemPoolShard, one worker; real processes, ZeroMQ
and HTTP), but its step engine answers at once with fixed tokens. A client that costs little measures from
outside, on the same cores: the latency added to TTFT and to the pace of a stream, tokens a second at 64 and
256 streams, requests a second, and the CPU time that each actor spends on a token.

``--beside CHECKOUT`` compares that CPU time, and the CPU time of chats of several turns, with those of
another checkout (its ``src``, in this environment) in interleaved rounds. It prints tables and writes no
note.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

from memserve.percentiles import percentile
from notes import ROOT, Note, number, table
from raw_client import Stream, closed_loop, request_bytes, run_streams

STREAM_TOKENS = 256
"""Length of each answer when tokens a second are measured."""
PACE_MS = 20.0
"""Duration of a step in the paced runs: 256 streams then ask for 12,800 tokens a second."""
CLUSTER = (
    "worker=[{name='w0', role='both', shard='s0'}]",
    "shard=[{name='s0', memory='2GiB'}]",
    "batch.rows=512",
    "batch.chunk_tokens=65536",
    "frontend.port=0",
)
HTTP_LIMITS = (
    "For comparison, one process with nothing behind it, measured earlier on two Zen 4 cores with a client in C: anycorn with "
    "Starlette, which serves here, 1,016 to 1,469 requests/s and 4,759 to 7,492 events/s (256 streams of 100 events); a server "
    "written for the purpose on h11 and trio 3,217 to 3,409 and 7,851 to 9,292."
)


@attrs.frozen
class Running:
    """A started cluster."""

    port: int
    pids: dict[str, list[int]]
    """Process ids by kind of actor."""

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by kind of actor."""
        return {kind: sum(map(cpu_s, pids)) for kind, pids in self.pids.items()}


@contextmanager
def cluster(step_ms: float, *settings: str, checkout: Path = ROOT) -> Iterator[Running]:
    """Run the null cluster of a checkout and yield it once it is ready; at the end, SIGTERM drains it."""
    with tempfile.TemporaryDirectory() as logs:
        script = Path(__file__).with_name("null_cluster.py")
        overrides = [f"--set={one}" for one in (*CLUSTER, f"logging.dir={logs}", *settings)]
        process = subprocess.Popen(
            [sys.executable, str(script), "up", "--step-ms", str(step_ms), *overrides],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        )
        try:
            assert process.stdout is not None
            found = next(filter(None, (re.search(r"at http://\S+?:(\d+)", line) for line in process.stdout)))
            yield Running(int(found[1]), actors(int(found[1])))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def actors(port: int) -> dict[str, list[int]]:
    """Process ids of a cluster's actors, by kind."""
    found: dict[str, list[int]] = {}
    for one in httpx.get(f"http://127.0.0.1:{port}/cluster").json()["members"]:
        found.setdefault(one["kind"], []).append(one["pid"])
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, ended threads included, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def completion(number: int, prompt_tokens: int, max_tokens: int, *, stream: bool = True) -> bytes:
    """A completions request with a prompt specific to ``number``."""
    prompt = [20 + (number * 7919 + k * 31) % 40_000 for k in range(prompt_tokens)]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return request_bytes("/v1/completions", body)


# ---- what is measured --------------------------------------------------------------------------------------


def added_ttft(running: Running, repeats: int) -> dict[str, float]:
    """Median and P99 milliseconds from a request to its first event, while nothing else runs."""
    figures = {}
    for tokens in (16, 1500):
        times = []
        for i in range(repeats):
            [one] = run_streams(running.port, [completion(i + tokens * 10_000, tokens, 2)])
            times.append((one.first - one.began) * 1e3)
        figures[f"ttft_{tokens}_p50_ms"] = statistics.median(times)
        figures[f"ttft_{tokens}_p99_ms"] = percentile(sorted(times), 99)
    return figures


def requests_a_second(running: Running, seconds: float) -> dict[str, float]:
    """Rates of unstreamed answers of one token and of /health (HTTP alone), with 32 connections kept open."""
    health = b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n"
    answer = completion(1, 16, 1, stream=False).replace(b"Connection: close\r\n", b"")
    return {
        "health_req_s": closed_loop(running.port, health, 32, seconds),
        "completions_req_s": closed_loop(running.port, answer, 32, seconds),
    }


def throughput(running: Running, streams: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of concurrent streams, tokens per event, gaps, and CPU per token by kind of actor."""
    rates, per_event, gaps, cpu = [], [], [], []
    for i in range(rounds):
        requests = [completion(i * 1000 + k, 16, STREAM_TOKENS) for k in range(streams)]
        before, client = running.cpu_s(), time.process_time()
        done = run_streams(running.port, requests)
        spent = {kind: value - before[kind] for kind, value in running.cpu_s().items()}
        cpu.append(spent | {"client": time.process_time() - client})
        rates.append(rate_of(done))
        per_event.append(streams * STREAM_TOKENS / sum(one.events - 1 for one in done))
        gaps += [gap * 1e3 for one in done for gap in one.gaps]
    tokens = streams * STREAM_TOKENS
    return {
        "tok_s": statistics.median(rates),
        "tok_s_range": [min(rates), max(rates)],
        "tokens_per_event": statistics.median(per_event),
        "gap_p50_ms": statistics.median(gaps),
        "gap_p99_ms": percentile(sorted(gaps), 99),
        "cpu_us_per_token": {
            kind: statistics.median(one[kind] for one in cpu) / tokens * 1e6 for kind in cpu[0]
        },
    }


def rate_of(done: Sequence[Stream]) -> float:
    """Tokens a second from first request to last token. Raises ValueError if a token count is wrong."""
    if wrong := [one.output_tokens for one in done if one.output_tokens != STREAM_TOKENS]:
        raise ValueError(f"streams of {STREAM_TOKENS} tokens ended with {wrong[:5]}")
    return len(done) * STREAM_TOKENS / (max(one.last for one in done) - min(one.began for one in done))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, measured on one cluster at a time."""
    found: dict[str, Any] = {}
    for frontends in (1, 2):
        count = f"frontend.count={frontends}"
        label = f"{frontends} Frontend{'s' if frontends > 1 else ''}"
        with cluster(0.0, count) as running:
            if frontends == 1:
                run_streams(running.port, [completion(k, 16, 8) for k in range(8)])
                found["alone"] = added_ttft(running, 10 * options.rounds)
            found[f"{label}, requests"] = requests_a_second(running, options.seconds)
            for streams in (64, 256):
                found[f"{label}, {streams} streams"] = throughput(running, streams, options.rounds)
        with cluster(PACE_MS, count) as running:
            for streams in (1, 8, 256):
                name = f"{label}, {streams} stream{'s' if streams > 1 else ''}, a step each {PACE_MS:g} ms"
                found[name] = throughput(running, streams, options.rounds)
    return found


# ---- compared with another checkout ------------------------------------------------------------------------

BESIDE_STREAMS = 8
CHAT_TURNS = 4
CHAT_WORDS = 80
"""Words of each user message."""


def chat_turns(running: Running, key: int) -> None:
    """Play chats of several turns one after another; each answer has 32 tokens."""
    for chat in range(BESIDE_STREAMS):
        messages: list[dict[str, str]] = []
        for turn in range(CHAT_TURNS):
            words = (f"word{(key * 7919 + chat * 97 + turn * 31 + k) % 997}" for k in range(CHAT_WORDS))
            messages.append({"role": "user", "content": " ".join(words)})
            body = {"messages": messages, "max_tokens": 32, "ignore_eos": True, "stream": True}
            run_streams(
                running.port,
                [request_bytes("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})],
            )
            messages.append({"role": "assistant", "content": " ".join(["the answer"] * 16)})


def compared(other: Path, rounds: int) -> str:
    """Tables of CPU microseconds by kind of actor in this checkout and another.

    They have the medians of interleaved rounds, and their ratios.
    """
    streams: dict[Path, list[dict[str, float]]] = {ROOT: [], other: []}
    chats: dict[Path, list[dict[str, float]]] = {ROOT: [], other: []}
    for i in range(rounds):
        for checkout in (ROOT, other) if i % 2 else (other, ROOT):
            with cluster(PACE_MS, checkout=checkout) as running:
                run_streams(running.port, [completion(k, 16, 8) for k in range(BESIDE_STREAMS)])
                streams[checkout].append(throughput(running, BESIDE_STREAMS, 1)["cpu_us_per_token"])
            with cluster(0.0, checkout=checkout) as running:
                run_streams(running.port, [completion(k, 16, 8) for k in range(BESIDE_STREAMS)])
                before = running.cpu_s()
                chat_turns(running, i)
                turns = BESIDE_STREAMS * CHAT_TURNS
                spent = {
                    kind: (value - before[kind]) / turns * 1e6 for kind, value in running.cpu_s().items()
                }
                chats[checkout].append(spent)
    return "\n\n".join(
        (
            ratios(f"{BESIDE_STREAMS} streams, a step each {PACE_MS:g} ms, us a token", streams, other),
            ratios("a chat's turn of 32 tokens, us a turn", chats, other),
        )
    )


def ratios(what: str, found: dict[Path, list[dict[str, float]]], other: Path) -> str:
    """A table with one row per kind of actor."""
    rows = []
    for kind in KINDS:
        values = {one: [spent[kind] for spent in rounds if kind in spent] for one, rounds in found.items()}
        if not values[ROOT]:
            continue
        here, there = (statistics.median(values[one]) for one in (ROOT, other))
        shown = [
            f"{number(middle)} ({number(min(values[one]))} to {number(max(values[one]))})"
            for middle, one in ((there, other), (here, ROOT))
        ]
        rows.append([kind, *shown, number(here / there)])
    return table([what, "the other", "this", "ratio"], rows)


# ---- the note ----------------------------------------------------------------------------------------------

KINDS = ("Frontend", "DecodeWorker", "MemPoolShard", "GlobalScheduler", "client")


def write_note(found: dict[str, Any], command: str, rounds: int) -> Path:
    """Write docs/measurements/<date>-frontend.md and its plot."""
    note = Note("frontend")
    plot = note.plot("cpu")
    draw(found, plot)
    return note.write(
        "The control plane alone",
        command,
        f"A null engine answers at once with fixed tokens; Frontends, GlobalScheduler, MemPoolShard, one worker and the "
        f"client share the cores. Medians of {rounds} rounds; streams ask for {STREAM_TOKENS} tokens after 16 of prompt.",
        *tables(found),
        HTTP_LIMITS,
        f"![CPU per token]({plot.name})",
    )


def tables(found: dict[str, Any]) -> list[str]:
    """The figures as Markdown."""
    alone = found["alone"]
    first = [
        [f"{tokens:,} prompt tokens", *(number(alone[f"ttft_{tokens}_{at}_ms"]) for at in ("p50", "p99"))]
        for tokens in (16, 1500)
    ]
    requests = [
        [name.partition(",")[0], number(one["completions_req_s"]), number(one["health_req_s"])]
        for name, one in found.items()
        if "health_req_s" in one
    ]
    streams = [[name, *stream_row(one)] for name, one in found.items() if "tok_s" in one]
    return [
        table(["added time to first token, ms", "p50", "P99"], first),
        table(["requests/s, 32 connections", "completions of 1 token", "/health"], requests),
        table(
            [
                "streams",
                "tok/s (range)",
                "tokens an event",
                "gap p50, P99, ms",
                *(f"{one}, us a token" for one in KINDS),
            ],
            streams,
        ),
    ]


def stream_row(one: dict[str, Any]) -> list[str]:
    """The cells of one throughput measurement."""
    low, high = map(number, one["tok_s_range"])
    cpu = one["cpu_us_per_token"]
    return [
        f"{number(one['tok_s'])} ({low} to {high})",
        number(one["tokens_per_event"]),
        f"{number(one['gap_p50_ms'])}, {number(one['gap_p99_ms'])}",
        *(number(cpu[kind]) for kind in KINDS),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot CPU microseconds per token, stacked by kind of actor, for each throughput measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {name: one for name, one in found.items() if "tok_s" in one}
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(cases) + 1.5), layout="constrained")
    left = [0.0] * len(cases)
    for kind in KINDS:
        values = [one["cpu_us_per_token"][kind] for one in cases.values()]
        axes.barh(list(cases), values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("CPU, microseconds a token")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure, write the note, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; medians are shown")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of requests a second")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="only compare CPU with this one's")
    options = parser.parse_args()
    if options.beside:
        print(compared(options.beside.resolve(), options.rounds))
        return
    found = measure(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    arguments = " ".join(sys.argv[1:])
    command = f'make bench-frontend ARGS="{arguments}"' if arguments else "make bench-frontend"
    path = write_note(found, command, options.rounds)
    print(path.read_text())


if __name__ == "__main__":
    main()
