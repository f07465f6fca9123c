"""Measure how long a handoff between two shards delays its request: ``make bench-handover``.

Real clusters of ``configs/2shards.toml`` run one after another: each path, with pages sent while the prompt
is computed (``transfer.ahead``) and with all pages sent after it. Prompts are new, so that all their pages
move. The first token comes from the prefill worker, the second from the decode worker once it has the pages;
the pause between them is the handoff and one step. Figures are medians over the rounds, in milliseconds; the
client runs on the same cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise

from cluster import CLIENT, cluster
from notes import machine

ANSWER = 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2000], help="of the prompts")
    parser.add_argument("--paths", nargs="+", default=["mapped", "tcp"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    print("| path | ahead | prompt | first token | pause to the second | later pauses |")
    print("|---|---|---|---|---|---|")
    for path in options.paths:
        for ahead in ("true", "false"):
            settings = (f"transfer.path={path}", f"transfer.ahead={ahead}", "scheduler.policy=least_load")
            with cluster("2shards.toml", *settings) as running:
                pauses(running.url, 64, 0)  # warm-up
                for tokens in options.tokens:
                    rounds = [pauses(running.url, tokens, i + 1) for i in range(options.rounds)]
                    first, second, later = (statistics.median(one) * 1e3 for one in zip(*rounds, strict=True))
                    print(
                        f"| {path} | {ahead} | {tokens} | {first:.0f} | {second:.1f} | {later:.1f} |",
                        flush=True,
                    )


def pauses(url: str, tokens: int, seed: int) -> tuple[float, float, float]:
    """Seconds to the first token, from the first to the second, and between later tokens (median)."""
    prompt = [(seed * 7919 + tokens * 104_729 + i * 31) % 40_000 + 20 for i in range(tokens)]
    body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    times = [time.perf_counter()]
    with CLIENT.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        events = (line for line in answer.iter_lines() if line.startswith("data: {"))
        times += (time.perf_counter() for event in events if json.loads(event[6:]).get("choices"))
    gaps = [after - before for before, after in pairwise(times)]
    return gaps[0], gaps[1], statistics.median(gaps[2:ANSWER])


if __name__ == "__main__":
    main()
