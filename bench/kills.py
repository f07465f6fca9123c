"""Measure how long a stream pauses when an actor is killed: ``make bench-kills``.

Each sample has its own cluster. It runs one greedy stream, kills one actor with ``kill -9`` in the middle,
and takes the longest pause between two tokens after that. In ``demo.toml`` the killed worker is the only one
of its kind, so the stream waits for its successor; in ``2p2d.toml`` another worker takes the stream over. The
answer must equal the undisturbed one. Each sample also has the seconds until ``memserve up`` is ready and a
worker's anonymous memory. Figures are medians over the rounds; the client runs on the same cores.

``--beside CHECKOUT`` also measures another checkout (its ``src``, in this environment), in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from cluster import CLIENT, UP, Running, cluster
from notes import Note, table

PROMPT = "The harbour lay quiet in the morning, and the first boats had already"
ANSWER = 240
KILLED_AT = 60
"""Tokens after which the actor is killed."""
VICTIMS = (("demo.toml", "d0"), ("2p2d.toml", "d0"), ("demo.toml", "s0"), ("demo.toml", "scheduler-0"))


@attrs.frozen
class Sample:
    """The figures of one cluster."""

    ready_s: float
    own_mib: float
    """Memory of a worker that no other process shares, in MiB; the median of p0 and d0."""
    pause_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="another checkout")
    options = parser.parse_args()
    commands = {"here": UP}
    if options.beside:
        commands["beside"] = ("env", f"PYTHONPATH={options.beside.resolve() / 'src'}", *UP)
    samples: dict[tuple[str, str, str], list[Sample]] = {}
    for number in range(options.rounds):
        for config, victim in VICTIMS:
            for name, up in commands.items():
                with cluster(config, up=up) as running:
                    one = sample(running, victim)
                samples.setdefault((config, victim, name), []).append(one)
                print(f"round {number + 1}: {config} {victim} {name}: {one}", file=sys.stderr, flush=True)
    rows = [[config, victim, name, *figures(found)] for (config, victim, name), found in samples.items()]
    head = ["configuration", "killed", "code", "pause, s", "ready, s", "own memory of a worker, MiB"]
    given = " ".join(["--rounds", str(options.rounds), *(["--beside", "CHECKOUT"] if options.beside else [])])
    words = f"make bench-kills ARGS='{given}'"
    print(Note("kills").write("How long a stream pauses when an actor is killed", words, table(head, rows)))


def sample(running: Running, victim: str) -> Sample:
    """Kill ``victim`` in the middle of an answer.

    Raises AssertionError if the answer differs from an undisturbed one.
    """
    pids = {member["id"].partition(".")[0]: member["pid"] for member in running.members()}
    own = statistics.median(private_mib(pid) for name, pid in pids.items() if name in ("p0", "d0"))
    tokens, times = [], []
    for token, at in stream(running.url):
        tokens.append(token)
        times.append(at)
        if len(tokens) == KILLED_AT:
            os.kill(pids[victim], signal.SIGKILL)
    pause = max(
        after - before for before, after in zip(times[KILLED_AT - 1 :], times[KILLED_AT:], strict=False)
    )
    assert tokens == [token for token, _ in stream(running.url)], "another answer"
    return Sample(running.ready_s, own, pause)


def stream(url: str) -> Iterator[tuple[int, float]]:
    """The tokens of one answer, each with its arrival time in seconds."""
    body = {"prompt": PROMPT, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    with CLIENT.stream("POST", f"{url}/v1/completions", json={**body, "return_token_ids": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    yield from ((token, time.perf_counter()) for token in choice["token_ids"])


def private_mib(pid: int) -> float:
    """Resident memory of a process that no other process shares, in MiB."""
    found = re.findall(r"Private_\w+:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    return sum(map(int, found)) / 1024


def figures(found: list[Sample]) -> list[str]:
    """Cells of a table row: median and range of the pauses, medians of the other figures."""
    pauses = sorted(one.pause_s for one in found)
    return [
        f"{statistics.median(pauses):.2f} ({pauses[0]:.2f} to {pauses[-1]:.2f})",
        f"{statistics.median(one.ready_s for one in found):.1f}",
        f"{statistics.median(one.own_mib for one in found):.0f}",
    ]


if __name__ == "__main__":
    main()
